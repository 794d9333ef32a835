"""One batch norm of torch.nn for one of ours and back, over the same tensors."""

from __future__ import annotations

import weakref
from typing import Any, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bnlayer.contract import Kind, LayerRecord
from bnlayer.errors import BatchNormError, UnsupportedError
from bnlayer.spec import BatchNormSpec

from .bridge import read_state
from .dtypes import dtype_name
from .layer import OWN_ATTRIBUTES, BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Module
from .tools import refuse_loss

_OURS: Final[dict[type[_BatchNorm], type[Module]]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.SyncBatchNorm: BatchNorm,  # it takes any rank, and so does ours
}
_NATIVE: Final = {ours: native for native, ours in _OURS.items() if ours is not BatchNorm}
_OWN_TENSORS: Final = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def record(name: str, layer: _BatchNorm) -> LayerRecord:
    """What a batch norm of a model is, and why it cannot be exchanged where it cannot."""
    kind: Kind = "bnlayer" if isinstance(layer, Module) else "native"
    try:
        spec = _checked_spec(layer)
        return LayerRecord(name, layer, kind, spec, read_state(layer, spec))
    except BatchNormError as error:
        return LayerRecord(name, layer, kind, None, None, str(error))


def ours_of(layer: _BatchNorm) -> Module:
    """Our module with what torch's has: the same parameters and buffers, attributes, hooks and mode.

    Raises:
        BatchNormError: torch's computes what no spec says; the message names what.
    """
    spec = _checked_spec(layer)
    new: Module = _over(layer, _OURS[type(layer)], without=("process_group",))
    new._param_dtype, new._stats_dtype = spec.param_dtype, spec.stats_dtype
    if isinstance(layer, torch.nn.SyncBatchNorm):
        new.synchronized, new.process_group = True, layer.process_group
    new._remember()
    return new


def native_of(layer: Module) -> _BatchNorm:
    """torch's module with what ours has, likewise.

    Raises:
        UnsupportedError: torch.nn has no equal of it; the message names the fields.
    """
    refuse_loss(layer, "torch.nn's batch norm")
    kind = torch.nn.SyncBatchNorm if layer.synchronized else _NATIVE.get(type(layer))
    if kind is None:
        raise UnsupportedError("torch.nn has no batch norm for inputs of any rank; use BatchNorm1d, 2d or 3d.")
    new: _BatchNorm = _over(layer, kind, without=OWN_ATTRIBUTES)
    if layer.synchronized:
        new.__dict__["process_group"] = layer.process_group
    return new


def adopt_hooks(layer: torch.nn.Module) -> None:
    """Make hooks that want the module they belong to find this one, and not the one that it replaced."""
    tables: list[dict[int, Any]] = [layer._state_dict_pre_hooks, layer._load_state_dict_pre_hooks]
    for hooks in tables:
        for hook in hooks.values():
            if isinstance(getattr(hook, "module", None), weakref.ref):
                hook.module = weakref.ref(layer)


def _over(layer: _BatchNorm, kind: type[Any], without: tuple[str, ...]) -> Any:
    """A module of another class that shares the tables of tensors and of hooks, so that the handles of hooks that are
    in their owner's hands go on to work."""
    new = torch.nn.Module.__new__(kind)
    new.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in without})
    return new


def _checked_spec(layer: _BatchNorm) -> BatchNormSpec:
    """The spec of one of ours or of torch's.

    Raises:
        UnsupportedError: it is not only what its spec would say.
        SpecError: an attribute was set to what no batch norm can be.
    """
    if issubclass(type(layer), LazyModuleMixin):  # its first call makes it another class
        raise UnsupportedError("it is lazy and was never called; call the model once.")
    known = (*_OURS, *_OURS.values())
    if type(layer) not in known:
        base = next(kind for kind in type(layer).__mro__ if kind in (*known, _BatchNorm))
        raise UnsupportedError(
            f"{type(layer).__module__}.{type(layer).__qualname__} is a subclass of {base.__name__} and may compute"
            " something else."
        )
    bound = [name for name in ("forward", "_compiled_call_impl") if layer.__dict__.get(name) is not None]
    if bound:
        raise UnsupportedError(f"its {', '.join(bound)} was set on it alone, and calls the layer that would go.")
    held = {**layer._parameters, **layer._buffers}
    computed = [name for name in _OWN_TENSORS if name not in held]
    if computed:
        raise UnsupportedError(f"its {', '.join(computed)} are not its own, but computed from others by a hook.")
    if any(tensor is not None and tensor.is_meta for tensor in held.values()):
        raise UnsupportedError("its tensors are on the meta device and hold no numbers; materialize the model.")
    if isinstance(layer, Module):
        return layer.spec
    tracked = [name for name in _OWN_TENSORS[2:] if held[name] is not None]
    if len(tracked) not in (0, 3) or bool(tracked) != bool(layer.track_running_stats):
        raise UnsupportedError(
            f"track_running_stats={layer.track_running_stats} does not go with what it holds"
            f" ({', '.join(tracked) or 'no statistics'}); torch then normalizes by one thing and updates another."
        )
    return _as_ours(layer).spec


def _as_ours(layer: _BatchNorm) -> Module:
    """Our module in place of torch's, to be asked for its spec only."""
    view: Module = _over(layer, _OURS[type(layer)], without=("process_group",))
    stored = next((t for t in (layer.weight, layer.bias, layer.running_mean) if t is not None), None)
    if stored is not None:
        view._param_dtype = view._stats_dtype = dtype_name(stored.dtype)
    view.synchronized = isinstance(layer, torch.nn.SyncBatchNorm)
    return view
