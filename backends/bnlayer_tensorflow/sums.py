"""The path in closed form: few plain operations over few large sums, and the gradient's formula.

x is folded to two axes, so that per-channel values broadcast along whole rows or whole columns, and sums are matrix
products or run along contiguous rows; TensorFlow is slow at other broadcasts and reductions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import tensorflow as tf

from bnlayer.spec import BatchNormSpec

from .call import Call
from .derivatives import Tensors, differentiable
from .statistics import Moments, unbiased
from .tensors import at_least_one, elements, number

_NEAR: Final = 4.0  # standard deviations: u |m| gain is then at most 4 times the rounding of y itself
_NEAR_SQUARES: Final = 2.0  # standard deviations, see `_statistics`


@dataclass(frozen=True, eq=False)
class Fold:
    """How x becomes a matrix.

    Attributes:
        to: x, or what has its shape, as the matrix.
        back: the matrix in x's shape.
        total: of a matrix, the sums of each channel, of shape (C,).
        spread: what has shape (C,), to broadcast to the matrix.
    """

    to: Callable[[tf.Tensor], tf.Tensor]
    back: Callable[[tf.Tensor], tf.Tensor]
    total: Callable[[tf.Tensor], tf.Tensor]
    spread: Callable[[tf.Tensor], tf.Tensor]


def normalized(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, call: Call
) -> tuple[tf.Tensor, Moments | None]:
    """See `composite.normalized`."""
    spec, work, state = call.spec, call.work, call.state
    scale = tf.ones(spec.num_features, work) if gamma is None else gamma
    offset = tf.zeros(spec.num_features, work) if beta is None else beta
    if not call.plan.batch_statistics:
        mean, variance = (number(moving, work) for moving in (state.moving_mean, state.moving_variance))
        return _by_moving(x, mean, variance, scale, offset, spec), None
    y, shift, rest, variance = _by_batch(x, scale, offset, spec)
    freedom = 1.0 - 1.0 / tf.cast(at_least_one(call.count(x)), tf.float64)
    present = None if call.plan.count is not None else tf.size(x) > 0
    return y, Moments(shift, rest, variance, unbiased(variance, freedom), present)


def _by_moving(
    x: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, spec: BatchNormSpec
) -> tf.Tensor:
    """One product and one sum, which cost u |m| gain of accuracy; where that is much, the mean is subtracted before."""
    fold, _, epsilon = _fold(x, scale.dtype, spec)
    values, of_var = fold.to(tf.cast(x, scale.dtype)), variance + epsilon
    gain = scale / tf.sqrt(of_var)
    values, constant = tf.cond(
        tf.reduce_all(tf.square(mean) <= _NEAR**2 * of_var),
        lambda: (values, offset - mean * gain),
        lambda: (values - fold.spread(mean), offset),
    )
    return tf.cast(fold.back(values * fold.spread(gain) + fold.spread(constant)), x.dtype)


def _by_batch(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, spec: BatchNormSpec) -> tuple[tf.Tensor, ...]:
    """y, and the statistics: shift, rest and variance."""

    def forward(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tuple[Tensors, Tensors]:
        fold, n, epsilon = _fold(x, scale.dtype, spec)
        values = fold.to(tf.cast(x, scale.dtype))
        centered, shift, rest, variance = _statistics(values, fold, n)
        gain = scale / tf.sqrt(variance + epsilon)
        y = centered * fold.spread(gain) + fold.spread(offset - rest * gain)
        return (tf.cast(fold.back(y), x.dtype), shift, rest, variance), (centered, rest, variance)

    def backward(dy: tf.Tensor, kept: Tensors, *sources: tf.Tensor) -> Tensors:
        x, scale, _ = sources
        centered, rest, variance = kept
        fold, n, epsilon = _fold(x, scale.dtype, spec)
        along = fold.to(tf.cast(dy, scale.dtype))
        of_var = variance + epsilon
        doffset = fold.total(along)
        moment = fold.total(along * centered) - rest * doffset
        # dx = gain (dy - doffset/n - (x - m) moment/(n var)), of what was kept of x and in one new matrix
        slope = -moment / (n * of_var)
        constant = -doffset / n - slope * rest
        dx = (centered * fold.spread(slope) + fold.spread(constant) + along) * fold.spread(scale / tf.sqrt(of_var))
        return tf.cast(fold.back(dx), x.dtype), moment / tf.sqrt(of_var), doffset

    return differentiable(forward, backward, (x, scale, offset))


def _statistics(values: tf.Tensor, fold: Fold, n: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The matrix less the shift; shift, rest and variance.

    E[x^2] - m^2 needs no matrix of deviations that is kept, and is off by K u (m^2 + v): where |m| <= 2 sd, by 5 times
    what two passes are off by. Elsewhere, and where something is not finite, there are two passes.
    """
    mean = fold.total(values) / n

    def two_passes() -> tuple[tf.Tensor, ...]:
        shift = tf.stop_gradient(mean)
        centered = values - fold.spread(shift)
        rest = fold.total(centered) / n
        return centered, shift, rest, fold.total(tf.math.squared_difference(centered, fold.spread(rest))) / n

    variance = fold.total(tf.square(values)) / n - tf.square(mean)
    near = tf.reduce_all(tf.square(mean) <= _NEAR_SQUARES**2 * variance)
    results: tuple[tf.Tensor, ...] = tf.cond(near, lambda: (values, tf.zeros_like(mean), mean, variance), two_passes)
    for each, like in zip(results, (values, mean, mean, mean), strict=True):
        each.set_shape(like.shape)
    return results


def _fold(x: tf.Tensor, work: tf.DType, spec: BatchNormSpec) -> tuple[Fold, tf.Tensor, tf.Tensor]:
    """How x becomes a matrix, its elements per channel (at least 1), and epsilon."""
    rank, channels = x.shape.rank, spec.num_features
    axis = spec.axis % rank
    shape: Any = x.shape if x.shape.is_fully_defined() else tf.shape(x, tf.int64)
    count = elements(x) // channels

    def back(matrix: tf.Tensor) -> tf.Tensor:
        values = tf.reshape(matrix, shape)
        values.set_shape(x.shape)
        return values

    if axis == rank - 1:
        ones = tf.ones(tf.stack([1, count]), work)
        fold = Fold(
            to=lambda values: tf.reshape(values, (-1, channels)),
            back=back,
            total=lambda matrix: tf.reshape(ones @ matrix, (-1,)),
            spread=lambda values: values,
        )
    else:
        before, after = _product(shape[:axis]), _product(shape[axis + 1 :])
        fold = Fold(
            to=lambda values: tf.reshape(values, (before * channels, after)),
            back=back,
            total=lambda matrix: tf.reduce_sum(tf.reshape(tf.reduce_sum(matrix, 1), (-1, channels)), 0),
            spread=lambda values: tf.reshape(tf.tile(values, [before]), (-1, 1)),
        )
    return fold, tf.cast(at_least_one(count), work), tf.constant(spec.epsilon, work)


def _product(lengths: Any) -> Any:
    return tf.reduce_prod(lengths) if tf.is_tensor(lengths) else lengths.num_elements()
