"""numpy's array format (`.npy`), its header checked before memory is taken."""

from __future__ import annotations

import struct
import tokenize
from collections.abc import Callable
from math import prod
from typing import Any, Final, cast

import numpy as np

from ..errors import CheckpointError
from .checkpoint import NDArray
from .source import Stream

_HEADERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_DAMAGE: Final = (
    ValueError,
    TypeError,
    KeyError,
    SyntaxError,
    EOFError,
    struct.error,
    tokenize.TokenError,
    MemoryError,
)


def read_header(stream: Stream, place: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """dtype, shape, and whether the order is Fortran's; the stream then stands at the data.

    Raises:
        CheckpointError: it is no such header, or describes Python objects.
    """
    try:
        version = np.lib.format.read_magic(cast("Any", stream))
        if version not in _HEADERS:
            raise CheckpointError(f"{place}: numpy's array format {version} is not read here; 1.0 and 2.0 are.")
        shape, fortran, dtype = _HEADERS[version](cast("Any", stream))
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{place}: it is no array of numpy ({type(error).__name__}: {error}).") from error
    if dtype.hasobject or dtype.fields is not None or dtype.subdtype is not None or dtype.itemsize == 0:
        raise CheckpointError(f"{place}: its dtype {dtype} is not one of plain numbers.")
    if any(type(n) is not int or n < 0 for n in shape) or prod(shape) * dtype.itemsize >= 2**62:
        raise CheckpointError(f"{place}: its shape {shape} makes no sense.")
    return dtype, shape, fortran


def read_data(
    read: Callable[[int], bytes], dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool, place: str
) -> NDArray:
    """The array that follows a header, in native byte order.

    Args:
        read: reads bytes; a checked number of them is asked for.
        dtype, shape, fortran: of the header.
        place: for the error.

    Raises:
        CheckpointError: the data is truncated.
    """
    length = prod(shape) * dtype.itemsize
    data = read(length)
    if len(data) != length:
        raise CheckpointError(f"{place}: {length} bytes were expected, and {len(data)} could be read.")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), order="K")
