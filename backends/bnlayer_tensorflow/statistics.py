"""Batch statistics and the moving average, in TensorFlow.

Written out instead of `tf.nn.moments`, whose second derivative is wrong: it stops the gradient at the mean inside the
variance, which only the first derivative does not notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype

from .weights import Weights


@dataclass(frozen=True, eq=False)
class Moments:
    """One batch's statistics, in the plan's arithmetic and `channel_shape`.

    Attributes:
        shift: the mean, up to its rounding; carries no gradient.
        rest: what `shift` missed; the mean is `shift + rest`.
        variance: biased.
        unbiased: with Bessel's correction; carries no gradient.
        present: whether there was anything to take statistics of, a boolean scalar; None where that is certain.
    """

    shift: tf.Tensor
    rest: tf.Tensor
    variance: tf.Tensor
    unbiased: tf.Tensor
    present: tf.Tensor | None


def batch_moments(
    x: tf.Tensor, hidden: tf.Tensor | None, plan: CallPlan, count: Any, weights: Weights | None
) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over all axes but the channel's.

    Args:
        x: in the plan's arithmetic.
        hidden: where x has no weight and is not finite, so that it may not even be multiplied by 0; None: nowhere.
        plan: of the call.
        count: elements per channel, an integer or an int64 scalar.
        weights: of the call, or None.
    """

    def seen(values: tf.Tensor) -> tf.Tensor:
        return values if hidden is None else tf.where(hidden, tf.zeros_like(values), values)

    n = tf.cast(tf.maximum(tf.cast(count, tf.int64), 1), x.dtype)
    proportions = None if weights is None else tf.cast(weights.proportions, x.dtype)

    def weighted(values: tf.Tensor) -> tf.Tensor:
        return values if proportions is None else values * proportions

    def mean(values: tf.Tensor) -> tf.Tensor:
        total = tf.reduce_sum(values, plan.reduced, keepdims=True)
        return total if weights is not None else total / n

    # The result does not depend on the shift, so the gradient through the rest is exact to every order. Around the
    # shift the variance keeps its digits however far x is from 0, and a constant channel gets none.
    shift = tf.stop_gradient(mean(weighted(seen(x))))
    centered = seen(x - shift)
    rest = mean(weighted(centered))
    deviation = centered - rest
    # Weighted before it is squared: under a mask the square may overflow, and 0 times that is NaN.
    variance = mean(weighted(deviation) * deviation)
    freedom, present = _freedom(plan, count, weights)
    none_left = freedom <= 0
    corrected = tf.stop_gradient(variance) / tf.cast(tf.where(none_left, tf.ones_like(freedom), freedom), x.dtype)
    unbiased = tf.where(none_left, tf.zeros_like(corrected), corrected)
    return Moments(shift, rest, variance, unbiased, present)


def updated(
    state: BatchNormState[tf.Tensor], batch: Moments, plan: CallPlan, spec: BatchNormSpec
) -> BatchNormState[tf.Tensor]:
    """The state after one batch's statistics entered it, if there were any; carries no gradient."""
    counter = tf.cast(state.num_updates, tf.int64)
    if spec.decay == "cumulative":
        decay = 1.0 - 1.0 / tf.cast(counter + 1, tf.float64)
    else:
        decay = tf.constant(spec.decay, tf.float64)
    mean = tf.stop_gradient(batch.shift + batch.rest)
    variance = tf.stop_gradient(batch.variance)
    moved = tf.constant(True) if batch.present is None else batch.present
    enters = tf.broadcast_to(moved, [spec.num_features])
    if spec.nonfinite == "keep":
        # The unbiased variance is derived from the biased one, which decides what is finite.
        enters &= tf.reshape(tf.math.is_finite(mean) & tf.math.is_finite(variance), [-1])

    def average(name: str, new: tf.Tensor) -> tf.Tensor:
        old = getattr(state, name)
        stored = tf.as_dtype(array_dtype(spec, name))
        work = tf.float64 if tf.float64 in (stored, new.dtype) else tf.float32
        entering = tf.cast(tf.reshape(new, [-1]), work)
        kept = tf.cast(decay, work) * tf.cast(old, work) + tf.cast(1.0 - decay, work) * entering
        return tf.where(enters, tf.cast(kept, stored), old)

    unbiased = spec.moving_variance_estimator == "unbiased"
    return state.replace(
        moving_mean=average("moving_mean", mean),
        moving_variance=average("moving_variance", batch.unbiased if unbiased else variance),
        num_updates=counter + tf.cast(moved, tf.int64),
    )


def _freedom(plan: CallPlan, count: Any, weights: Weights | None) -> tuple[tf.Tensor, tf.Tensor | None]:
    """1 - Q/W^2 = 1 - 1/n, exactly 0 at n = 1 (and where there is nothing), and whether there is anything."""
    if weights is not None:
        return weights.freedom, weights.any
    n = tf.cast(count, tf.float64)
    present = None if plan.count is not None else n > 0
    return 1.0 - 1.0 / tf.maximum(n, 1.0), present
