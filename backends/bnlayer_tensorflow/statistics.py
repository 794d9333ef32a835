"""Batch statistics, in TensorFlow.

Written out instead of `tf.nn.moments`, whose second derivative is wrong: it stops the gradient at the mean inside the
variance, which only the first derivative does not notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bnlayer.call import CallPlan

from .ghosts import Ghosts
from .weights import Weights


@dataclass(frozen=True, eq=False)
class Moments:
    """The statistics of one batch, or of each of its ghost batches, in the plan's arithmetic; they broadcast to x.

    Attributes:
        shift: the mean, up to its rounding; carries no gradient.
        rest: what `shift` missed; the mean is `shift + rest`.
        variance: biased.
        unbiased: with Bessel's correction; carries no gradient.
        present: whether there was anything to take statistics of; None where that is certain.
        ghosts: the axis of the ghost batches, or None.
        share: each ghost batch's part of the total weight, float64; None where all have the same.
    """

    shift: tf.Tensor
    rest: tf.Tensor
    variance: tf.Tensor
    unbiased: tf.Tensor
    present: tf.Tensor | None = None
    ghosts: int | None = None
    share: tf.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Averaging:
    """The weighted mean over all positions of a batch, or of each of its ghost batches.

    Attributes:
        axes: what is reduced, and kept with length 1.
        hidden: where values have no weight and are not finite, so that they may not even be multiplied by 0; None:
            nowhere.
        proportions: each position's part of the whole, or None where all have the same.
        count: positions of a channel, at least 1, where there are no proportions.
    """

    axes: tuple[int, ...]
    hidden: tf.Tensor | None
    proportions: tf.Tensor | None
    count: tf.Tensor

    def centered(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The mean up to its rounding, without gradient, and what remains of x without it.

        What is computed from the rest does not depend on that shift, so its gradient is exact to every order. Around
        the shift a variance keeps its digits however far x is from 0, and a constant channel gets none.
        """
        shift = tf.stop_gradient(self.mean(self._seen(x)))
        return shift, self._seen(x - shift)

    def mean(self, values: tf.Tensor) -> tf.Tensor:
        """Of finite values, or of values that are hidden nowhere."""
        total = tf.reduce_sum(self._weighted(values), self.axes, keepdims=True)
        return total if self.proportions is not None else total / self.count

    def square(self, values: tf.Tensor) -> tf.Tensor:
        """The mean of the squares."""
        # Weighted before it is squared: under a mask the square may overflow, and 0 times that is NaN.
        total = tf.reduce_sum(self._weighted(values) * values, self.axes, keepdims=True)
        return total if self.proportions is not None else total / self.count

    def _seen(self, values: tf.Tensor) -> tf.Tensor:
        return values if self.hidden is None else tf.where(self.hidden, tf.zeros_like(values), values)

    def _weighted(self, values: tf.Tensor) -> tf.Tensor:
        return values if self.proportions is None else values * self.proportions


def batch_moments(
    x: tf.Tensor, hidden: tf.Tensor | None, plan: CallPlan, count: Any, ghosts: Ghosts | None, weights: Weights | None
) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over all axes but the channel's and the ghosts'.

    Args:
        x: in the plan's arithmetic, split into ghost batches if there are any.
        hidden: where x has no weight and is not finite; None: nowhere.
        plan: of the call.
        count: elements of x per channel, an integer or an int64 scalar.
        ghosts: of the call, or None.
        weights: of the call, or None.
    """
    each = tf.cast(count if ghosts is None else count // ghosts.number, tf.int64)
    averaging = Averaging(
        axes=plan.reduced if ghosts is None else ghosts.reduced(plan),
        hidden=hidden,
        proportions=None if weights is None else tf.cast(weights.proportions, x.dtype),
        count=tf.cast(tf.maximum(each, 1), x.dtype),
    )
    shift, centered = averaging.centered(x)
    rest = averaging.mean(centered)
    variance = averaging.square(centered - rest)
    if weights is None:  # 1 - 1/n, exactly 0 at n = 1 and where there is nothing
        freedom = 1.0 - 1.0 / tf.cast(tf.maximum(each, 1), tf.float64)
        present, share = None if plan.count is not None else each > 0, None
    else:
        freedom, present, share = weights.sums.freedom, weights.any, weights.share
    return Moments(
        shift, rest, variance, unbiased(variance, freedom), present, None if ghosts is None else ghosts.axis, share
    )


def unbiased(variance: tf.Tensor, freedom: tf.Tensor) -> tf.Tensor:
    """v/(1 - Q/W^2), and 0 where a single position has weight; without gradient."""
    none_left = freedom <= 0
    corrected = tf.stop_gradient(variance) / tf.cast(
        tf.where(none_left, tf.ones_like(freedom), freedom), variance.dtype
    )
    return tf.where(none_left, tf.zeros_like(corrected), corrected)
