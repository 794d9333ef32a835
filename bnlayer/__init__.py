"""Batch normalization, exactly specified: one spec, a native layer in every framework, one set of vectors.

    spec = bnlayer.BatchNormSpec(64, axis=1, epsilon=1e-5, decay=0.9, moving_variance_estimator="unbiased")
    layer = bnlayer.build(spec, "torch")
    spec, state = bnlayer.extract(layer)
    same = bnlayer.build(spec, "keras", state)
    print(bnlayer.convert(model))

Importing this package imports no framework.
"""

from .errors import (
    BackendUnavailable,
    BatchNormError,
    DialectError,
    FileError,
    InputError,
    SpecError,
    StateError,
    UnknownBackend,
    UnsupportedError,
)
from .models import Conversion, batch_norms, convert, freeze, unfreeze
from .registry import backend, build, extract, load
from .spec import BatchNormSpec, Renorm
from .state import BatchNormState

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BatchNormError",
    "BatchNormSpec",
    "BatchNormState",
    "Conversion",
    "DialectError",
    "FileError",
    "InputError",
    "Renorm",
    "SpecError",
    "StateError",
    "UnknownBackend",
    "UnsupportedError",
    "backend",
    "batch_norms",
    "build",
    "convert",
    "extract",
    "freeze",
    "load",
    "unfreeze",
]
