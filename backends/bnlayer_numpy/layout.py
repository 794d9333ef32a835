"""How an array lies in memory, and how it is cut into blocks that stay in a core's cache.

NumPy does one operation at a time over all that it is given. On a large array each of them fetches everything from
memory again, and so a formula of six operations costs six times what its data do. Here the whole formula is done on one
block before the next is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from math import prod
from operator import itemgetter
from typing import Any, Final

import numpy as np

from .threads import Result, cores, shared

NDArray = np.ndarray[Any, np.dtype[Any]]
Cut = tuple[slice, slice, slice, slice]

# Of 2**16 to 2**19 the first is the fastest on one core with 1 MiB of second-level cache, and the second on two, which
# then wait for each other half as often (float32, both layouts). That one is taken where what is spread out to a
# block's size, 2 arrays or 3 with a shift, is small against a result.
BLOCK_BYTES: Final = 2**18
SHARED_BLOCK_BYTES: Final = 2**19
SMALL_AGAINST_RESULT: Final = 12
# From this number of blocks on, per-channel values are written out to a block's size once, so that every operation runs
# over plain memory: without broadcasting it takes about half as long.
SPREAD_FROM: Final = 3
# NumPy copies what is repeated along rows shorter than its buffer, 8192 numbers by default, to that buffer first, as
# often as it is needed. From a row of 1024 on it is faster without (float32 rows of 1024 to 4096: 1.2 to 1.5 of the
# time of plain memory, with the buffer 1.7 to 1.9), and a single number for each row then takes two thirds of it.
BUFFER: Final = 1024
# Rows as long as this are repeated as fast as NumPy reads plain memory. So positions are side by side to make them.
LONG: Final = 4096
# Sums run down columns, so with few channels rows are laid side by side until they are this wide: that is faster, and
# the fewer numbers a sum in float32 has, the less it loses.
WIDE: Final = 1024
ALL: Final = slice(None)


@dataclass(frozen=True, eq=False)
class Layout:
    """The memory order of arrays of one shape.

    Attributes:
        order: the axes from the slowest to the fastest in memory; None where they are in order.
        ordered: the array's shape in that order.
        axis: the channel axis in that order.
        shape: (N, A, C, B): the batch axis, the positions before the channel axis, the channels, the positions after.
    """

    order: tuple[int, ...] | None
    ordered: tuple[int, ...]
    axis: int
    shape: tuple[int, int, int, int]

    def view(self, array: NDArray) -> NDArray:
        """The array as (N, A, C, B); a copy where its memory is in another order."""
        array = array if self.order is None else array.transpose(self.order)
        return np.ascontiguousarray(array).reshape(self.shape)

    def empty(self, dtype: np.dtype[Any]) -> NDArray:
        """A new array of the given shape, in this memory order."""
        return self._restored(np.empty(self.ordered, dtype))

    def positions(self, weights: NDArray, rows: int, dtype: np.dtype[Any]) -> NDArray:
        """Weights that broadcast against this many rows of the array, as (rows, A, 1, B)."""
        weights = weights if self.order is None else weights.transpose(self.order)
        everywhere = np.broadcast_to(weights, (rows, *self.ordered[1 : self.axis], 1, *self.ordered[self.axis + 1 :]))
        _, a, _, b = self.shape
        return np.ascontiguousarray(everywhere, dtype).reshape(rows, a, 1, b)

    def at_positions(self, values: NDArray) -> NDArray:
        """The inverse of `positions`: with 1 on the channel axis, in the axes' own order."""
        return self._restored(values.reshape(-1, *self.ordered[1 : self.axis], 1, *self.ordered[self.axis + 1 :]))

    def _restored(self, array: NDArray) -> NDArray:
        return array if self.order is None else array.transpose(np.argsort(self.order))


def layout_of(x: NDArray, axis: int) -> Layout:
    """The memory order of x: as its axes are, or channels last; anything else is copied into the first."""
    if x.flags.c_contiguous or not np.moveaxis(x, axis, -1).flags.c_contiguous:
        return _layout(x.shape, axis, False)
    return _layout(x.shape, axis, True)


@lru_cache(maxsize=256)
def _layout(shape: tuple[int, ...], axis: int, channels_last: bool) -> Layout:
    order = None
    if channels_last:
        order = (*range(axis), *range(axis + 1, len(shape)), axis)
        shape, axis = tuple(shape[i] for i in order), len(shape) - 1
    return Layout(order, shape, axis, (shape[0], prod(shape[1:axis]), shape[axis], prod(shape[axis + 1 :])))


@dataclass(frozen=True, eq=False)
class Panel:
    """Some channels of an array, and the blocks that they are cut into.

    Attributes:
        channels: all of them, unless a block has no room for that.
        block: the shape of the first block, which no other one is larger than.
        cuts: each block's index into the array.
    """

    channels: slice
    block: tuple[int, int, int, int]
    cuts: tuple[Cut, ...]

    def spread(self, values: NDArray, dtype: np.dtype[Any], positions: int = 1) -> NDArray:
        """Per-channel values for the operations on a block: as large as that, or to be repeated.

        `positions`: the view has so many in one, as `long_rows` made it, and the values are those of each.
        """
        values = values[self.channels].astype(dtype)
        if positions > 1:
            row = np.empty((positions, len(values)), dtype)
            row[...] = values
            return row.reshape(-1, 1)
        if len(self.cuts) < SPREAD_FROM or self.block[3] >= BUFFER:
            return values.reshape(-1, 1)
        _, _, c, b = self.block
        spread = np.empty((1, 1, c, b) if c * b >= BUFFER else self.block, dtype)
        spread[...] = values.reshape(-1, 1)
        return spread


def joined(view: NDArray) -> NDArray:
    """Rows of a `Layout.view`, the first two axes as one where they are adjacent in memory.

    Narrow rows that are not adjacent, as strided ghost batches have them, are copied: that made forward and backward of
    (65536, 64) in 4 ghosts about a fifth faster.
    """
    n, a, c, b = view.shape
    return view.reshape(n * a, 1, c, b) if view.flags.c_contiguous or a * c * b < WIDE else view


def side_by_side(*views: NDArray) -> int:
    """How many positions of `joined` views of one shape make one long row; 1 where they cannot. See `Panel.spread`."""
    n, a, c, b = views[0].shape
    if b != 1 or not all((view if a == 1 else view[0]).flags.c_contiguous for view in views):
        return 1
    return _positions(n, c) if a == 1 else _divisor(a, c)


@lru_cache(maxsize=256)
def _positions(n: int, channels: int) -> int:
    positions = 1
    while positions * channels < LONG:
        positions *= 2
    # A row next to its values is soon as large as a small batch itself.
    return positions if n % positions == 0 and n >= 8 * positions else 1


@lru_cache(maxsize=256)
def _divisor(positions: int, channels: int) -> int:
    """The most of one row's positions that make no row of more than twice the length that is long."""
    most = min(positions, 2 * LONG // channels)
    return next((k for k in range(most, 1, -1) if positions % k == 0), 1)


def long_rows(view: NDArray, positions: int) -> NDArray:
    """So many positions of the view as one, with the channels of all of them."""
    n, a, c, _ = view.shape
    if positions == 1:
        return view
    shape = (n // positions, 1) if a == 1 else (n, a // positions)
    return view.reshape(*shape, positions * c, 1)


def put(target: NDArray, view: NDArray) -> None:
    """Write what was computed in `joined(view)` to the view, where that was a copy."""
    if not np.may_share_memory(target, view):
        view[...] = target.reshape(view.shape)


@lru_cache(maxsize=256)
def panels(shape: tuple[int, int, int, int], itemsize: int, *, shifted: bool, whole: int = 0) -> tuple[Panel, ...]:
    """The blocks of a `joined` view of this shape, computed in numbers of this size; each block is adjacent in memory,
    as far as its rows are. `whole`: numbers in the batch, where the view is a part of it."""
    n, a, c, b = shape
    spread = SHARED_BLOCK_BYTES * (3 if shifted else 2)
    large = cores() > 1 and max(prod(shape), whole) * itemsize >= SMALL_AGAINST_RESULT * spread
    most = (SHARED_BLOCK_BYTES if large else BLOCK_BYTES) // itemsize
    if c * b <= most:
        if a * c * b <= most:
            rows = _foldable(most // (a * c * b), c)
            cuts = tuple((part, ALL, ALL, ALL) for part in _steps(n, rows))
            return (Panel(ALL, (min(rows, n), a, c, b), cuts),)
        rows = _foldable(most // (c * b), c)
        cuts = tuple((slice(i, i + 1), part, ALL, ALL) for i in range(n) for part in _steps(a, rows))
        return (Panel(ALL, (1, min(rows, a), c, b), cuts),)
    at_once, length = max(1, most // b), min(b, most)
    found = []
    for channels in _steps(c, at_once):
        cuts = tuple(
            (slice(i, i + 1), slice(j, j + 1), channels, part)
            for i in range(n) for j in range(a) for part in _steps(b, length)
        )  # fmt: skip
        found.append(Panel(channels, (1, 1, min(channels.stop, c) - channels.start, length), cuts))
    return tuple(found)


def over(
    cut: tuple[Panel, ...], work: Callable[[Panel, Sequence[Cut]], Result], *, backward: bool = False
) -> list[list[Result]]:
    """What `work` gives for parts of each panel's blocks, shared out to the cores over all panels together.

    `backward`: from the last panel on, as work goes from the last block on, whose data a cache may still have.
    """
    if len(cut) == 1:
        return [shared(cut[0].cuts, partial(work, cut[0]))]
    found: list[list[Result]] = [[] for _ in cut]

    def part(pieces: Sequence[tuple[int, Cut]]) -> list[tuple[int, Result]]:
        groups = [(i, [at for _, at in group]) for i, group in groupby(pieces, itemgetter(0))]
        return [(i, work(cut[i], cuts)) for i, cuts in (reversed(groups) if backward else groups)]

    for results in shared([(i, at) for i, panel in enumerate(cut) for at in panel.cuts], part):
        for i, result in results:
            found[i].append(result)
    return found


def fitted(values: NDArray, block: NDArray) -> NDArray:
    """What `Panel.spread` gave, cut to a block that may be the last and smaller one."""
    if values.ndim == 2 or values.shape == block.shape:
        return values
    n, a, _, b = block.shape
    return values[:n, :a, :, :b]


@lru_cache(maxsize=256)
def fold(channels: int) -> int:
    """How many positions side by side, a power of 2, make a row that is wide enough to add up rows."""
    positions = 1
    while positions * channels < WIDE:
        positions *= 2
    return positions


def _foldable(rows: int, channels: int) -> int:
    return max(rows - rows % fold(channels), 1)


def _steps(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]
