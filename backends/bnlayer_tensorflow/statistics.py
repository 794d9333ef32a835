"""Batch statistics and the averages that they move, in TensorFlow.

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


def updated(
    state: BatchNormState[tf.Tensor], batch: Moments, spec: BatchNormSpec, ghosts: Ghosts | None, decay: Any
) -> BatchNormState[tf.Tensor]:
    """The state after one batch's statistics entered it, if there were any; carries no gradient.

    Args:
        state: before.
        batch: what enters; of ghost batches, their mean by weight.
        spec: of the call.
        ghosts: of the call, or None.
        decay: weight on the old averages, in place of the spec's; None for the spec's.
    """
    counter = tf.cast(state.num_updates, tf.int64)
    if decay is not None:
        decay = tf.cast(decay, tf.float64)
    elif spec.decay == "cumulative":
        decay = 1.0 - 1.0 / tf.cast(counter + 1, tf.float64)
    else:
        decay = tf.constant(spec.decay, tf.float64)
    mean = _entering(batch.shift + batch.rest, batch, ghosts)
    biased = _entering(batch.variance, batch, ghosts)
    unbiased = spec.moving_variance_estimator == "unbiased"
    variance = _entering(batch.unbiased, batch, ghosts) if unbiased else biased
    moved = tf.constant(True) if batch.present is None else tf.reduce_any(batch.present)
    enters = tf.broadcast_to(moved, [spec.num_features])
    if spec.nonfinite == "keep":
        # The unbiased variance is derived from the biased one, which decides what is finite.
        enters &= tf.math.is_finite(mean) & tf.math.is_finite(biased)

    def average(name: str, new: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        work = tf.float64 if tf.float64 in (tf.as_dtype(array_dtype(spec, name)), new.dtype) else tf.float32
        old = tf.cast(getattr(state, name), work)
        return tf.cast(weight, work) * old + tf.cast(1.0 - weight, work) * tf.cast(new, work)

    if spec.renorm is not None:
        remembered = tf.constant(spec.renorm.decay, tf.float64)
        stddev = tf.sqrt(variance + tf.cast(spec.epsilon, variance.dtype))
        moving_stddev = average("moving_stddev", stddev, decay)
        new = {
            "moving_mean": average("moving_mean", mean, decay),
            "moving_variance": tf.maximum(tf.square(moving_stddev) - tf.cast(spec.epsilon, moving_stddev.dtype), 0.0),
            "renorm_mean": average("renorm_mean", mean, remembered),
            "renorm_stddev": average("renorm_stddev", stddev, remembered),
            "moving_stddev": moving_stddev,
        }
    else:
        # 1 - d^t, which of a decay near 1 would lose its digits.
        seen = -tf.math.expm1(tf.cast(counter + 1, tf.float64) * tf.math.log(decay))
        new = {}
        for what, value in (("mean", mean), ("variance", variance)):
            if spec.zero_debias == "all" or (spec.zero_debias == "mean" and what == "mean"):
                hidden = average(f"hidden_{what}", value, decay)
                new |= {f"hidden_{what}": hidden, f"moving_{what}": hidden / tf.cast(seen, hidden.dtype)}
            else:
                new[f"moving_{what}"] = average(f"moving_{what}", value, decay)

    def stored(name: str, value: tf.Tensor) -> tf.Tensor:
        return tf.where(enters, tf.cast(value, tf.as_dtype(array_dtype(spec, name))), getattr(state, name))

    return state.replace(
        **{name: stored(name, value) for name, value in new.items()},
        num_updates=counter + tf.cast(moved, tf.int64),
    )


def _entering(values: tf.Tensor, batch: Moments, ghosts: Ghosts | None) -> tf.Tensor:
    """One value per channel of what the batch, or its ghost batches together, found."""
    values = tf.stop_gradient(values)
    if ghosts is not None:
        wide = tf.cast(values, tf.float64)
        if batch.share is None:
            wide = tf.reduce_mean(wide, ghosts.axis)
        else:
            wide = tf.reduce_sum(wide * batch.share, ghosts.axis)
        values = tf.cast(wide, values.dtype)
    return tf.reshape(values, [-1])
