"""Batch normalization for PyTorch: a pure function, and `torch.nn` modules that keep their own state.

Importing this package, or its `backend`, does not import torch; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .conversion import convert_sync_batchnorm
    from .function import batch_norm
    from .layer import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm", "convert_sync_batchnorm"]

_HOMES: Final = {
    "BatchNorm": "layer",
    "BatchNorm1d": "layer",
    "BatchNorm2d": "layer",
    "BatchNorm3d": "layer",
    "batch_norm": "function",
    "convert_sync_batchnorm": "conversion",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
