"""A Keras model as a checkpoint and back: what `save_weights` would write, and what each layer of it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import ml_dtypes

from bnlayer.checkpoint import Checkpoint, Layer, Tensor
from bnlayer.contract import NDArray
from bnlayer.errors import CheckpointError, DialectError
from bnlayer.state import array_names, needs_counter

from . import runtime
from .bridge import to_array
from .exchange import record
from .graph import flattened_from
from .inside import named_layers, own_variables
from .stores import Group, restore, saved, tensor_name

# Kinds by Keras's classes, and which attribute of a layer has which role.
_KINDS: Final[Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]]] = {
    "depthwise": (("DepthwiseConv1D", "DepthwiseConv2D"), {"kernel": "kernel", "bias": "bias"}),
    "separable": (("SeparableConv1D", "SeparableConv2D"), {"depthwise": "depthwise_kernel",
                                                           "kernel": "pointwise_kernel", "bias": "bias"}),
    "conv transpose": (("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), {"kernel": "kernel", "bias": "bias"}),
    "conv": (("Conv1D", "Conv2D", "Conv3D"), {"kernel": "kernel", "bias": "bias"}),
    "dense": (("Dense",), {"kernel": "kernel", "bias": "bias"}),
    "embedding": (("Embedding",), {"kernel": "embeddings"}),
    "norm": (("LayerNormalization", "GroupNormalization", "RMSNormalization"), {"gamma": "gamma", "beta": "beta"}),
}  # fmt: skip
_OTHER_WORDS: Final = {"gamma": "scale"}  # RMSNormalization's


def read(model: Any) -> Checkpoint:
    """Copies of the model's tensors; see `ModelAdapter.read`.

    Raises:
        CheckpointError: the model is not built.
    """
    groups = _saved(model)
    named = _Places(groups)
    tensors: dict[str, str | None] = {}  # in order, without repetition
    layers: list[Layer] = []
    for name, layer in named_layers(model).items():
        own = named.claim(own_variables(layer))
        if own is not None:
            tensors.update(dict.fromkeys(own.values()))
            layers += _layers(name, layer, own)
    values = {tensor_name(path, key): value for path, group in groups.items() for key, value in group.values.items()}
    # Beside layers' variables there are the seeds of random layers, and an optimizer's.
    tensors.update(dict.fromkeys(values))
    return Checkpoint(
        "keras.h5",
        {name: Tensor.of(to_array(values[name])) for name in tensors},
        order_is_meaningful=True,
        metadata={"layer_names": {path: group.name for path, group in groups.items() if path and group.name}},
        layers=tuple(layers),
    )


def write(model: Any, checkpoint: Checkpoint) -> Any:
    """The model with its tensors from the checkpoint; see `ModelAdapter.write`.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or of a kind of number that the model's does not
            hold; or the model is not built.
    """
    groups = _saved(model)
    held = {tensor_name(path, key): value for path, group in groups.items() for key, value in group.values.items()}
    missing = [name for name in held if name not in checkpoint]
    unknown = [name for name in checkpoint if name not in held]
    if missing or unknown:
        said = [("lacks", missing), ("has, and the model has not,", unknown)]
        parts = [f"{verb} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for verb, names in said if names]
        raise CheckpointError(f"the checkpoint {' and '.join(parts)}; write it under the names that `read` gives.")
    arrays = {name: _fitting(name, checkpoint[name], value) for name, value in held.items()}
    restore(
        model,
        {path: {key: arrays[tensor_name(path, key)] for key in group.values} for path, group in groups.items()},
    )
    return model


def layer_names(name: str, layer: Any) -> tuple[str, ...]:
    """Under which names `read` lists a layer of this name."""
    return (f"{name}/depthwise", f"{name}/pointwise") if _kind(layer) == "separable" else (name,)


class _Places:
    """Which path of the file a layer's variables are under."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self._paths: dict[int, list[dict[int, str]]] = {}
        for path, group in groups.items():
            names = {id(value): tensor_name(path, key) for key, value in group.values.items()}
            for value in names:
                self._paths.setdefault(value, []).append(names)

    def claim(self, variables: list[Any]) -> dict[int, str] | None:
        """Ids of these variables to their names, in the order of the variables; each group is claimed once."""
        ids = [id(variable) for variable in variables]
        for names in (names for each in ids for names in self._paths.get(each, ())):
            if names.keys() <= set(ids):
                found = {each: names[each] for each in ids if each in names}
                for paths in self._paths.values():
                    paths[:] = [one for one in paths if one is not names]
                return found
        return None


def _saved(model: Any) -> dict[str, Group]:
    if not model.built:
        raise CheckpointError(f"{model.name} is not built, so it has no variables yet; call it once.")
    return saved(model)


def _fitting(name: str, array: NDArray, value: Any) -> NDArray:
    """The array in the dtype of the variable that is to have it."""
    shape, dtype = tuple(value.shape), runtime.load_keras().backend.standardize_dtype(value.dtype)
    if array.shape != shape:
        raise CheckpointError(f"{name} has shape {array.shape} in the checkpoint, {shape} in the model.")
    if array.dtype.kind == "c" or ("float" not in dtype and array.dtype.kind not in "biu"):
        raise CheckpointError(f"{name} is {array.dtype.name} in the checkpoint, {dtype} in the model.")
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


# What a layer is


def _layers(name: str, layer: Any, own: Mapping[int, str]) -> Iterator[Layer]:
    kind = _kind(layer)
    other = {"dialect": "keras"}
    if kind is not None and kind in _KINDS and not {id(v) for v in _roles(layer, kind).values()} <= own.keys():
        kind = None  # it saves its variables in a way of its own
    if kind is None:
        roles = {str(place): tensor for place, tensor in enumerate(own.values())}
        yield Layer(name, type(layer).__name__, roles, other)
    elif kind == "batch norm":
        yield _batch_norm(name, layer, own)
    elif kind == "separable":
        roles = _roles(layer, kind)
        (depthwise, pointwise) = layer_names(name, layer)
        yield Layer(depthwise, "depthwise", {"kernel": own[id(roles.pop("depthwise"))]}, other)
        yield Layer(pointwise, "conv", {role: own[id(v)] for role, v in roles.items()}, {**other, "groups": 1})
    else:
        more: dict[str, Any] = {}
        if kind.startswith("conv"):
            more["groups"] = getattr(layer, "groups", 1)
        flatten = flattened_from(layer) if kind == "dense" else None
        if flatten is not None:
            more["flatten"] = flatten
        yield Layer(name, kind, {role: own[id(v)] for role, v in _roles(layer, kind).items()}, {**other, **more})


def _kind(layer: Any) -> str | None:
    """A key of `_KINDS` or "batch norm"; None for every other class, and for a layer with other variables."""
    layers = runtime.load_keras().layers
    if isinstance(layer, layers.BatchNormalization):
        return "batch norm"
    for kind, (classes, _) in _KINDS.items():
        if isinstance(layer, tuple(getattr(layers, each) for each in classes if hasattr(layers, each))):
            roles = _roles(layer, kind)
            whole = {id(v) for v in roles.values()} == {id(v) for v in own_variables(layer)}
            return kind if whole and (kind == "norm" or "kernel" in roles) else None
    return None


def _roles(layer: Any, kind: str) -> dict[str, Any]:
    """The roles that a layer's variables have by its attributes."""
    own = {id(v): v for v in own_variables(layer)}
    found = {}
    for role, attribute in _KINDS[kind][1].items():
        for each in (f"_{attribute}", attribute, _OTHER_WORDS.get(role, attribute)):  # a plain name may be computed
            variable = getattr(layer, each, None)
            if id(variable) in own:
                found[role] = variable
                break
    return found


def _batch_norm(name: str, layer: Any, own: Mapping[int, str]) -> Layer:
    spec = record(name, layer).spec
    if spec is None:
        roles = {str(place): tensor for place, tensor in enumerate(own.values())}
        return Layer(name, f"{type(layer).__name__} that is no plain batch norm", roles, {"dialect": "keras"})
    variables = {role: getattr(layer, role) for role in array_names(spec)}
    if needs_counter(spec):
        variables["num_updates"] = layer.num_updates
    roles = {role: own[id(variable)] for role, variable in variables.items() if id(variable) in own}
    try:
        settings = {"dialect": "keras", **spec.to_dialect("keras")}
    except DialectError:  # Keras has no words for all of it
        settings = {"dialect": "keras", "spec": spec.to_dict()}
    return Layer(name, "BatchNormalization", roles, settings)
