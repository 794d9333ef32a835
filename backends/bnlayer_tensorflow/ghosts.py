"""Ghost batches as an axis of their own, so that each gets its statistics from the same reductions as a whole batch.

Their sizes differ by one row at most; the smaller ones are padded with a row that has no weight. There is nothing here
but reshaping, padding and slicing, so lengths may be unknown until a graph runs, and gradients are exact to any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec

from .tensors import at_least_one


@dataclass(frozen=True, eq=False)
class Ghosts:
    """The ghost batches of one call; every number is an integer, or an int64 scalar where only the running graph knows.

    Attributes:
        strided: ghost g has rows g, g + number, ...; else they are consecutive, the larger ones first.
        rows: of the whole batch.
        number: of ghost batches, at least 1.
        size: rows of the largest, at least 1: an empty batch is one row of padding.
        even: whether it is certain that all have `size` rows, so that nothing is padded.
    """

    strided: bool
    rows: Any
    number: Any
    size: Any
    even: bool

    @property
    def axis(self) -> int:
        """The axis of the ghost batches in what `split` returns; their rows are on the other one of the first two."""
        return 1 if self.strided else 0

    def reduced(self, plan: CallPlan) -> tuple[int, ...]:
        """The axes over which each ghost batch takes its statistics."""
        return (1 - self.axis, *(i + 1 for i in plan.reduced if i != 0))

    def split(self, values: tf.Tensor) -> tf.Tensor:
        """Rows of shape (N, ...) as (size, number, ...) if strided, else (number, size, ...); padding is 0."""
        if self.strided:
            return _rows_as(_padded(values, 0, self.size * self.number - self.rows), self.size, self.number)
        if self.even:
            return _rows_as(values, self.number, self.size)
        cut = self._full * self.size
        larger = _rows_as(values[:cut], self._full, self.size)
        smaller = _rows_as(values[cut:], self.number - self._full, self.size - 1)
        return tf.concat([larger, _padded(smaller, 1, 1)], 0)

    def join(self, values: tf.Tensor) -> tf.Tensor:
        """What `split` returned, back in (N, ...)."""
        if self.even or self.strided:
            return _rows_as(values, self.size * self.number, skip=2)[: self.rows]
        larger = _rows_as(values[: self._full], self._full * self.size, skip=2)
        smaller = values[self._full :, : self.size - 1]
        return tf.concat([larger, _rows_as(smaller, (self.number - self._full) * (self.size - 1), skip=2)], 0)

    @property
    def _full(self) -> Any:
        """How many of them have `size` rows; the others have one less."""
        return self.number - (self.number * self.size - self.rows)


def ghosts_of(x: tf.Tensor, plan: CallPlan, spec: BatchNormSpec) -> Ghosts | None:
    """The ghost batches into which this call's rows fall, or None where the plan does not split them."""
    if not plan.ghosted:
        return None
    rows: Any = tf.shape(x, tf.int64)[0] if x.shape[0] is None else x.shape[0]
    number = at_least_one(-(-rows // spec.virtual_batch_size))
    size = at_least_one(-(-rows // number))
    even = isinstance(rows, int) and number * size == rows
    return Ghosts(spec.virtual_batch_layout == "strided", rows, number, size, even)


def _rows_as(values: tf.Tensor, *lengths: Any, skip: int = 1) -> tf.Tensor:
    """`values` with these lengths in place of its first `skip` axes."""
    first = tf.stack([tf.cast(length, tf.int64) for length in lengths])
    return tf.reshape(values, tf.concat([first, tf.shape(values, tf.int64)[skip:]], 0))


def _padded(values: tf.Tensor, axis: int, more: Any) -> tf.Tensor:
    if isinstance(more, int) and more == 0:
        return values
    rank = values.shape.rank
    after = [tf.cast(more if i == axis else 0, tf.int64) for i in range(rank)]
    return tf.pad(values, tf.stack([tf.zeros(rank, tf.int64), tf.stack(after)], 1))
