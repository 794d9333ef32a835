"""What torch's own tools do with a module that they take for torch.nn's: kept, or refused where it would be lost.

They know a batch norm by its class and read its attributes, and what torch.nn does not have they cannot carry over.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bnlayer.errors import DialectError, UnsupportedError

if TYPE_CHECKING:
    from .layer import Module

_FUSERS: Final = ("fuse_conv_bn_eval", "fuse_linear_bn_eval")  # torch.nn.utils.fusion
_SYNCHRONIZER: Final = "convert_sync_batchnorm"  # torch.nn.SyncBatchNorm's


def _is_torchs(frame: FrameType, *names: str) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return frame.f_code.co_name in names and module.split(".")[0] == "torch"


def refuse_loss(module: Module, what: str, instead: str = "") -> None:
    """Refuse a module that torch.nn's with the same attributes and tensors would not equal.

    Args:
        module: ours.
        what: what would make it torch.nn's, for the message.
        instead: what to do about it, where there is more than not to have it.

    Raises:
        UnsupportedError: names what would be lost.
    """
    hint = f" {instead}." if instead else ""
    if module.frozen_statistics:
        raise UnsupportedError(
            f"{what} would lose frozen_statistics, which torch.nn does not have; set it to False.{hint}"
        )
    try:
        module.spec.replace(synchronized=False).to_dialect("torch")
    except DialectError as error:
        raise UnsupportedError(f"{what} would lose what torch.nn does not have: {error}{hint}") from error


class Qconfig:
    """Stands where torch.nn.SyncBatchNorm.convert_sync_batchnorm looks for a `qconfig`, as it does of every module.

    It builds a SyncBatchNorm from torch.nn's attributes, and would drop all others without a word. A module that has a
    qconfig keeps it in its own dictionary, which comes first.
    """

    def __get__(self, module: Module | None, owner: type) -> Any:
        if module is not None and _is_torchs(sys._getframe(1), _SYNCHRONIZER):
            refuse_loss(
                module,
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm",
                "bnlayer_torch.convert_sync_batchnorm keeps all",
            )
        raise AttributeError("qconfig")


def refuse_fusing(axis: int) -> None:
    """Refuse torch's fusers, which take the channel axis for 1; to be called where a module's `eps` is read.

    Raises:
        UnsupportedError: such a fuser reads it.
    """
    if not torch.compiler.is_compiling() and _is_torchs(sys._getframe(2), *_FUSERS):
        raise UnsupportedError(f"torch fuses batch norms with the channel axis 1 only; axis is {axis}.")


def fx_node(module: Module, x: torch.fx.Proxy, weights: Any, options: Mapping[str, Any]) -> Any:
    """What torch.fx.symbolic_trace gets from a call of the module: a node that calls it.

    torch.fx traces into every module that does not come from torch.nn itself, and there is no number to look at.
    """
    tracer: Any = x.tracer
    given = (x,) if weights is None else (x, weights)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), given, dict(options))


def native_twin(module: Module, kind: type[_BatchNorm]) -> _BatchNorm:
    """torch.nn's module of this class with our module's attributes, over the very same tensors."""
    twin = kind(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, device="meta"
    )
    for name in ("weight", "bias"):
        twin.register_parameter(name, getattr(module, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        twin.register_buffer(name, getattr(module, name))
    return twin.train(module.training)


def native_class(module: Module) -> type[_BatchNorm] | None:
    """torch.nn's class that takes inputs of the same ranks, or None."""
    every = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    return next((kind for kind in every if isinstance(module, kind)), None)


def scriptable(module: Module) -> _BatchNorm:
    """What torch.jit.script compiles in place of the module.

    Raises:
        UnsupportedError: torch.nn has no equal of it.
    """
    refuse_loss(module, "torch.jit.script")
    kind = native_class(module)
    if kind is None:
        raise UnsupportedError("torch.jit.script compiles torch.nn's classes only; use BatchNorm1d, 2d or 3d.")
    return native_twin(module, kind)
