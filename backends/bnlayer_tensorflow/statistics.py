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
        share: each ghost batch's part of the total weight, float64; None where all have the same.
    """

    shift: tf.Tensor
    rest: tf.Tensor
    variance: tf.Tensor
    unbiased: tf.Tensor
    present: tf.Tensor | None
    share: tf.Tensor | None


def batch_moments(
    x: tf.Tensor, hidden: tf.Tensor | None, plan: CallPlan, count: Any, ghosts: Ghosts | None, weights: Weights | None
) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over all axes but the channel's and the ghosts'.

    Args:
        x: in the plan's arithmetic, split into ghost batches if there are any.
        hidden: where x has no weight and is not finite, so that it may not even be multiplied by 0; None: nowhere.
        plan: of the call.
        count: elements of x per channel, an integer or an int64 scalar.
        ghosts: of the call, or None.
        weights: of the call, or None.
    """
    reduced = plan.reduced if ghosts is None else ghosts.reduced(plan)
    each = tf.cast(count if ghosts is None else count // ghosts.number, tf.int64)

    def seen(values: tf.Tensor) -> tf.Tensor:
        return values if hidden is None else tf.where(hidden, tf.zeros_like(values), values)

    n = tf.cast(tf.maximum(each, 1), x.dtype)
    proportions = None if weights is None else tf.cast(weights.proportions, x.dtype)

    def weighted(values: tf.Tensor) -> tf.Tensor:
        return values if proportions is None else values * proportions

    def mean(values: tf.Tensor) -> tf.Tensor:
        total = tf.reduce_sum(values, reduced, keepdims=True)
        return total if weights is not None else total / n

    # The result does not depend on the shift, so the gradient through the rest is exact to every order. Around the
    # shift the variance keeps its digits however far x is from 0, and a constant channel gets none.
    shift = tf.stop_gradient(mean(weighted(seen(x))))
    centered = seen(x - shift)
    rest = mean(weighted(centered))
    deviation = centered - rest
    # Weighted before it is squared: under a mask the square may overflow, and 0 times that is NaN.
    variance = mean(weighted(deviation) * deviation)
    if weights is None:  # 1 - 1/n, exactly 0 at n = 1 and where there is nothing
        freedom = 1.0 - 1.0 / tf.cast(tf.maximum(each, 1), tf.float64)
        present, share = None if plan.count is not None else each > 0, None
    else:
        freedom, present, share = weights.freedom, weights.any, weights.share
    none_left = freedom <= 0
    corrected = tf.stop_gradient(variance) / tf.cast(tf.where(none_left, tf.ones_like(freedom), freedom), x.dtype)
    unbiased = tf.where(none_left, tf.zeros_like(corrected), corrected)
    return Moments(shift, rest, variance, unbiased, present, share)
