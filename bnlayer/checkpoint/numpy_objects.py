"""What numpy's and JAX's arrays are in a pickle. `pickles` reads them as data."""

from __future__ import annotations

from math import prod
from typing import Any, Final

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .checkpoint import NDArray
from .pickles import Call, Global

_RECONSTRUCT: Final = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_FROMBUFFER: Final = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
_SCALAR: Final = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_JAX: Final = ("jax._src.array._reconstruct_array", "jax.interpreters.xla._reconstruct_array")
BY_NAME: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}


def array_of(leaf: Any, place: str) -> NDArray | None:
    """The array that a record describes; None if it describes none.

    Raises:
        CheckpointError: it does, and its parts do not fit.
    """
    if isinstance(leaf, (bool, int, float)):
        return np.asarray(leaf) if not isinstance(leaf, int) or -(2**63) <= leaf < 2**63 else None
    if not isinstance(leaf, Call):
        return None
    try:
        if leaf.name in _RECONSTRUCT:
            _, shape, dtype, fortran, data = leaf.state
            return _array(data, _dtype(dtype, place), shape, bool(fortran), place)
        if leaf.name in _FROMBUFFER:
            data, dtype, shape, order = leaf.arguments
            return _array(data, _dtype(dtype, place), shape, order == "F", place)
        if leaf.name in _SCALAR:
            dtype, data = leaf.arguments
            return _array(data, _dtype(dtype, place), (), False, place)
        if leaf.name in _JAX:
            function, arguments, state = leaf.arguments[:3]
            return array_of(Call(function, arguments, state), place)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{place}: the array is damaged ({error}).") from error
    return None


def _dtype(record: Any, place: str) -> np.dtype[Any]:
    """numpy.dtype(code), with the byte order that its state has; or one of ml_dtypes' by name."""
    code = (
        record.arguments[0] if isinstance(record, Call) and record.name == "numpy.dtype" and record.arguments else None
    )
    if isinstance(code, Global) and code.module == "ml_dtypes" and code.name in BY_NAME:
        return BY_NAME[code.name]
    if isinstance(record, Global) and record.module == "ml_dtypes" and record.name in BY_NAME:
        return BY_NAME[record.name]
    if isinstance(code, str) and code in BY_NAME:
        return BY_NAME[code]
    if not isinstance(code, str) or len(code) > 8 or code[:1] not in "biufc":
        raise CheckpointError(f"{place}: its dtype {code!r} is not one of numbers.")
    state = record.state if isinstance(record, Call) else None
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    return np.dtype(code).newbyteorder(">" if order == ">" else "<")


def _array(data: Any, dtype: np.dtype[Any], shape: Any, fortran: bool, place: str) -> NDArray:
    if isinstance(data, str):  # protocol 2 has no bytes: Python 3 writes them as text of one byte a character
        data = data.encode("latin-1")
    if isinstance(data, Call) and data.name == "_codecs.encode" and len(data.arguments) == 2:
        data = str(data.arguments[0]).encode("latin-1")
    if not isinstance(data, (bytes, bytearray)) or not isinstance(shape, tuple):
        raise CheckpointError(f"{place}: the array's data is no bytes.")
    if any(type(n) is not int or n < 0 for n in shape) or len(data) != prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{place}: {dtype} {shape} does not fit its {len(data)} bytes.")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))
