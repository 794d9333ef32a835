"""Flax NNX models as checkpoints, and their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from bnlayer.checkpoint import Checkpoint
from bnlayer.contract import Run
from bnlayer.outputs import widened
from bnlayer.spec import BatchNormSpec

from .flax_layers import flax_layer, is_array
from .model_io import in_order, modes_of, output_of, placed, refuse_cumulative, tensor_of, values_for

Held = dict[str, Any]  # tensor name to the Variable, or the array that is none
NDArray = np.ndarray[Any, np.dtype[Any]]


def read(model: nnx.Module, paths: Mapping[int, str]) -> Checkpoint:
    """The variables but those of random numbers, as `nnx.to_pure_dict` names them.

    Args:
        model: to be read.
        paths: by the id of each module, its name among the adapter's records.
    """
    held = _held(model)
    names = {id(variable): name for name, variable in held.items()}
    layers, ordered = [], list[str]()
    for module in _modules(model, set()):
        own = {attribute: names[id(v)] for attribute, v in _attributes(module) if id(v) in names}
        if own and id(module) in paths:
            shapes = {attribute: _value(held[name]).shape for attribute, name in own.items()}
            layers.append(flax_layer(paths[id(module)], module, nnx, own, shapes))
            ordered += own.values()
    tensors = {name: tensor_of(_value(held[name])) for name in in_order(held, ordered)}
    return Checkpoint("flax", tensors, order_is_meaningful=not _is_sorted(model), layers=tuple(layers))


def write(model: nnx.Module, checkpoint: Checkpoint) -> None:
    """Set every variable of `read`.

    Raises:
        CheckpointError: the checkpoint does not fit; nothing is set then.
    """
    held = _held(model)
    tensors = {name: tensor_of(_value(variable)) for name, variable in held.items()}
    values = values_for(Checkpoint("flax", tensors, order_is_meaningful=False), checkpoint)
    for name, variable in held.items():
        variable.set_value(placed(values[name], _value(variable)))


def configure(layer: nnx.BatchNorm, name: str, spec: BatchNormSpec) -> Callable[[], None]:
    """What sets the layer's epsilon and momentum, once all layers are found to take theirs.

    Raises:
        UnsupportedError: the layer cannot count.
    """
    refuse_cumulative(name, layer.momentum, spec)

    def apply() -> None:
        layer.epsilon = spec.epsilon
        held: Any = layer  # ours takes "cumulative" too, for which the host's has no type
        held.momentum = spec.decay

    return apply


def run(model: nnx.Module, x: NDArray, paths: Mapping[int, str], *, training: bool, capture: bool) -> Run:
    """One call `model(x)`; see `ModelAdapter.run`. `paths` as of `read`."""
    layers: dict[str, tuple[NDArray, NDArray]] = {}
    calls: dict[str, None] = {}
    names = {id(variable) for variable in _held(model).values()}
    owners = {
        id(module) for _, module in nnx.iter_modules(model) if any(id(v) in names for _, v in _attributes(module))
    }

    def seen(name: str | None, module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_batch_norm = isinstance(module, nnx.BatchNorm)
        if is_batch_norm or isinstance(module, nnx.Dropout):
            word, mode = ("use_running_average", not training) if is_batch_norm else ("deterministic", True)
            if word in kwargs:
                kwargs[word] = mode
            elif is_batch_norm and len(args) > 1:
                args = (args[0], mode, *args[2:])
        if capture and name is not None:
            calls.setdefault(name)
        y = call(module, *args, **kwargs)
        given = args[0] if args else kwargs.get("x")
        if capture and is_batch_norm and name is not None and name not in layers and not isinstance(y, Tracer):
            layers[name] = np.array(given), np.array(y)
        return y

    watched = {
        id(module): paths.get(id(module)) if id(module) in owners else None
        for _, module in nnx.iter_modules(model)
        if id(module) in owners or isinstance(module, (nnx.BatchNorm, nnx.Dropout))
    }
    with _flags(model, training), _watched(model, watched, seen):
        returned = model(jnp.asarray(x), **modes_of(model))
    return Run(model, widened(np.asarray(output_of(returned))), layers, tuple(calls))


@contextmanager
def _flags(model: nnx.Module, training: bool) -> Iterator[None]:
    """Everything evaluates but the batch norms; after, every flag is what it was."""
    words = ("deterministic", "use_running_average")
    before = [(m, word, vars(m)[word]) for _, m in nnx.iter_modules(model) for word in words if word in vars(m)]
    try:
        for module, word, _ in before:
            setattr(module, word, not (training and isinstance(module, nnx.BatchNorm)))
        yield
    finally:
        for module, word, value in before:
            setattr(module, word, value)


@contextmanager
def _watched(model: nnx.Module, names: Mapping[int, str | None], seen: Callable[..., Any]) -> Iterator[None]:
    """The calls of these modules go by `seen`. A module's class stands for it where Flax takes it apart and makes it
    anew, as under `nnx.jit`: each has a class of its own for as long."""
    before = [(m, type(m)) for _, m in nnx.iter_modules(model) if id(m) in names and callable(m)]
    try:
        for module, kind in before:
            object.__setattr__(module, "__class__", _watching(kind, names[id(module)], seen))
        yield
    finally:
        for module, kind in before:
            object.__setattr__(module, "__class__", kind)


def _watching(kind: type[Any], name: str | None, seen: Callable[..., Any]) -> type[Any]:
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return seen(name, module, kind.__call__, *args, **kwargs)

    # Flax and its users ask for a call's arguments by its signature.
    call.__wrapped__ = kind.__call__  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _held(model: nnx.Module) -> Held:
    """Every Variable that a file would hold, by name."""
    nodes = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}
    return {
        "/".join(map(str, path)): node
        for path, node in nodes.items()
        if not isinstance(node, nnx.RngState) and is_array(_value(node))
    }


def _value(variable: Any) -> Any:
    return variable.get_value()


def _attributes(module: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if not name.startswith("_pytree__")]


def _modules(node: Any, seen: set[int]) -> Iterator[nnx.Module]:
    """Every module, each once, in the order of the attributes."""
    if isinstance(node, jax.Array) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, nnx.Module):
        yield node
    children: Any = ()
    if isinstance(node, (nnx.List, list, tuple)):
        children = list(node)
    elif isinstance(node, nnx.Module):
        children = [value for _, value in _attributes(node)]
    elif isinstance(node, dict):
        children = node.values()
    for child in children:
        yield from _modules(child, seen)


def _is_sorted(model: nnx.Module) -> bool:
    """Whether all attributes are in the order of their names, as they are after `nnx.jit`: then the
    order is no longer the model's."""
    every = [[n for n, _ in _attributes(m)] for _, m in nnx.iter_modules(model) if not isinstance(m, nnx.List)]
    return all(names == sorted(names) for names in every)
