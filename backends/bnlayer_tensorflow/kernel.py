"""TensorFlow's fused kernel, with its own derivatives, kept accurate for any data.

`FusedBatchNormV3` takes the mean, then the mean square of the deviations, then y, without a tensor in between. Its mean
is off by K u sqrt(m^2 + v), as any sum is. That is as much as may be, but far from 0 it is many times what it has to
be: so where a sample says that the mean dominates, a shift near it is subtracted first. A sample that misleads costs
digits, and no more than that bound.

Where XLA compiles the operation, unseen by whoever traced it (a function inside of another one's `jit_compile`, a saved
model), its variance is E[x^2] - E[x]^2, off by K u (m^2 + v), which is too much already at |m| = 2 sd. A probe tells;
the mean of all is subtracted there.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import tensorflow as tf

from .derivatives import Tensors, differentiable
from .tensors import at_least_one

_ROWS: Final = 64  # of a sample, or up to twice as many
# |m| <= 4 sd costs the mean at most 4 times the error that it has at m = 0.
_NEAR: Final = 4.0


def by_batch(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, count: Any) -> tuple[tf.Tensor, ...]:
    """Normalize by the batch's statistics.

    Args:
        x: of shape (N, H, W, C), float32.
        scale, offset: of shape (C,), float32.
        epsilon: added to the variance.
        count: N H W, an integer or an integer scalar.

    Returns:
        y, of x's shape; shift and rest, whose sum is the mean; the biased and the unbiased variance, which are 0 of a
        single element. Only y has a gradient.
    """
    moved, shift = _near(x, count, (0, 1, 2))
    return _normalized(moved, tf.reshape(shift, (-1,)), scale, offset, epsilon, count)


def by_ghosts(
    x: tf.Tensor, axis: int, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, count: Any
) -> tuple[tf.Tensor, ...]:
    """Normalize each ghost batch by its own statistics: a kernel for each, after one look at all of them.

    Args:
        x: of shape (G, 1, M, C) or (M, G, L, C), float32.
        axis: that of the ghost batches.
        scale, offset: of shape (C,), float32.
        epsilon: added to the variance.
        count: of each ghost batch, an integer or an integer scalar.

    Returns:
        as `by_batch`, the statistics of shape (G, C).
    """
    number: Any = x.shape[axis]
    moved, shift = _near(x, count * number, tuple(i for i in range(3) if i != axis))
    shifts = tf.unstack(tf.reshape(shift, (number, -1)))
    parts = zip(tf.split(moved, number, axis), shifts, strict=True)
    ys, *statistics = zip(*(_normalized(*part, scale, offset, epsilon, count) for part in parts), strict=True)
    return tf.concat(ys, axis), *(tf.stack(each) for each in statistics)


def _normalized(
    x: tf.Tensor, shift: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, count: Any
) -> tuple[tf.Tensor, ...]:
    """What `by_batch` returns, of x less the shift."""
    y, rest, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=scale, offset=offset, mean=tf.zeros(0), variance=tf.zeros(0), epsilon=epsilon
    )
    n = tf.cast(at_least_one(count), tf.float64)
    biased = unbiased * tf.cast(tf.maximum(n - 1.0, 1.0) / n, tf.float32)
    return y, shift, *(tf.stop_gradient(each) for each in (rest, biased, unbiased))


def by_given(
    x: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float
) -> tf.Tensor:
    """(x - mean) scale/sqrt(variance + epsilon) + offset, for x of shape (N, H, W, C) and the others of (C,).

    With a gradient by formula: TensorFlow's derivative of the kernel's own gradient is wrong inside of a graph's loop.
    """
    gain = scale / tf.sqrt(variance + tf.constant(epsilon, variance.dtype))

    def forward(x: tf.Tensor, mean: tf.Tensor, gain: tf.Tensor, offset: tf.Tensor) -> tuple[Tensors, Tensors]:
        return (affine(x, gain, offset, mean),), ()

    def backward(dy: tf.Tensor, kept: Tensors, *sources: tf.Tensor) -> Tensors:
        x, mean, gain, _ = sources
        values, along = (tf.reshape(tf.cast(each, gain.dtype), (-1, gain.shape[0])) for each in (x, dy))
        ones = tf.ones(tf.stack([1, tf.shape(values)[0]]), gain.dtype)
        doffset = tf.reshape(ones @ along, (-1,))
        dgain = tf.reshape(ones @ (along * (values - mean)), (-1,))
        dx = tf.reshape(tf.cast(along * gain, x.dtype), tf.shape(x))
        return dx, -gain * doffset, dgain, doffset

    return differentiable(forward, backward, (x, mean, gain, offset))[0]


def affine(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, origin: tf.Tensor) -> tf.Tensor:
    """(x - origin) scale + offset, in one pass; the origin is a constant, or another one has taken the derivative.

    The kernel's variance is 1, and the factor in its scale. Right to first order, and to second where the origin is 0.
    """
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=scale, offset=offset, mean=origin, variance=tf.fill(origin.shape, 0.5), epsilon=0.5,
        is_training=False,
    )[0]  # fmt: skip


def _near(x: tf.Tensor, count: Any, axes: tuple[int, ...]) -> tuple[tf.Tensor, tf.Tensor]:
    """x, or x less a shift where that is to be subtracted; and the shift, with the axes of one batch kept as 1."""
    near, shift = _shift(tf.stop_gradient(x), count, axes)
    # Either way x's gradient is what comes in: a branch that did not use x would cost zeros of its size.
    moved = tf.cond(near, lambda: x, lambda: x - shift)
    moved.set_shape(x.shape)
    return moved, shift


def _shift(x: tf.Tensor, count: Any, axes: tuple[int, ...]) -> tuple[tf.Tensor, tf.Tensor]:
    """Whether 0 is near enough to each channel's mean, and what to subtract."""
    shape = [1 if i in axes else length for i, length in enumerate(x.shape)]
    values = tf.reshape(x, (-1, x.shape[-1]))
    step = at_least_one(count // _ROWS)
    # An odd step: images have even sides, and an even one would meet the same columns again and again.
    sample = tf.gather(values, tf.range(0, count, step + 1 - step % 2))
    mean = tf.reduce_mean(sample, 0)
    # m^2 > 16 v, said without deviations, which would take longer; a digit is enough.
    far = tf.square(mean) > _NEAR**2 / (_NEAR**2 + 1.0) * tf.reduce_mean(tf.square(sample), 0)
    safe = _two_pass(values)

    def of_sample() -> tf.Tensor:
        # Deviations from a constant channel's own value are 0; from what its sum was rounded to, they are not.
        value = sample[0]
        variance = tf.reduce_mean(tf.math.squared_difference(sample, mean), 0)
        near = tf.where(tf.square(value - mean) <= 4.0 * variance, value, mean)
        return tf.broadcast_to(tf.where(far, near, tf.zeros_like(near)), shape)

    def of_all() -> tf.Tensor:
        shift = tf.reduce_mean(x, axes, keepdims=True)
        return tf.where(tf.math.is_finite(shift), shift, tf.zeros_like(shift))

    near = safe & tf.math.logical_not(tf.reduce_any(far))
    shift = tf.cond(near, lambda: tf.zeros(shape), lambda: tf.cond(safe, of_sample, of_all))
    shift.set_shape(shape)
    return near, tf.stop_gradient(shift)


def _two_pass(values: tf.Tensor) -> tf.Tensor:
    """Whether the kernel subtracts the mean before it squares, where it runs now.

    On a CPU it does, but not under XLA, where an integer shifted by as many bits as it has is 0. TensorFlow's own
    operation shifts by at most one less, and the lowest bit, which is set, becomes the highest. On a GPU the kernel
    itself tells; on a CPU that takes it longer than all else here together. Either answer depends on the data, so that
    nobody computes it ahead of time on another device.
    """
    if on_cuda():
        return _measured(values)
    bits = tf.bitcast(values[:1, :1], tf.int32) | 1
    return tf.reduce_all(tf.bitwise.left_shift(bits, 32) != 0)


def _measured(values: tf.Tensor) -> tf.Tensor:
    """`_two_pass`, by the kernel's variance of three numbers of which two are equal, and the third differs by 1.

    It is 1/3 if unbiased. Their squares are near 1e8, where float32 knows multiples of 8. Which two are equal depends
    on the data.
    """
    one = tf.cast(tf.reduce_any(values[:1, :1] > 0.0), tf.float32)
    probe = tf.reshape(1e4 + tf.stack([0.0, 1.0, one]), (3, 1, 1, 1))
    _, _, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=probe, scale=[1.0], offset=[0.0], mean=tf.zeros(0), variance=tf.zeros(0), epsilon=1.0
    )
    return tf.abs(variance[0] - 1.0 / 3.0) < 0.1


@cache
def on_cuda() -> bool:
    """Whether the kernel may be placed on a GPU."""
    return bool(tf.config.list_physical_devices("GPU"))
