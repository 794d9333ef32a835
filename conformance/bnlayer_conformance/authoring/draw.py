"""Random data that is the same on every machine, for ever, and independent of every other case.

Seeded by a name (never by call order), made of integers only, so that no libm or numpy version can change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import prod
from random import Random
from typing import Any

import numpy as np

from bnlayer.state import numpy_dtype

NDArray = np.ndarray[Any, np.dtype[Any]]


def normal(name: str, shape: Sequence[int], dtype: str, *, mean: Any = 0.0, std: Any = 1.0, axis: int = -1) -> NDArray:
    """Nearly normal numbers: twelve 12-bit uniforms summed, so multiples of 2**-12 within six deviations.

    `mean` and `std` are numbers, or one number per channel on `axis`.
    """
    random = Random(_seed(name))
    raw = [sum(random.getrandbits(12) for _ in range(12)) - 6 * 4095 for _ in range(prod(shape))]
    unit = np.array(raw, np.float64).reshape(tuple(shape)) / 4096.0
    scaled = _along(mean, unit, axis) + _along(std, unit, axis) * unit
    return scaled.astype(numpy_dtype(dtype))


def uniform(name: str, shape: Sequence[int], dtype: str, low: float, high: float) -> NDArray:
    """Uniform numbers in [low, high), on a grid of 2**-12 of the interval."""
    random = Random(_seed(name))
    raw = np.array([random.getrandbits(12) for _ in range(prod(shape))], np.float64).reshape(tuple(shape))
    return (low + (high - low) * raw / 4096.0).astype(numpy_dtype(dtype))


def _along(values: Any, unit: NDArray, axis: int) -> NDArray:
    """One number, or one per channel, broadcast against the drawn ones."""
    if np.ndim(values) == 0:
        return np.asarray(values)
    shape = [1] * unit.ndim
    shape[axis] = -1
    return np.reshape(values, shape)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
