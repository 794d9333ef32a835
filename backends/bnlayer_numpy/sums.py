"""Per-channel sums over blocks: by BLAS within a block, in float64 across them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

import numpy as np

from .layout import NDArray, Panel, fold

# Along an axis as long as this BLAS's product of two rows takes half the time of multiplying them first (49: 1.3).
_LONG_DOT: Final = 128
_HELD: Final = 32  # results of blocks, before they are added up in float64


class Sum:
    """The sum over the blocks of one panel, for each of its channels.

    Within a block the additions run in the block's dtype. Mostly 128 numbers or fewer go into one such sum (see
    `layout.WIDE`); along the axes after the channels it is a block's, but there BLAS adds up 16 or more sums side by
    side.
    """

    def __init__(self, panel: Panel, dtype: np.dtype[Any]) -> None:
        self._channels, self._side, self._ones, self._common, self._rows, self._each_row, held = _prepared(panel, dtype)
        self._found = np.empty((held, self._side * self._channels), dtype)
        self._held = 0
        self._total: NDArray | None = None

    def add(self, block: NDArray) -> None:
        """Add one block (n, a, channels, b)."""
        if block.shape == self._common and block.flags.c_contiguous:
            np.dot(self._each_row, block.reshape(self._rows), out=self._next())
            return
        n, a, c, b = block.shape
        if b > 1 and n * a == 1:
            np.dot(block.reshape(c, b), self._ones[:b], out=self._next())
            return
        if b > 1:
            each = np.dot(block.reshape(-1, b), self._ones[:b])
            np.dot(self._ones[: n * a], each.reshape(-1, c), out=self._next())
            return
        folded = n * a // self._side if block.flags.c_contiguous else 0
        whole = folded * self._side
        rows = block.reshape(-1, c)
        if folded:
            np.dot(self._ones[:folded], rows[:whole].reshape(folded, -1), out=self._next())
        if whole < n * a:
            rest = self._next()
            rest[c:] = 0
            np.dot(self._ones[: n * a - whole], rows[whole:], out=rest[:c])

    def add_products(self, block: NDArray, other: NDArray, buffer: NDArray) -> None:
        """Add block * other, two blocks of one shape; all of the buffer may be overwritten, and may be block's."""
        n, a, c, b = block.shape
        if b < _LONG_DOT:
            self.add(np.multiply(block, other, out=buffer))
        elif n * a == 1:
            np.vecdot(block.reshape(c, b), other.reshape(c, b), out=self._next())
        else:
            np.dot(self._ones[: n * a], np.vecdot(block, other).reshape(-1, c), out=self._next())

    def add_weighted(self, block: NDArray, weights: NDArray) -> None:
        """Add one block, each position times its weight (n, a, 1, b)."""
        n, a, c, b = block.shape
        found = self._next()
        found[c:] = 0
        if b == 1:
            np.dot(weights.reshape(-1), block.reshape(-1, c), out=found[:c])
        else:
            each = np.matmul(block.reshape(n * a, c, b), weights.reshape(n * a, b, 1))[:, :, 0]
            np.dot(self._ones[: n * a], each, out=found[:c])

    def channels(self) -> NDArray:
        """The sums so far, float64."""
        self._put()
        assert self._total is not None
        return self._total

    def _next(self) -> NDArray:
        """Where the next result goes."""
        if self._held == len(self._found):
            self._put()
        self._held += 1
        return self._found[self._held - 1]  # type: ignore[no-any-return]

    def _put(self) -> None:
        held = self._found[: self._held].reshape(-1, self._channels).astype(np.float64)
        found = ones(len(held), held.dtype).dot(held)
        self._total = found if self._total is None else self._total + found
        self._held = 0


def total(parts: Iterable[NDArray]) -> NDArray:
    """The sum of what several threads have found."""
    first, *others = parts
    for other in others:
        first = first + other
    return first


@lru_cache(maxsize=256)
def _prepared(
    panel: Panel, dtype: np.dtype[Any]
) -> tuple[int, int, NDArray, tuple[int, ...] | None, tuple[int, int], NDArray, int]:
    """What every sum over a panel's blocks needs, which small inputs would spend as long on as on the sum."""
    n, a, c, b = panel.block
    side = fold(c) if b == 1 else 1
    held = ones(max(n * a, b), dtype)
    # What most blocks are: whole, and their rows adjacent in memory.
    common = panel.block if b == 1 and n * a % side == 0 else None
    rows = (n * a // side, side * c)
    return c, side, held, common, rows, held[: rows[0]], min(len(panel.cuts), _HELD)


@lru_cache(maxsize=256)
def ones(length: int, dtype: np.dtype[Any]) -> NDArray:
    """(length,), not to be written to."""
    made = np.ones(length, dtype)
    made.flags.writeable = False
    return made
