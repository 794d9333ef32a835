"""One batch norm of a Keras model as the other kind: ours for `keras.layers.BatchNormalization`, and the reverse.

The variables stay the very same objects, so that an optimizer that has been built goes on with what it has learned
about them, and whoever else holds one still does.
"""

from __future__ import annotations

from typing import Any

from bnlayer.contract import Kind, LayerRecord
from bnlayer.errors import BatchNormError, UnsupportedError

from . import native, runtime
from .backend import BACKEND
from .layer import EXTRAS, BatchNormalization

_VARIABLES = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
_OBJECTS = tuple(
    f"{name}_{role}"
    for name, roles in {
        "gamma": ("initializer", "regularizer", "constraint"),
        "beta": ("initializer", "regularizer", "constraint"),
        "moving_mean": ("initializer",),
        "moving_variance": ("initializer",),
    }.items()
    for role in roles
)
# What a call of ours may be given and a call of Keras's not, with what it is where nobody gives it.
_ARGUMENTS = {"weights": None, "update_stats": True, "adjustment": None, "renorm_clips": None}
_SHARED_ARGUMENTS = 3  # inputs, training, mask


def record(name: str, layer: Any) -> LayerRecord:
    """What a model's batch norm is and holds, or why that cannot be told."""
    kind: Kind = "bnlayer" if isinstance(layer, BatchNormalization) else "native"
    if type(layer) not in (BatchNormalization, runtime.load_keras().layers.BatchNormalization):
        reason = f"a subclass, {type(layer).__name__}, may compute something else"
    elif not layer.built:
        reason = "the layer is not built, so it has no variables yet; call the model first"
    else:
        try:
            spec, state = (BACKEND if kind == "bnlayer" else native.BACKEND).extract(layer)
            return LayerRecord(name, layer, kind, spec, state)
        except BatchNormError as error:
            reason = str(error)
    return LayerRecord(name, layer, kind, None, None, reason)


def ours_of(layer: Any) -> BatchNormalization:
    """Ours over the variables of Keras's; its counter starts at 0.

    Raises:
        UnsupportedError, SpecError: its arguments have no meaning, or ask for what this runtime lacks.
    """
    made: BatchNormalization = _over(BatchNormalization, layer, layer.get_config())
    return made


def native_of(layer: BatchNormalization) -> Any:
    """Keras's over the variables of ours; the counter is not carried.

    Raises:
        UnsupportedError: it would not compute the same; the message names what it would lose.
    """
    if layer.adjustment is not None:
        raise UnsupportedError("keras.layers.BatchNormalization would lose adjustment, a function.")
    config = dict(layer.get_config())
    spec = layer.spec
    lost = [name for name, default in EXTRAS.items() if config.pop(name, default) != default]
    if spec.param_dtype == spec.stats_dtype == layer.variable_dtype:
        lost = [name for name in lost if name not in ("param_dtype", "stats_dtype")]
    lost += [name for node in layer._inbound_nodes for name in _given(node)]
    if lost:
        raise UnsupportedError(f"keras.layers.BatchNormalization would lose {', '.join(dict.fromkeys(lost))}.")
    if spec.synchronized and runtime.name() != "tensorflow":
        raise UnsupportedError(f"Keras on {runtime.name()} has no synchronized; it would be lost.")
    reason = native.BACKEND.unsupported(spec.replace(synchronized=False))
    if reason is not None:
        raise UnsupportedError(f"{reason}, so keras.layers.BatchNormalization would lose it.")
    return _over(runtime.load_keras().layers.BatchNormalization, layer, config)


def _given(node: Any) -> list[str]:
    """The arguments that a call in a functional model has, and Keras's layer does not take."""
    named = [name for name, default in _ARGUMENTS.items() if node.arguments.kwargs.get(name, default) is not default]
    return [*named, *list(_ARGUMENTS)[: max(0, len(node.arguments.args) - _SHARED_ARGUMENTS)]]


def _over(kind: Any, layer: Any, config: dict[str, Any]) -> Any:
    """A layer of that kind and config whose variables are those of `layer`."""
    made = kind.from_config({**{k: v for k, v in config.items() if k not in _OBJECTS}, "autocast": layer.autocast})
    for name in _OBJECTS:  # themselves, for what nobody registered cannot go through a config
        setattr(made, name, getattr(layer, name))
    held = {name: getattr(layer, name) for name in _VARIABLES if getattr(layer, name, None) is not None}
    flags = {name: variable.trainable for name, variable in held.items()}
    for name in held.keys() & {"gamma", "beta"}:
        held[name].trainable = True  # as they were when their order among the layer's weights was decided
    made.add_weight = lambda name, **options: held[name]
    try:
        made.build(_input_shape(layer))
    finally:
        del made.add_weight
        for name, flag in flags.items():
            held[name].trainable = flag
    return made


def _input_shape(layer: Any) -> Any:
    """Of what it is called on in a functional model, else of what it was built for: Keras's layer takes one rank."""
    for node in layer._inbound_nodes:
        return node.input_tensors[0].shape
    return layer.get_build_config()["input_shape"]
