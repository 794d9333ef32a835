"""Batch normalization for JAX: a pure function on arrays, and a pytree layer that carries its state.

JAX is imported when `batch_norm` or `BatchNorm` is first asked for; Equinox when `equinox_template` is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .equinox_names import equinox_template
    from .function import batch_norm
    from .layer import BatchNorm

__all__ = ["BatchNorm", "batch_norm", "equinox_template"]

_HOMES = {"BatchNorm": ".layer", "batch_norm": ".function", "equinox_template": ".equinox_names"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
