"""What enters the moving averages, and the averages after it, in TensorFlow."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype

from .statistics import Moments
from .tensors import number


def updated(
    state: BatchNormState[tf.Tensor], batch: Moments, spec: BatchNormSpec, decay: Any
) -> BatchNormState[tf.Tensor]:
    """The state after one batch's statistics entered it, if there were any; carries no gradient.

    Args:
        state: before.
        batch: what enters; of ghost batches, their mean by weight.
        spec: of the call.
        decay: weight on the old averages, in place of the spec's; None for the spec's.
    """
    counter = tf.cast(state.num_updates, tf.int64)
    t = tf.cast(counter + 1, tf.float64)
    if decay is None:
        decay = 1.0 - 1.0 / t if spec.decay == "cumulative" else spec.decay
    decay = number(decay, tf.float64)
    mean = _entering(batch.shift + batch.rest, batch)
    biased = _entering(batch.variance, batch)
    moved = None if batch.present is None else tf.reduce_any(batch.present)
    enters = moved
    if spec.nonfinite == "keep":
        # What else enters is derived from these two.
        finite = tf.math.is_finite(mean) & tf.math.is_finite(biased)
        enters = finite if moved is None else finite & moved

    def average(name: str, new: tf.Tensor, weight: tf.Tensor = decay) -> tf.Tensor:
        """As it is before it is rounded to the state's dtype."""
        work = tf.float64 if tf.float64 in (_stored(spec, name), new.dtype) else tf.float32
        old = tf.cast(getattr(state, name), work)
        return tf.cast(weight, work) * old + tf.cast(1.0 - weight, work) * tf.cast(new, work)

    after: dict[str, tf.Tensor] = {}
    if spec.renorm is not None:
        slow = tf.constant(spec.renorm.decay, tf.float64)
        stddev = tf.sqrt(biased + tf.constant(spec.epsilon, biased.dtype))
        after["moving_mean"] = average("moving_mean", mean)
        moving = after["moving_stddev"] = average("moving_stddev", stddev)
        # Keras's rule: the standard deviation is averaged, and the moving variance follows from that.
        after["moving_variance"] = tf.maximum(tf.square(moving) - tf.constant(spec.epsilon, moving.dtype), 0.0)
        after["renorm_mean"] = average("renorm_mean", mean, slow)
        after["renorm_stddev"] = average("renorm_stddev", stddev, slow)
    else:
        unbiased = spec.moving_variance_estimator == "unbiased"
        variance = _entering(batch.unbiased, batch) if unbiased else biased
        debiased = {"none": (), "mean": ("mean",), "all": ("mean", "variance")}[spec.zero_debias]
        for name, value in (("mean", mean), ("variance", variance)):
            if name in debiased:
                hidden = after[f"hidden_{name}"] = average(f"hidden_{name}", value)
                # 1 - d^t; written so, it would lose the digits of a decay near 1. A decay of 0 has the log -inf.
                seen = -tf.math.expm1(t * tf.math.log(decay))
                after[f"moving_{name}"] = hidden / tf.cast(seen, hidden.dtype)
            else:
                after[f"moving_{name}"] = average(f"moving_{name}", value)

    def chosen(name: str, value: tf.Tensor) -> tf.Tensor:
        value = tf.cast(value, _stored(spec, name))
        return tf.stop_gradient(value if enters is None else tf.where(enters, value, getattr(state, name)))

    return state.replace(
        **{name: chosen(name, value) for name, value in after.items()},
        num_updates=counter + (1 if moved is None else tf.cast(moved, tf.int64)),
    )


def _entering(values: tf.Tensor, batch: Moments) -> tf.Tensor:
    """One value per channel of what the batch, or its ghost batches together, found."""
    if batch.ghosts is not None:
        wide = tf.cast(values, tf.float64)
        together = (
            tf.reduce_mean(wide, batch.ghosts)
            if batch.share is None
            else tf.reduce_sum(wide * batch.share, batch.ghosts)
        )
        values = tf.cast(together, values.dtype)
    return tf.reshape(values, [-1])


def _stored(spec: BatchNormSpec, name: str) -> tf.DType:
    return tf.as_dtype(array_dtype(spec, name))
