"""The groups of rows that have statistics of their own: the whole batch, or its ghost batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec

NDArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Groups:
    """How an array of x's rank is laid out for its groups, all of them in one computation.

    Ghost batches become an axis: (N, ...) is split into (rows, ghosts, ...) if strided, (ghosts, rows, ...) if
    consecutive, so that both are a reshape and the graph does not grow with their number. Where one ghost has a row
    less than another, its first row stands in the gap, and takes no part in a sum.

    Attributes:
        axis: the axis of the groups in a split array, or None: the batch is the one group, and splitting does nothing.
        reduced: the axes of a split array that a group's statistics run over.
        channel_shape: a per-channel array's, to broadcast against a split one.
        counts: elements per channel of each group, to broadcast likewise; a float array.
        present: False where a split array repeats a row, to broadcast likewise; None where it repeats none.
        rows: of the array before it is split.
    """

    axis: int | None
    reduced: tuple[int, ...]
    channel_shape: tuple[int, ...]
    counts: NDArray
    present: NDArray | None
    rows: int

    def split(self, array: jax.Array) -> jax.Array:
        """An array of N rows, its rows by group."""
        if self.axis is None:
            return array
        rest, number, most = array.shape[1:], self._number, -(-self.rows // self._number)
        if self.axis == 1:  # row k of ghost g is row k G + g
            lacking = most * number - self.rows
            whole = jnp.concatenate([array, array[number - lacking : number]]) if lacking else array
            return whole.reshape(most, number, *rest)
        if self.present is None:
            return array.reshape(number, most, *rest)
        larger = self.rows % number
        head = array[: larger * most].reshape(larger, most, *rest)
        tail = array[larger * most :].reshape(number - larger, most - 1, *rest)
        return jnp.concatenate([head, jnp.concatenate([tail, tail[:, :1]], axis=1)])

    def join(self, array: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        if self.axis is None:
            return array
        rest = array.shape[2:]
        if self.axis == 1 or self.present is None:
            return array.reshape(-1, *rest)[: self.rows]
        larger, most = self.rows % self._number, array.shape[1]
        head, tail = array[:larger], array[larger:, : most - 1]
        return jnp.concatenate([head.reshape(-1, *rest), tail.reshape(-1, *rest)])

    @property
    def _number(self) -> int:
        return int(self.counts.size)


def groups_of(spec: BatchNormSpec, plan: CallPlan, rows: int) -> Groups:
    """The groups of a call with this many rows."""
    slices, rank = plan.ghosts, len(plan.channel_shape)
    if slices is None or len(slices) == 1:  # one ghost batch is the batch
        # A length that is a symbol is there in eval only, where nothing is counted.
        counts = np.full((1,) * rank, np.nan if plan.count is None else plan.count, plan.arithmetic)
        return Groups(None, plan.reduced, plan.channel_shape, counts, None, rows)
    axis = 1 if spec.virtual_batch_layout == "strided" else 0
    sizes = np.array([len(range(rows)[ghost]) for ghost in slices])
    present = np.expand_dims(np.arange(sizes.max()), axis) < np.expand_dims(sizes, 1 - axis)
    assert plan.count is not None
    counts = np.expand_dims(sizes, 1 - axis) * (plan.count // rows)
    later = (1,) * (rank - 1)
    return Groups(
        axis=axis,
        reduced=(1 - axis, *(i + 1 for i in plan.reduced if i != 0)),
        channel_shape=(1, *plan.channel_shape),
        counts=counts.astype(plan.arithmetic).reshape(*counts.shape, *later),
        present=None if present.all() else present.reshape(*present.shape, *later),
        rows=rows,
    )
