"""Find backends by name, over entry points: the built-in ones use the same door as a stranger's.

`bnlayer.backends` holds backends for the full spec, `bnlayer.native` the frameworks' own layers as conformance
targets, `bnlayer.models` what reaches the batch norms inside a framework's models. Nothing is imported until asked for.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from .contract import Backend, Layer, ModelAdapter, NativeBackend, NDArray
from .errors import BackendUnavailable, UnknownBackend
from .spec import BatchNormSpec
from .state import BatchNormState

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BACKENDS: Final = "bnlayer.backends"
NATIVE: Final = "bnlayer.native"
MODELS: Final = "bnlayer.models"
_BUILT_IN: Final = ("numpy", "torch", "tensorflow", "jax", "keras")  # the order of tables, nothing else


def known(group: str = BACKENDS) -> dict[str, EntryPoint]:
    """The registered entry points of a group by name: ours first, then the rest by name."""
    from importlib.metadata import entry_points  # here: it takes a fifth of the time in which numpy is imported

    found = {entry.name: entry for entry in entry_points(group=group)}
    order = [*(n for n in _BUILT_IN if n in found), *sorted(n for n in found if n not in _BUILT_IN)]
    return {name: found[name] for name in order}


def is_ours(entry: EntryPoint) -> bool:
    """Whether bnlayer itself registered this entry point, and not another distribution."""
    return entry.dist is not None and entry.dist.name == "bnlayer"


def backend(name: str) -> Backend:
    """The backend of this name, or the object at `package.module:ATTRIBUTE`, which nobody needs to have registered.

    The backend's framework is imported only when it is used; `Backend.version()` tells whether it is there.

    Raises:
        UnknownBackend: no backend has this name, or there is no such object, or it is not a backend.
        BackendUnavailable: the entry point's own module cannot be imported.
    """
    if ":" in name:
        return _at(name)
    for group in (BACKENDS, NATIVE):
        if name in known(group):
            return _load(group, name)
    names = ", ".join([*known(BACKENDS), *known(NATIVE)])
    raise UnknownBackend(f"unknown backend {name!r}. Known: {names}. Or give package.module:ATTRIBUTE.")


def owner(layer: Layer) -> Backend:
    """The backend whose layer this is; imports no framework.

    Raises:
        UnknownBackend: no registered backend owns it.
    """
    for group in (BACKENDS, NATIVE):
        for name in known(group):
            try:
                candidate = _load(group, name)
            except (BackendUnavailable, UnknownBackend):
                continue  # what cannot be loaded has built no layer in this process
            if candidate.owns(layer):
                return candidate
    raise UnknownBackend(
        f"no backend owns a {type(layer).__module__}.{type(layer).__qualname__}; known: {', '.join(known())}."
    )


def build(
    spec: BatchNormSpec, backend: str | Backend, state: BatchNormState[Any] | None = None, device: Any = None
) -> Layer:
    """A native layer of `spec`, in the framework of `backend` (a name or a backend object).

    Args:
        spec: what to build.
        backend: "numpy", "torch", "tensorflow", "jax", "keras", or another registered or importable one.
        state: numpy arrays to start from, copied; None for the initial ones.
        device: in the framework's own words, such as "cuda"; None for its default.

    Raises:
        UnknownBackend, BackendUnavailable, UnsupportedError, StateError
    """
    target = _named(backend) if isinstance(backend, str) else backend
    return target.build(spec, state, device=device)


def extract(layer: Layer) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
    """The spec and a numpy copy of the state of any layer that a registered backend owns.

    Raises:
        UnknownBackend: no backend owns it.
    """
    return owner(layer).extract(layer)


def load(layer: Layer, state: BatchNormState[Any]) -> Layer:
    """The layer with `state` in it: the same object where the framework's layers are mutable, else a new one.

    Raises:
        UnknownBackend: no backend owns it.
        StateError: the state does not fit the layer's spec.
    """
    return owner(layer).load(layer, state)


def adapter(model: Any) -> ModelAdapter:
    """What reaches the batch norms of this model; imports no framework.

    Raises:
        UnknownBackend: no registered adapter owns it.
    """
    for name in known(MODELS):
        try:
            candidate = _load_adapter(name)
        except (BackendUnavailable, UnknownBackend):
            continue  # what cannot be loaded reaches no model
        if candidate.owns(model):
            return candidate
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise UnknownBackend(f"no adapter reaches into a {kind}; known kinds of models: {', '.join(known(MODELS))}.")


_named = backend  # `build` has a parameter of that name


@cache
def _load(group: str, name: str) -> Backend:
    entry = known(group)[name]
    try:
        found = entry.load()
    except Exception as error:  # a stranger's module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise BackendUnavailable(f"backend {name!r} ({entry.value}) cannot be imported ({reason}).") from error
    checked = _checked(found, entry.value)
    if group == NATIVE and not isinstance(checked, NativeBackend):
        raise UnknownBackend(f"{entry.value!r} is registered as a native layer, but lacks `deviations` or `lacks`.")
    return checked


@cache
def _load_adapter(name: str) -> ModelAdapter:
    entry = known(MODELS)[name]
    try:
        found = entry.load()
    except Exception as error:  # as in `_load`
        reason = f"{type(error).__name__}: {error}"
        raise BackendUnavailable(f"model adapter {name!r} ({entry.value}) cannot be imported ({reason}).") from error
    if not isinstance(found, ModelAdapter):
        raise UnknownBackend(f"{entry.value!r} is not a model adapter (see bnlayer.contract.ModelAdapter).")
    return found


def _at(path: str) -> Backend:
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # TypeError: a relative module name
        raise UnknownBackend(f"no backend at {path!r}: {error}.") from error
    return _checked(found, path)


def _checked(found: Any, path: str) -> Backend:
    if isinstance(found, type):
        raise UnknownBackend(f"{path!r} is a class; name an object of it, such as {path.partition(':')[0]}:BACKEND.")
    if not isinstance(found, Backend):
        lacks = [n for n in ("name", "version", "owns", "unsupported", "build", "extract", "load", "step")
                 if not hasattr(found, n)]  # fmt: skip
        raise UnknownBackend(f"{path!r} is not a backend; it lacks {', '.join(lacks)} (see bnlayer.contract.Backend).")
    return found
