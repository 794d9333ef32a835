"""How the batch norms of a Flax Linen model are found, and how other layers are put in their places.

A Linen module holds no layers: a `@compact` method makes them anew in every call, so there is nothing to replace. What
can be replaced is the call. `Converted` wraps a model, intercepts the calls of its batch norms by their paths
(`flax.linen.intercept_methods`), and runs other layers on the same scopes, so that variables stay as they are.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from flax import linen as nn

from .linen import BatchNorm, call_on
from .model_linen import Inputs

Path = tuple[str, ...]

# A function that nn.jit has compiled would run again as it was traced, by whichever layers: these are part of its key.
_layers_of_this_trace = jax.make_user_context(None)  # type: ignore[no-untyped-call]


@dataclasses.dataclass(frozen=True)
class Place:
    """One batch norm of a model.

    Attributes:
        path: of its scope.
        channels: how many it has.
        own: the module that the model makes there, without a scope.
        layer: what runs there: `own` itself, or another.
    """

    path: Path
    channels: int
    own: nn.BatchNorm
    layer: nn.BatchNorm

    @property
    def changed(self) -> dict[str, Any]:
        """The epsilon and momentum that `layer` has and `own` has not."""
        words = ("epsilon", "momentum")
        return {word: value for word in words if (value := getattr(self.layer, word)) != getattr(self.own, word)}


@dataclasses.dataclass(frozen=True)
class Places:
    """All places; not a tuple, in which Flax would take the layers for submodules."""

    every: tuple[Place, ...]

    def __hash__(self) -> int:
        """Of what is always hashable: a layer's `axis` may be a list."""
        return hash(tuple((place.path, place.channels) for place in self.every))

    def at(self, path: Path) -> Place | None:
        """What runs at this path; None where nothing was put."""
        return next((place for place in self.every if place.path == path), None)


class Converted(nn.Module):
    """A Linen model whose batch norms run as other layers, on the same variables.

    Use it as the model: `init`, `apply` (also with `method=`, of the model's own class or by name) and `tabulate` take
    and give what the model's do, and as a part of another model it has the same variables under its own name. Its
    attributes are not the model's: those are at `inner`.

    Attributes:
        inner: the model as it was.
        places: its batch norms, and what runs in their places.
    """

    inner: nn.Module
    places: Places

    def setup(self) -> None:
        """One scope with the model, which so keeps the names of its variables."""
        nn.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call."""
        with self._intercepted(self.path):
            return self.inner(*args, **kwargs)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's `apply`."""
        with self._intercepted(()):
            return self.inner.apply(variables, *args, **kwargs)

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's `init`."""
        with self._intercepted(()):
            return self.inner.init(rngs, *args, **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's `init_with_output`."""
        with self._intercepted(()):
            return self.inner.init_with_output(rngs, *args, **kwargs)

    @nn.nowrap
    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """The model's `tabulate`."""
        with self._intercepted(()):
            table: str = self.inner.tabulate(rngs, *args, **kwargs)
            return table

    @nn.nowrap
    @contextmanager
    def _intercepted(self, root: Path) -> Iterator[None]:
        def intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or not isinstance(module, nn.BatchNorm):
                return run(*args, **kwargs)
            place = self.places.at(module.path[len(root) :])
            layer = None if place is None else place.layer
            with _fields_set(module, {} if place is None else place.changed):
                if isinstance(layer, BatchNorm):
                    return call_on(module, layer, *args, **kwargs)
                if layer is not None and isinstance(module, BatchNorm):
                    # Without Flax's wrapper, whose work is done, and which would come here again.
                    return inspect.unwrap(nn.BatchNorm.__call__)(module, *args, **kwargs)
                return run(*args, **kwargs)

        with nn.intercept_methods(intercept), _layers_of_this_trace((root, self.places)):
            yield


@contextmanager
def _fields_set(module: nn.Module, fields: Mapping[str, Any]) -> Iterator[None]:
    """A bound module with other fields for one call: it is frozen to its users, and its call asks for them."""
    before = {name: getattr(module, name) for name in fields}
    try:
        for name, value in fields.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


class _Key:
    """Equal to nothing but itself."""


def found_by_calling(module: nn.Module, variables: Mapping[str, Any], inputs: Inputs) -> dict[Path, Place]:
    """Every batch norm that one call of the model calls, in that order. Nothing is computed: the call is only traced.

    Args:
        module: the model.
        variables: its variables.
        inputs: of the call; arrays or their shapes.
    """
    found: dict[Path, Place] = {}

    def record(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, nn.BatchNorm) and layer.path not in found:
            x = args[0] if args else kwargs["x"]
            free = layer.clone(parent=None, name=None)
            found[layer.path] = Place(layer.path, _channels(layer, x), free, free)
        return run(*args, **kwargs)

    traced(module, variables, inputs, record)
    return found


def traced(module: nn.Module, variables: Mapping[str, Any], inputs: Inputs, interceptor: Callable[..., Any]) -> None:
    """Trace one call of the model, every method of its modules by way of `interceptor`. Nothing is computed.

    Args:
        module: the model.
        variables: its variables.
        inputs: of the call; arrays or their shapes.
        interceptor: as of `flax.linen.intercept_methods`.
    """
    leaves, tree = jax.tree.flatten((inputs.args, inputs.kwargs))
    shaped = [index for index, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def call(variables: Any, arrays: list[Any]) -> Any:
        given = dict(zip(shaped, arrays, strict=True))
        args, kwargs = jax.tree.unflatten(tree, [given.get(index, leaf) for index, leaf in enumerate(leaves)])
        return module.apply(variables, *args, mutable=True, rngs=inputs.rngs, method=inputs.method, **kwargs)

    def without_dropout(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, nn.Dropout):
            return args[0] if args else kwargs["inputs"]  # of the same shape, and without random numbers
        return interceptor(run, args, kwargs, context)

    with intercepted_calls(without_dropout):
        jax.eval_shape(call, variables, [leaves[index] for index in shaped])


@contextmanager
def intercepted_calls(interceptor: Callable[..., Any]) -> Iterator[None]:
    """`flax.linen.intercept_methods`, inside of what `nn.jit` has compiled before too: a key of its own makes it be
    traced again."""
    with nn.intercept_methods(interceptor), _layers_of_this_trace(_Key()):
        yield


def found_by_name(module: nn.Module, variables: Mapping[str, Any]) -> dict[Path, Place | None]:
    """Every scope with a mean and a var in "batch_stats", and the batch norm that `setup` or a field puts there.

    None where there is no such attribute: a `@compact` method makes it, if it is a batch norm at all.
    """
    found: dict[Path, Place | None] = {}
    bound = module.bind(variables)
    for path, channels in _scopes(variables.get("batch_stats", {})):
        layer = attribute_at(bound, path)
        if isinstance(layer, nn.BatchNorm):
            free = layer.clone(parent=None, name=None)
            found[path] = Place(path, channels, free, free)
        else:
            found[path] = None
    return found


def attribute_at(bound: nn.Module, path: Path) -> Any:
    """What `setup` or a field puts at this path of a bound module; None if neither does."""
    layer: Any = bound
    for name in path:
        layer = _attribute(layer, name)
    return layer


def _scopes(collection: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, int]]:
    """The scopes that hold a mean and a var, and how many channels these have."""
    if not isinstance(collection, Mapping):
        return
    mean = nn.meta.unbox(collection.get("mean"))
    if "var" in collection and hasattr(mean, "shape"):
        yield path, mean.shape[-1] if mean.shape else 1
    for name, child in collection.items():
        yield from _scopes(child, (*path, name))


def _channels(layer: nn.BatchNorm, x: Any) -> int:
    axes = layer.axis if isinstance(layer.axis, tuple | list) else (layer.axis,)
    size = 1
    for axis in axes:
        size *= x.shape[axis]
    return size


def _attribute(holder: Any, name: str) -> Any:
    """What Flax calls `name` in a module or container: an attribute, or an item of one, "blocks_0" or "heads_left"."""
    if isinstance(holder, Mapping):
        if name in holder:
            return holder[name]
    elif isinstance(holder, list | tuple):
        if name.isdecimal() and int(name) < len(holder):
            return holder[int(name)]
    elif hasattr(holder, name):
        return getattr(holder, name)
    for end in (index for index, letter in enumerate(name) if letter == "_"):
        container = _attribute(holder, name[:end]) if end else None
        if isinstance(container, Mapping | list | tuple):
            item = _attribute(container, name[end + 1 :])
            if item is not None:
                return item
    return None
