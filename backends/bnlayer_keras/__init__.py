"""Batch normalization for Keras 3, on TensorFlow, JAX or PyTorch: a layer that takes keras.layers' arguments.

Keras, and the framework it runs on, are imported when `BatchNormalization` is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layer import BatchNormalization

__all__ = ["BatchNormalization"]

_HOMES = {"BatchNormalization": ".layer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
