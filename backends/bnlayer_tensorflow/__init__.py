"""Batch normalization for TensorFlow: a pure function on tensors, and a `tf.Module` that keeps its state.

TensorFlow is imported when `batch_norm`, `BatchNorm` or `v1`, the functions for TensorFlow 1's graphs and sessions, is
first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import v1
    from .function import batch_norm
    from .layer import BatchNorm

__all__ = ["BatchNorm", "batch_norm", "v1"]

_HOMES = {"BatchNorm": ".layer", "batch_norm": ".function", "v1": ".v1"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name], __name__)
    return home if name == "v1" else getattr(home, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
