"""Equinox models as checkpoints, and their calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bnlayer.checkpoint import Checkpoint, Layer
from bnlayer.contract import Run
from bnlayer.errors import UnsupportedError
from bnlayer.outputs import widened

from .equinox import BatchNorm, with_fields
from .equinox_names import equinox_template, leaf_names
from .model_io import modes_of, output_of, placed, values_for

NDArray = np.ndarray[Any, np.dtype[Any]]
Seen = Callable[..., Any]  # makes a call: the layer's name, its class's call, the layer, and the arguments

_KERNEL: Final = {"weight": "kernel", "bias": "bias"}
_NORM: Final = {"weight": "gamma", "bias": "beta"}
_BATCH_NORM: Final = {
    **_NORM, "batch_counter": "num_updates", "batch_hidden_mean": "hidden_mean",
    "batch_hidden_variance": "hidden_variance", "ema_first_time": "num_updates", "ema_mean": "moving_mean",
    "ema_variance": "moving_variance",
}  # fmt: skip
_KINDS: Final[tuple[tuple[type[Any] | tuple[type[Any], ...], str, Mapping[str, str]], ...]] = (
    (eqx.nn.Conv, "conv", _KERNEL),
    (eqx.nn.ConvTranspose, "conv transpose", _KERNEL),
    (eqx.nn.Linear, "dense", _KERNEL),
    (eqx.nn.Embedding, "embedding", _KERNEL),
    ((eqx.nn.LayerNorm, eqx.nn.GroupNorm, eqx.nn.RMSNorm), "norm", _NORM),
)


def read(module: Any, state: Any) -> Checkpoint:
    """`equinox_template`'s tensors, with every layer. `state` may be None."""
    template = equinox_template(module, state)
    told = {layer.name: layer for layer in template.layers}
    layers: list[Layer] = []
    for path, layer, leaves in _layers(module):
        tensors = {leaf: ".".join((*_dotted(path), leaf)) for leaf in leaves}
        name = jax.tree_util.keystr(path).lstrip(".")
        if not isinstance(layer, eqx.nn.BatchNorm):
            layers.append(_layer(name, layer, tensors))
        elif ".".join(_dotted(path)) in told:  # not without a state, which has its statistics
            found = told[".".join(_dotted(path))]
            kind = found.kind if type(layer) in (eqx.nn.BatchNorm, BatchNorm) else type(layer).__qualname__
            roles = {_BATCH_NORM[leaf]: tensor for leaf, tensor in found.tensors.items()}
            layers.append(Layer(name, kind, roles, found.settings))
    numbers = [name for name, leaf in leaf_names(module, state) if isinstance(leaf, (bool, int, float, complex))]
    return Checkpoint(
        "equinox", template.tensors, order_is_meaningful=True, layers=tuple(layers), metadata={"numbers": numbers}
    )


def write(module: Any, state: Any, checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Module and state with the checkpoint's values.

    Raises:
        CheckpointError: it does not fit.
    """
    held = equinox_template(module, state)
    values = values_for(held, checkpoint)
    tree = module if state is None else (module, state)
    leaves, structure = jax.tree.flatten(tree)
    names = [name for name, _ in leaf_names(module, state)]
    after = [placed(values[n], leaf) if n in values else leaf for n, leaf in zip(names, leaves, strict=True)]
    written = jax.tree.unflatten(structure, after)
    return (written, None) if state is None else written


def run(module: Any, state: Any, x: NDArray, *, training: bool, capture: bool) -> tuple[Any, Run]:
    """One call under vmap; see `ModelAdapter.run`. The state after, and the run, whose model is still to be set.

    Raises:
        UnsupportedError: the layers' axes have different names, or the call asks for arguments that nobody knows.
    """
    calls: dict[str, None] = {}
    inside: dict[str, tuple[Any, Any]] = {}

    def seen(name: str, call: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.setdefault(name)
        returned = call(layer, *args, **kwargs)
        if name in batch_norms:
            inside.setdefault(name, (args[0] if args else kwargs["x"], returned[0]))
        return returned

    modules = {jax.tree_util.keystr(path).lstrip("."): layer for path, layer, _ in _layers(module)}
    batch_norms = {name: layer for name, layer in modules.items() if isinstance(layer, eqx.nn.BatchNorm)}
    axes = _axes(batch_norms)
    model = _evaluating(module, training)
    if capture:
        model = _watched(model, (), seen)
    copied = jax.tree.map(
        lambda leaf: leaf, state
    )  # a state that a call has changed is spent, and this one is not ours
    words = _words(model, copied)

    def one(example: Any) -> Any:
        inside.clear()
        returned = model(example, **words)
        states = jax.tree.leaves(returned, is_leaf=_is_state)
        after = next((leaf for leaf in states if _is_state(leaf)), state)
        return output_of(returned, eqx.nn.State), after, dict(inside)

    mapped: Any = jax.vmap(one, out_axes=(0, None, 0), axis_name=axes[0])
    examples = jnp.moveaxis(jnp.asarray(x), -1, 1)
    for axis in axes[1:]:
        mapped = _alone(mapped, axis)
    y, after, layers = mapped(examples)
    arrays = {name: (np.array(layers[name][0]), np.array(layers[name][1])) for name in calls if name in layers}
    return after, Run(None, widened(np.asarray(jnp.moveaxis(y, 1, -1) if y.ndim > 1 else y)), arrays, tuple(calls))


def _is_state(node: Any) -> bool:
    return isinstance(node, eqx.nn.State)


def _alone(mapped: Callable[[Any], Any], axis: Hashable) -> Callable[[Any], Any]:
    """The function under one more mapped axis, which has one place."""
    more = jax.vmap(mapped, in_axes=None, out_axes=(0, None, 0), axis_name=axis, axis_size=1)

    def call(examples: Any) -> Any:
        y, after, layers = more(examples)
        return y[0], after, jax.tree.map(lambda array: array[0], layers)

    return call


def _axes(batch_norms: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """The names of the axes that the batch norms reduce over; the first is the batch's."""
    every = {
        tuple(one.axis_name) if isinstance(one.axis_name, (list, tuple)) else (one.axis_name,)
        for one in batch_norms.values()
    }
    if len(every) > 1:
        raise UnsupportedError(f"the batch norms' axis_name must be the same for all; got {every}.")
    return every.pop() if every else ("batch",)


def _words(model: Any, state: Any) -> dict[str, Any]:
    """What the model's call takes besides an example.

    Raises:
        UnsupportedError: it asks for something else, or for a state that was not given.
    """
    _, *rest = inspect.signature(model).parameters.values()
    words: dict[str, Any] = dict(modes_of(model))
    for parameter in rest:
        plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        asked = plain and parameter.default is parameter.empty and parameter.name not in words
        if parameter.name == "key" and plain:
            words["key"] = jax.random.PRNGKey(0)
        elif state is not None and plain and "state" not in str(words) and (parameter.name == "state" or asked):
            words[parameter.name] = state
        elif asked:
            raise UnsupportedError(
                f"the model's call asks for {parameter.name!r}; what is known is model(x), model(x, state), and key."
                + (" Give the pair (model, state)." if state is None else "")
            )
    return words


def _evaluating(module: Any, training: bool) -> Any:
    """The module in inference mode, but for its batch norms."""
    module = eqx.nn.inference_mode(module)
    return jax.tree.map(
        lambda node: with_fields(node, type(node), inference=not training) if _is_batch_norm(node) else node,
        module,
        is_leaf=_is_batch_norm,
    )


def _is_batch_norm(node: Any) -> bool:
    return isinstance(node, eqx.nn.BatchNorm)


def _watched(node: Any, path: tuple[Any, ...], seen: Seen) -> Any:
    """The module with layers that tell of their calls in the places of those that hold tensors."""
    children, structure = _children(node)
    watched = [_watched(c, (*path, *p), seen) if isinstance(c, eqx.Module) else c for p, c in children]
    made = jax.tree.unflatten(structure, watched)
    if not callable(node) or not _holds(node, children):
        return made
    name, kind = jax.tree_util.keystr(path).lstrip("."), type(node)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return seen(name, kind.__call__, layer, *args, **kwargs)

    call.__wrapped__ = kind.__call__  # type: ignore[attr-defined]
    watching = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return with_fields(made, watching)


def _layers(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, list[str]]]:
    """Every module that holds tensors itself, with its path and their names in it, in the order of the fields."""
    children, _ = _children(node)
    if _holds(node, children):
        yield path, node, [".".join(_dotted(inner)) for inner, child in children if eqx.is_array_like(child)]
    for inner, child in children:
        if isinstance(child, eqx.Module) and not isinstance(child, eqx.nn.StateIndex):
            yield from _layers(child, (*path, *inner))


def _children(node: Any) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """The modules and leaves right inside of a module, with their paths, and the structure around them."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node and _is_inner(inner))


def _is_inner(node: Any) -> bool:
    return isinstance(node, eqx.Module)


def _holds(node: Any, children: list[tuple[tuple[Any, ...], Any]]) -> bool:
    return _is_batch_norm(node) or any(eqx.is_array(child) or _is_shape(child) for _, child in children)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _dotted(path: tuple[Any, ...]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def _layer(name: str, layer: Any, tensors: Mapping[str, str]) -> Layer:
    kind, words = next(((k, w) for classes, k, w in _KINDS if isinstance(layer, classes)), ("", {}))
    settings: dict[str, Any] = {"dialect": "equinox"}
    if not tensors.keys() <= words.keys():  # a class that is not known, or a subclass with more than its base has
        return Layer(name, type(layer).__name__, tensors, settings)
    if isinstance(layer, (eqx.nn.Conv, eqx.nn.ConvTranspose)):
        settings["groups"] = layer.groups
    return Layer(name, kind, {words[leaf]: tensor for leaf, tensor in tensors.items()}, settings)
