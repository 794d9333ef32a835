"""CRC-32C (Castagnoli), as TensorFlow's files use it: of many bytes at once, in NumPy.

The checksum is linear over GF(2), so pieces of equal length are run side by side and joined: appending n zero bytes to
a message is a 32 x 32 matrix on its checksum.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]

_POLYNOMIAL: Final = 0x82F63B78
_LANES: Final = 1 << 14
_MASK_DELTA: Final = 0xA282EAD8


def crc32c(data: bytes | memoryview) -> int:
    """The checksum of `data`."""
    raw = np.frombuffer(data, np.uint8)
    length = raw.size // _LANES  # bytes a lane; the rest comes one by one after them
    state = 0xFFFFFFFF
    if length >= 16:
        state = _of_lanes(raw[: length * _LANES], length, state)
        raw = raw[length * _LANES :]
    table = _table().tolist()
    for byte in raw.tolist():
        state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """The checksum as LevelDB and TensorFlow store it, so that a checksum of data with checksums stays sound."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _of_lanes(raw: NDArray, length: int, state: int) -> int:
    table = _table()
    lanes = np.zeros(_LANES, np.uint32)
    lanes[0] = state
    for column in np.ascontiguousarray(raw.reshape(_LANES, length).T):
        lanes = table[(lanes ^ column) & 0xFF] ^ (lanes >> np.uint32(8))
    shift = _power(_zero_byte(), length)
    while lanes.size > 1:  # each pair: the first as if the second's bytes had followed it as zeros, and the second
        lanes = _apply(shift, lanes[0::2]) ^ lanes[1::2]
        shift = _compose(shift, shift)
    return int(lanes[0])


@cache
def _table() -> NDArray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> np.uint32(1)) ^ np.uint32(_POLYNOMIAL), table >> np.uint32(1))
    return table


@cache
def _zero_byte() -> NDArray:
    """What one zero byte does to each of the 32 bits of a state: a matrix, its columns as numbers."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return np.asarray(_table()[bits & 0xFF] ^ (bits >> np.uint32(8)))


def _apply(matrix: NDArray, values: NDArray) -> NDArray:
    result = np.zeros_like(values)
    for bit, column in enumerate(matrix):
        result ^= np.where((values >> np.uint32(bit)) & 1, column, np.uint32(0)).astype(np.uint32)
    return result


def _compose(second: NDArray, first: NDArray) -> NDArray:
    return _apply(second, first)


def _power(matrix: NDArray, exponent: int) -> NDArray:
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)
    while exponent:
        if exponent & 1:
            result = _compose(matrix, result)
        matrix = _compose(matrix, matrix)
        exponent >>= 1
    return np.asarray(result)
