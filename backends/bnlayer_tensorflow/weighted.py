"""The path over the framework's own kernel where positions have weights: its inference applies what products sum.

Sums by weight are products with the row p = w/W. The mean is one, and another is the mean square, whose difference to
m^2 is off by K u (m^2 + v): where |m| <= 2 sd, by 5 times what the variance has to be off by. Elsewhere a second round
takes both of what is left of x without that mean. The squares do not wait for the weights to be related to their total.

Anything may lie under a mask. The products see 0 times it, which is 0 if it is finite, and so is its square; so where
all sums are finite nothing is amiss, and else the second round puts the mean in the place of what is hidden.
"""

from __future__ import annotations

from typing import Final

import tensorflow as tf

from . import kernel
from .call import Call
from .derivatives import Tensors, differentiable
from .statistics import Moments, unbiased
from .tensors import number
from .totals import rows, total, total_of_products
from .weights import checked_weights, read_weights

_NEAR: Final = 2.0  # standard deviations, as in `sums`


def by_moving(
    x: tf.Tensor,
    lengths: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    call: Call,
) -> tf.Tensor:
    """The eval formula. Weights are checked; they matter to the gradient alone, where what they hide is not finite.

    Args:
        x: of shape (N, H, W, C), float32 or half.
        lengths: of what x was folded from, without its channels.
        mean, variance, scale, offset: of shape (C,), float32.
        call: with the weights.
    """
    assert call.weights is not None
    weights = _column(checked_weights(call.weights, call.plan), lengths)
    gain = scale / tf.sqrt(variance + tf.constant(call.spec.epsilon, variance.dtype))

    def forward(x: tf.Tensor, mean: tf.Tensor, gain: tf.Tensor, offset: tf.Tensor) -> tuple[Tensors, Tensors]:
        constant = tf.stop_gradient(mean)
        return (kernel.affine(x, gain, offset - gain * (mean - constant), constant),), ()

    def backward(dy: tf.Tensor, kept: Tensors, *sources: tf.Tensor) -> Tensors:
        x, mean, gain, _ = sources
        values, along = tf.cast(rows(x), gain.dtype), tf.cast(rows(dy), gain.dtype)
        hidden = (weights <= 0) & tf.math.logical_not(tf.math.is_finite(values))
        deviation = tf.where(hidden, tf.zeros_like(values), values - mean)
        doffset = tf.reduce_sum(along, 0)
        dx = tf.reshape(tf.cast(along * gain, x.dtype), tf.shape(x))
        return dx, -gain * doffset, tf.reduce_sum(along * deviation, 0), doffset

    return differentiable(forward, backward, (x, mean, gain, offset))[0]


def by_batch(
    x: tf.Tensor, lengths: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, call: Call
) -> tuple[tf.Tensor, Moments]:
    """The training formula, and the eval formula where nothing has weight.

    Args:
        x: of shape (N, H, W, C), float32.
        lengths: of what x was folded from, without its channels.
        scale, offset: of shape (C,), float32.
        call: with the weights.
    """
    spec, state = call.spec, call.state
    count = call.plan.count if call.plan.count is not None else tf.size(x, tf.int64) // spec.num_features
    weights = read_weights(call.weights, call.plan, count, None)
    assert weights is not None and call.weights is not None
    learns = call.weights.dtype.is_floating
    present, epsilon = tf.reshape(weights.any, ()), tf.constant(spec.epsilon, x.dtype)
    proportions = tf.cast(weights.proportions, x.dtype)
    # Where nothing has weight they are 0, and no derivative leaves by them.
    proportions = tf.where(present, proportions, tf.zeros_like(proportions))
    proportions = tf.reshape(_column(proportions, lengths), (1, -1))
    positive = _column(weights.positive, lengths)
    moving_mean, moving_variance = tf.zeros_like(scale), tf.ones_like(scale)
    if spec.track_moving_stats:
        moving_mean, moving_variance = (number(each, x.dtype) for each in (state.moving_mean, state.moving_variance))

    def forward(x: tf.Tensor, p: tf.Tensor, *others: tf.Tensor) -> tuple[Tensors, Tensors]:
        scale, offset, moving_mean, moving_variance = others
        seen, clean, shift, rest, variance = _statistics(x, p, positive)
        mean, of_var = tf.where(present, rest, moving_mean), tf.where(present, variance, moving_variance) + epsilon
        # As operations too it has every derivative: forward mode looks at them.
        gain, constant = scale / tf.sqrt(of_var), tf.stop_gradient(mean)
        y = kernel.affine(seen, gain, offset - gain * (mean - constant), constant)
        return (y, shift, rest, variance), (clean, mean, of_var)

    def backward(dy: tf.Tensor, kept: Tensors, *sources: tf.Tensor) -> Tensors:
        _, p, scale, *_ = sources
        clean, mean, of_var = kept
        gain = scale / tf.sqrt(of_var)
        # In plain operations: what differentiates the kernel's own gradient is wrong inside of loops.
        doffset = total(dy)
        moment = total_of_products(dy, clean) - mean * doffset
        # dx = gain (dy - p (doffset + (x - m) moment/(v + epsilon)))
        steepness = moment / of_var
        along = kernel.affine(clean, steepness, doffset - steepness * mean, tf.zeros_like(mean))
        dx = (dy - tf.reshape(p, tf.concat([tf.shape(dy)[:-1], [1]], 0)) * along) * gain
        slope, level = gain * steepness, gain * doffset
        dp = tf.zeros_like(p)
        if learns:
            # For each position -sum over c of (x - m) level + ((x - m)^2 - v) slope/2, where the sum over p of the
            # second is 0: what all positions have in common does not matter to the weights.
            deviation = rows(clean) - mean
            each = tf.reduce_sum(deviation * (level + 0.5 * slope * deviation), 1) - 0.5 * tf.reduce_sum(
                slope * (of_var - epsilon)
            )
            dp = -tf.reshape(each, (1, -1))
        absent = 1.0 - tf.cast(present, gain.dtype)
        return dx, dp, moment / tf.sqrt(of_var), doffset, -absent * level, -0.5 * absent * slope

    sources = (x, proportions, scale, offset, moving_mean, moving_variance)
    y, shift, rest, variance = differentiable(forward, backward, sources)
    freedom = tf.reshape(weights.sums.freedom, ())
    return y, Moments(shift, rest, variance, unbiased(variance, freedom), weights.any)


def _statistics(x: tf.Tensor, p: tf.Tensor, positive: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """x less the shift; the same with the mean in place of what is hidden; shift, rest and variance.

    Args:
        x: of shape (N, H, W, C).
        p: of shape (1, N H W).
        positive: whether there is weight, of shape (N H W, 1).
    """
    values, column = rows(x), tf.reshape(p, (-1, 1))
    mean = tf.reshape(p @ values, (-1,))
    variance = tf.reshape(p @ tf.square(values), (-1,)) - tf.square(mean)
    finite = tf.reduce_all(tf.math.is_finite(variance))
    near = finite & tf.reduce_all(tf.square(mean) <= _NEAR**2 * variance)

    def shown(values: tf.Tensor) -> tf.Tensor:
        return tf.where(positive | tf.math.is_finite(rows(x)), values, tf.zeros_like(values))

    def again() -> tuple[tf.Tensor, ...]:
        shift = tf.stop_gradient(tf.reduce_sum(column * clean, 0))
        centered = shown(clean - shift)
        rest = tf.reduce_sum(column * centered, 0)
        deviation = centered - rest
        # Multiplied before it is squared: the square of what is hidden may overflow.
        return values - shift, centered, shift, rest, tf.reduce_sum(column * deviation * deviation, 0)

    # One after the other: forward mode does not find its way through one condition in another.
    clean = tf.cond(finite, lambda: values, lambda: shown(values))
    clean.set_shape(values.shape)
    seen, clean, shift, rest, variance = tf.cond(
        near, lambda: (values, clean, tf.zeros_like(mean), mean, variance), again
    )
    for each in (shift, rest, variance):
        each.set_shape(mean.shape)
    seen, clean = (tf.reshape(each, tf.shape(x)) for each in (seen, clean))
    for each in (seen, clean):
        each.set_shape(x.shape)
    return seen, clean, shift, rest, variance


def _column(values: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """One value for each row of channels, of what has one for each position or broadcasts to that."""
    return tf.reshape(tf.broadcast_to(values, tf.concat([lengths, [1]], 0)), (-1, 1))
