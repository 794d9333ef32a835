"""Between specs and numpy, and Keras layers of either kind."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ml_dtypes
import numpy as np

from bnlayer.contract import NDArray
from bnlayer.spec import BatchNormSpec

from . import runtime


def shape_of(spec: BatchNormSpec, rank: int | None = None) -> tuple[int | None, ...]:
    """An input's shape, with every length but the channels' unknown; of the least rank with that axis unless given.

    Raises:
        IndexError: the rank has no such axis.
    """
    shape: list[int | None] = [None] * (rank or (spec.axis + 1 if spec.axis > 0 else 1 - spec.axis))
    shape[spec.axis] = spec.num_features
    return tuple(shape)


def dtypes(spec: BatchNormSpec) -> set[str]:
    """The dtypes of its parameters and statistics."""
    return {spec.param_dtype, spec.stats_dtype}


def numpy(variable: Any) -> NDArray:
    """A copy of a Keras variable; bfloat16 may come as float32."""
    return np.array(runtime.load_keras().ops.convert_to_numpy(variable.value))


def to_array(tensor: Any) -> NDArray:
    """A copy of a tensor or a variable, in its own dtype."""
    keras = runtime.load_keras()
    value = tensor.value if isinstance(tensor, keras.Variable) else tensor
    array = np.array(keras.ops.convert_to_numpy(value))
    half = keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"  # which may come as float32
    return array.astype(ml_dtypes.bfloat16) if half else array


def on(device: Any) -> AbstractContextManager[Any]:
    """Within it variables are made on this device; None for Keras's default."""
    scope: AbstractContextManager[Any] = nullcontext()
    if device is not None:
        scope = runtime.load_keras().device(runtime.current().device(str(device)))
    return scope
