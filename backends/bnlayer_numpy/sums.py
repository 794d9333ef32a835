"""Per-channel sums over blocks: by BLAS within a block, in float64 across them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .layout import fold

NDArray = np.ndarray[Any, np.dtype[Any]]


class Sum:
    """The sum over the blocks of one panel, for each of its channels.

    Within a block the additions run in the block's dtype: at most 2**15 numbers, and mostly 32, go into one such sum
    (see `layout.WIDE`).
    """

    def __init__(self) -> None:
        self._wide: NDArray | None = None
        self._channels = 0

    def add(self, block: NDArray, weights: NDArray | None = None) -> None:
        """Add one block (n, a, channels, b), each position times its weight (n, a, 1, b)."""
        n, a, c, b = block.shape
        self._channels = c
        if b > 1:
            self._put(_along_rows(block.reshape(n * a, c, b), weights))
        elif weights is not None:
            self._put(np.dot(weights.reshape(-1), block.reshape(-1, c)))
        else:
            side = fold(c)
            if (n * a) % side or not block.flags.c_contiguous:
                side = 1
            rows = block.reshape(-1, side * c)
            self._put(np.dot(ones(len(rows), rows.dtype), rows))

    def channels(self) -> NDArray:
        """The sums so far, float64."""
        assert self._wide is not None
        if len(self._wide) == self._channels:
            return self._wide
        return np.asarray(self._wide.reshape(-1, self._channels).sum(0))

    def _put(self, found: NDArray) -> None:
        if self._wide is None:
            self._wide = found.astype(np.float64)
        else:  # the first block is the largest
            self._wide[: len(found)] += found


def _along_rows(rows: NDArray, weights: NDArray | None) -> NDArray:
    """Of (positions before, channels, positions after)."""
    before, c, b = rows.shape
    if weights is None:
        each = np.dot(rows.reshape(-1, b), ones(b, rows.dtype)).reshape(before, c)
    else:
        each = np.matmul(rows, weights.reshape(before, b, 1))[:, :, 0]
    return each[0] if before == 1 else np.dot(ones(before, rows.dtype), each)


@lru_cache(maxsize=64)
def ones(length: int, dtype: np.dtype[Any]) -> NDArray:
    """Not to be written to."""
    made = np.ones(length, dtype)
    made.flags.writeable = False
    return made
