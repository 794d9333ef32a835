"""Flax Linen models as checkpoints, and their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from bnlayer.checkpoint import Checkpoint, Layer
from bnlayer.contract import Run
from bnlayer.outputs import widened

from .flax_layers import flax_layer, is_array
from .linen_models import Converted, Path, Place, attribute_at, intercepted_calls, traced
from .model_io import in_order, modes_of, output_of, placed, tensor_of, values_for
from .model_linen import Inputs

NDArray = np.ndarray[Any, np.dtype[Any]]
Variables = Mapping[str, Any]
_CAPTURED = "bnlayer_captured"  # a collection of our own


def read(
    module: nn.Module, variables: Variables, inputs: Inputs | None, places: Mapping[Path, Place | None]
) -> Checkpoint:
    """The variables as Flax's msgpack names them; see `LinenModels.read`.

    Args:
        module, variables, inputs: the model.
        places: its batch norms.
    """
    leaves = _leaves(variables)
    scopes: dict[Path, dict[str, str]] = {}
    for name, path in _named(variables).items():
        scopes.setdefault(path[1:-1], {})[path[-1]] = name
    called = {} if inputs is None else _called(module, variables, inputs)
    order = in_order(_scopes_in_order(variables, scopes), called)
    layers: list[Layer] = []
    bound = _inner(module).bind(variables)
    for scope in order:
        place = places.get(scope)
        layer = called.get(scope) or attribute_at(bound, scope)
        if place is not None:
            layer = place.layer
        if isinstance(layer, nn.Module) and (place is not None or not isinstance(layer, nn.BatchNorm)):
            own = scopes[scope]
            shapes = {leaf: leaves[name].shape for leaf, name in own.items()}
            layers.append(flax_layer("/".join(scope), layer, nn, own, shapes))
    tensors = {name: tensor_of(leaves[name]) for scope in order for name in scopes[scope].values()}
    meaningful = not _is_sorted(variables) if inputs is None else set(scopes) <= set(called)
    return Checkpoint("flax", tensors, order_is_meaningful=meaningful, layers=tuple(layers))


def write(variables: Variables, checkpoint: Checkpoint) -> Variables:
    """The variables with the checkpoint's values.

    Raises:
        CheckpointError: it does not fit.
    """
    leaves = _leaves(variables)
    held = Checkpoint("flax", {n: tensor_of(leaf) for n, leaf in leaves.items()}, order_is_meaningful=False)
    values = values_for(held, checkpoint)
    tree = flax.serialization.to_state_dict(variables)
    flat = traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep="/")
    flat.update({name: placed(values[name], leaf) for name, leaf in leaves.items()})
    written: Variables = flax.serialization.from_state_dict(variables, traverse_util.unflatten_dict(flat, sep="/"))
    return written


def run(
    module: nn.Module, variables: Variables, inputs: Inputs | None, x: NDArray, *, training: bool, capture: bool
) -> tuple[Variables, Run]:
    """One `apply`; see `ModelAdapter.run`. The variables after, and the run, whose model is still to be set."""
    calls: dict[Path, None] = {}
    owners = {tuple(scope) for _, *scope, _ in _named(variables).values()}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "setup" and layer.path in owners:
            calls.setdefault(layer.path)
        if context.method_name == "__call__" and isinstance(layer, nn.Dropout):
            return args[0] if args else kwargs["inputs"]
        if context.method_name != "__call__" or not isinstance(layer, nn.BatchNorm):
            return call(*args, **kwargs)
        before = layer.use_running_average
        named = {**kwargs, **dict(zip(("x", "use_running_average"), args, strict=False))}
        try:  # Flax takes it in one of the two places only
            object.__setattr__(layer, "use_running_average", None)
            y = call(named.pop("x"), **{**named, "use_running_average": not training})
        finally:
            object.__setattr__(layer, "use_running_average", before)
        if capture:
            given = args[0] if args else kwargs["x"]
            layer.sow(_CAPTURED, "x", given, init_fn=lambda: None, reduce_fn=_first)
            layer.sow(_CAPTURED, "y", y, init_fn=lambda: None, reduce_fn=_first)
        return y

    args, kwargs, method, rngs = _arguments(module, inputs, jnp.asarray(x))
    mutable = (["batch_stats"] if training else []) + ([_CAPTURED] if capture else [])
    with intercepted_calls(intercept):
        returned, changed = module.apply(variables, *args, mutable=mutable, method=method, rngs=rngs, **kwargs)
    changed = dict(flax.core.unfreeze(changed))
    captured = traverse_util.flatten_dict(changed.pop(_CAPTURED, {}))
    layers = {
        "/".join(path): (np.array(captured[(*path, "x")]), np.array(captured[(*path, "y")]))
        for path in calls
        if (*path, "x") in captured
    }
    after: Any = flax.core.copy(cast("dict[str, Any]", variables), changed) if changed else variables
    called = tuple("/".join(path) for path in calls) if capture else ()
    return after, Run(None, widened(np.asarray(output_of(returned))), layers, called)


def _first(old: Any, new: Any) -> Any:
    return new if old is None else old


def _arguments(
    module: nn.Module, inputs: Inputs | None, x: jax.Array
) -> tuple[Sequence[Any], dict[str, Any], Any, Any]:
    """How the model is called: as `inputs` say, with x as the first array in them."""
    if inputs is None:
        return (x,), dict(modes_of(_inner(module).__call__)), None, None
    args, kwargs = list(inputs.args), dict(inputs.kwargs)
    if args:
        args[0] = x
    else:
        first = next((name for name, value in kwargs.items() if hasattr(value, "shape")), None)
        if first is None:
            args = [x]
        else:
            kwargs[first] = x
    return args, kwargs, inputs.method, inputs.rngs


def _inner(module: nn.Module) -> nn.Module:
    return module.inner if isinstance(module, Converted) else module


def _called(module: nn.Module, variables: Variables, inputs: Inputs) -> dict[Path, nn.Module]:
    """Every module that a call of the model calls, by path, in that order. The call is only traced."""
    found: dict[Path, nn.Module] = {}
    owners = {tuple(scope) for _, *scope, _ in _named(variables).values()}

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "setup" and layer.path in owners and layer.path not in found:
            found[layer.path] = layer.clone(parent=None, name=None)
        return call(*args, **kwargs)

    traced(_inner(module), variables, inputs, record)
    return found


def _leaves(variables: Variables) -> dict[str, Any]:
    """Every array of the variables by its name in a file of Flax's."""
    flat = traverse_util.flatten_dict(flax.serialization.to_state_dict(variables), sep="/")
    return {name: leaf for name, leaf in flat.items() if is_array(leaf)}


def _named(variables: Variables) -> dict[str, tuple[str, ...]]:
    """Every array's name in a file, to its collection, scope and own name: without what Flax's boxes add to it."""
    boxed = jax.tree_util.tree_leaves_with_path(variables, is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata))
    parts = [tuple(str(getattr(key, "key", key)) for key in path) for path, _ in boxed]
    found, known = {}, set(parts)
    for name in _leaves(variables):
        path = tuple(name.split("/"))
        found[name] = next((own for own in (path[:-1], path) if own in known), path)
    return found


def _scopes_in_order(variables: Variables, scopes: Mapping[Path, Any]) -> list[Path]:
    """Layer by layer: in the order of the parameters; scopes without any stand where their own collection has them."""
    order: list[Path] = []
    for collection in in_order(variables, ["params"]):
        at = 0
        for scope in _walked(variables[collection]):
            if scope not in scopes:
                continue
            if scope in order:
                at = order.index(scope) + 1
            else:
                order.insert(at, scope)
                at += 1
    return order


def _walked(collection: Any, path: Path = ()) -> Iterator[Path]:
    if isinstance(collection, Mapping):
        yield path
        for name, child in collection.items():
            yield from _walked(child, (*path, str(name)))


def _is_sorted(variables: Variables) -> bool:
    """Whether JAX has sorted the names, as every `jax.tree.map` and `jax.jit` does; the collections' own order says
    nothing."""
    stack = list(variables.values())
    while stack:
        node = stack.pop()
        if isinstance(node, Mapping):
            if list(node) != sorted(node):
                return False
            stack += list(node.values())
    return True
