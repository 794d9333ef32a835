"""How a batch's statistics enter TensorFlow 1's variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from .variables import Variables


@dataclass(frozen=True, eq=False)
class Batch:
    """What one batch brings, each of shape (C,).

    Attributes:
        mean: of the batch.
        variance: by the estimator of the layer.
        stddev: sqrt(biased variance + epsilon), for renorm; else None.
        present: whether there was an example at all, a boolean scalar; None where that is certain.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    stddev: tf.Tensor | None
    present: tf.Tensor | None


def update(
    variables: Variables, batch: Batch, decay: float | tf.Tensor, renorm_decay: float | tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Move the statistics; the new moving mean and moving variance, which exist once everything has moved."""
    if batch.stddev is not None:
        return _update_renorm(variables, batch, batch.stddev, decay, renorm_decay, epsilon)
    variance = _moved(variables.moving_variance, batch.variance, decay, batch)
    if variables.biased is not None:
        return _update_debiased(variables, batch, decay), variance
    return _moved(variables.moving_mean, batch.mean, decay, batch), variance


def _update_debiased(variables: Variables, batch: Batch, decay: float | tf.Tensor) -> tf.Tensor:
    """moving_mean = h / (1 - d^t), from the plain average h and the number t of updates that are in it."""
    one = tf.ones([], variables.local_step.dtype.base_dtype)
    step = one if batch.present is None else tf.cast(batch.present, one.dtype)
    hidden = _moved(variables.biased, batch.mean, decay, batch)
    updates = tf.cast(tf.convert_to_tensor(tf.compat.v1.assign_add(variables.local_step, step)), tf.float64)
    # 1 - d^t would lose its digits where d is near 1.
    seen = -tf.math.expm1(updates * tf.math.log(tf.cast(decay, tf.float64)))
    mean = tf.cast(tf.cast(hidden, tf.float64) / seen, hidden.dtype)
    if batch.present is not None:
        mean = tf.where(batch.present, mean, variables.moving_mean)
    return _assigned(variables.moving_mean, mean)


def _update_renorm(
    variables: Variables,
    batch: Batch,
    stddev: tf.Tensor,
    decay: float | tf.Tensor,
    renorm_decay: float | tf.Tensor,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    own = [
        _moved(variables.renorm_mean, batch.mean, renorm_decay, batch),
        _moved(variables.renorm_stddev, stddev, renorm_decay, batch),
    ]
    with tf.control_dependencies(own):
        mean = _moved(variables.moving_mean, batch.mean, decay, batch)
        moving_stddev = _moved(variables.moving_stddev, stddev, decay, batch)
        variance = tf.nn.relu(tf.square(moving_stddev) - tf.cast(epsilon, moving_stddev.dtype))
        if batch.present is not None:
            variance = tf.where(batch.present, variance, variables.moving_variance)
        return mean, _assigned(variables.moving_variance, variance)


def _moved(variable: Any, value: tf.Tensor, decay: float | tf.Tensor, batch: Batch) -> tf.Tensor:
    """The variable after d * old + (1 - d) * value, written as the subtraction (1 - d) * (old - value).

    A layer that is used twice in a graph moves twice in one run. Subtractions then both count, in either order; of two
    assignments that both read the same old value, one would be lost.
    """
    dtype = variable.dtype.base_dtype
    work = tf.float64 if tf.float64 in (dtype, value.dtype) else tf.float32
    new = tf.reshape(tf.cast(value, work), variable.shape)
    weight = tf.cast(1.0 - decay, work)
    step = tf.cast(weight * (tf.cast(variable, work) - new), dtype)
    if batch.present is not None:
        step = tf.where(batch.present, step, tf.zeros_like(step))
    return tf.convert_to_tensor(tf.compat.v1.assign_sub(variable, step))


def _assigned(variable: Any, value: tf.Tensor) -> tf.Tensor:
    return tf.convert_to_tensor(tf.compat.v1.assign(variable, tf.cast(value, variable.dtype.base_dtype)))
