"""Batch normalization for TensorFlow: a pure function on tensors, and a `tf.Module` that keeps its state.

TensorFlow is imported when `batch_norm` or `BatchNorm` is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .function import batch_norm
    from .layer import BatchNorm

__all__ = ["BatchNorm", "batch_norm"]

_HOMES = {"BatchNorm": ".layer", "batch_norm": ".function"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
