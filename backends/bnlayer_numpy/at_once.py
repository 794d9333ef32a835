"""A batch that is one block, channels last: NumPy's operations over all of it at once, with no list of blocks to go
through, which takes longer than the numbers do (a third of a forward pass at (256, 128))."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np

from . import layout
from .layout import WIDE, NDArray
from .sums import ones

# Numbers in one sum in the arithmetic. Five times the error of such a sum of squares (see `blocked`) is 5 sqrt(128)/3,
# that is 19 roundings, and K = 8 + sqrt(n) is as many where n is 128; of fewer numbers it is less.
_LONGEST_SUM: Final = 128


def rows_of(arithmetic: np.dtype[Any], *views: NDArray) -> tuple[NDArray, ...] | None:
    """`joined` views of one shape (N, 1, C, 1) as long rows, each some positions side by side; None where they are not
    for this module."""
    n, a, c, b = views[0].shape
    if not a == b == 1 or not is_one_block(views[0]):
        return None
    if any(view.dtype != arithmetic or not view.flags.c_contiguous for view in views):
        return None
    rows = n // side(n, c, WIDE)
    return tuple(view.reshape(rows, -1) for view in views) if rows <= _LONGEST_SUM else None


def is_one_block(x: NDArray) -> bool:
    """Whether x is no more than that."""
    return x.nbytes <= layout.BLOCK_BYTES


def total(rows: NDArray, channels: int, weights: NDArray | None = None) -> NDArray:
    """The sum over all positions, each times its weight (N, 1, 1, 1): float64, (C,)."""
    if weights is not None:
        return weights.reshape(-1).dot(rows.reshape(-1, channels)).astype(np.float64)  # type: ignore[no-any-return]
    found = ones(len(rows), rows.dtype).dot(rows).reshape(-1, channels)
    return found.sum(0, np.float64)  # type: ignore[no-any-return]


def spread(values: NDArray, rows: NDArray) -> NDArray:
    """Per-channel values, float64, in the rows' dtype and for all positions of a row."""
    return repeated(values, rows.shape[1] // len(values), rows.dtype)


def repeated(values: NDArray, times: int, dtype: np.dtype[Any]) -> NDArray:
    """Per-channel values for so many positions side by side."""
    made = np.empty((times, len(values)), dtype)
    made[...] = values
    return made.reshape(-1)


def apply(rows: NDArray, out: NDArray, scale: NDArray, offset: NDArray) -> None:
    """out = rows scale + offset, by scale and offset of as many positions side by side as a row has."""
    np.multiply(rows, scale, out=out)
    np.add(out, offset, out=out)


@lru_cache(maxsize=256)
def side(positions: int, channels: int, length: int) -> int:
    """How many positions side by side, a power of 2 that divides them all, make a row of this length; or fewer."""
    found = 1
    while found * channels < length and positions % (2 * found) == 0:
        found *= 2
    return found
