"""The formula of y, in TensorFlow, whatever its statistics and corrections come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import tensorflow as tf

from bnlayer.call import RenormClips
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .renorm import corrections
from .statistics import Moments
from .tensors import number, per_channel


@dataclass(frozen=True, eq=False)
class Normalizer:
    """What makes y beside gamma and beta, in the arithmetic's dtype; all of it broadcasts to x.

    Attributes:
        shift, rest: the mean is their sum; x - shift is exact where the mean is far from 0.
        variance: biased.
        r, d: renorm's corrections; None for 1 and 0.
        scale, bias: the adjustment; None for 1 and 0.
    """

    shift: tf.Tensor
    rest: tf.Tensor
    variance: tf.Tensor
    r: tf.Tensor | None = None
    d: tf.Tensor | None = None
    scale: tf.Tensor | None = None
    bias: tf.Tensor | None = None


def by_moving(state: BatchNormState[tf.Tensor], shape: tuple[int, ...], work: tf.DType) -> Normalizer:
    """The eval formula from the moving statistics; mean 0 and variance 1 where none are tracked."""
    zero = tf.zeros(shape, work)
    if state.moving_mean is None or state.moving_variance is None:
        return Normalizer(zero, zero, tf.ones(shape, work))
    mean, variance = (per_channel(moving, shape, work) for moving in (state.moving_mean, state.moving_variance))
    return Normalizer(mean, zero, variance)


def by_batch(
    batch: Moments, state: BatchNormState[tf.Tensor], spec: BatchNormSpec, clips: RenormClips, shape: tuple[int, ...]
) -> Normalizer:
    """The training formula from the batch's statistics, corrected where the spec has renorm."""
    if spec.renorm is None:
        return Normalizer(batch.shift, batch.rest, batch.variance)
    mean = per_channel(state.renorm_mean, shape, batch.shift.dtype)
    stddev = per_channel(state.renorm_stddev, shape, batch.shift.dtype)
    r, d = corrections(
        batch.shift, batch.rest, batch.variance, mean=mean, stddev=stddev, epsilon=spec.epsilon, clips=clips
    )
    return Normalizer(batch.shift, batch.rest, batch.variance, r=r, d=d)


def adjusted(by: Normalizer, scale: tf.Tensor, bias: tf.Tensor) -> Normalizer:
    """The same, with an adjustment of the normalized values."""
    return replace(by, scale=number(scale, by.shift.dtype), bias=number(bias, by.shift.dtype))


def chosen(present: tf.Tensor, batch: Normalizer, moving: Normalizer) -> Normalizer:
    """The batch's, and the moving one where nothing was present to take statistics of."""

    def either(new: tf.Tensor | None, old: float) -> tf.Tensor | None:
        return None if new is None else tf.where(present, new, tf.constant(old, new.dtype))

    return Normalizer(
        shift=tf.where(present, batch.shift, moving.shift),
        rest=tf.where(present, batch.rest, moving.rest),
        variance=tf.where(present, batch.variance, moving.variance),
        r=either(batch.r, 1.0),
        d=either(batch.d, 0.0),
        scale=either(batch.scale, 1.0),
        bias=either(batch.bias, 0.0),
    )


def transform(
    deviation: tf.Tensor, by: Normalizer, spec: BatchNormSpec, gamma: tf.Tensor | None, beta: tf.Tensor | None
) -> tf.Tensor:
    """gamma ((xhat r + d) scale + bias) + beta, of the deviation from the mean."""
    stddev = tf.sqrt(by.variance + tf.constant(spec.epsilon, by.variance.dtype))
    gain = tf.ones_like(stddev) if gamma is None else gamma
    # Once per channel, and not per element: gamma r / sd.
    y = deviation * ((gain if by.r is None else gain * by.r) / stddev)
    if by.d is not None:
        y += gain * by.d
    if by.scale is not None and by.bias is not None:
        y = y * by.scale + gain * by.bias
    return y if beta is None else y + beta
