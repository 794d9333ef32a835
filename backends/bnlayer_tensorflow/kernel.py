"""TensorFlow's fused kernel, with its own derivatives, kept accurate for any data.

`FusedBatchNormV3` takes the mean, then the mean square of the deviations, then y, without a tensor in between. Its mean
is off by K u sqrt(m^2 + v), as any sum is. That is as much as may be, but far from 0 it is many times what it has to
be: so where it says itself that a mean dominates, it is called once more, of x less a shift near that mean.

Where XLA compiles the operation, unseen by whoever traced it (a function inside of another one's `jit_compile`, a saved
model), its variance is E[x^2] - E[x]^2, off by K u (m^2 + v), which is too much already at |m| = 2 sd. A probe tells;
the mean of all is subtracted there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any, Final

import tensorflow as tf

from .derivatives import Tensors, differentiable
from .tensors import at_least_one
from .totals import rows, total, total_of_products

# |m| <= 4 sd costs the mean at most 4 times the error that it has at m = 0.
_NEAR: Final = 4.0
_NEAR_SQUARES: Final = 2.0  # as in `sums`


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
    y, *statistics = _by_kernels(x, 1, 0, scale, offset, epsilon, count)
    return y, *(tf.reshape(each, (-1,)) for each in statistics)


def by_corrected(
    x: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    epsilon: float,
    count: Any,
    corrections: Callable[..., tuple[tf.Tensor, tf.Tensor]],
) -> tuple[tf.Tensor, ...]:
    """Normalize by the batch's statistics, and correct that: scale (xhat r + d) + offset, with r and d constant.

    Not for a GPU, whose kernel's gradient wants to know something else.

    Args:
        x: of shape (N, H, W, C), float32.
        scale, offset: of shape (C,), float32.
        epsilon: added to the variance.
        count: N H W, an integer or an integer scalar.
        corrections: of shift, rest and biased variance, each of shape (C,): r and d.

    Returns:
        as `by_batch`.
    """

    def forward(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tuple[Tensors, Tensors]:
        moved, shift, rest, variance = _by_sums(x, count)
        r, d = corrections(shift, rest, variance)
        y = affine(moved, scale * r / tf.sqrt(variance + tf.constant(epsilon)), offset + scale * d, rest)
        return (y, shift, rest, variance), (moved, rest, variance, r, d)

    def backward(dy: tf.Tensor, kept: Tensors, *sources: tf.Tensor) -> Tensors:
        moved, rest, variance, r, d = kept
        dx, dgain, doffset = _gradient(dy, moved, sources[1] * r, epsilon, *_reserved(rest, variance))
        return dx, r * dgain + d * doffset, doffset

    y, shift, rest, biased = differentiable(forward, backward, (x, scale, offset))
    return y, shift, rest, biased, biased / _freedom(count)


def by_ghosts(
    x: tf.Tensor, axis: int, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, count: Any
) -> tuple[tf.Tensor, ...]:
    """Normalize each ghost batch by its own statistics: a kernel for each, and one look at what all of them found.

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
    return _by_kernels(x, number, axis, scale, offset, epsilon, count)


def _by_kernels(
    x: tf.Tensor, number: int, axis: int, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, count: Any
) -> tuple[tf.Tensor, ...]:
    """What `by_ghosts` returns, of so many equal parts on this axis."""

    def forward(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tuple[Tensors, Tensors]:
        def called(parts: Tensors) -> list[list[tf.Tensor]]:
            return [list(_called(part, scale, offset, epsilon)) for part in parts]

        given, safe = _apart(x, number, axis), _two_pass(x)
        first = called(given)
        means, variances = ([each[i] for each in first] for i in (1, 2))
        # Where a variance is off because the mean is, it is far less than that mean's square. What is not finite is not
        # far: nothing would help it.
        far = tf.square(tf.stack(means)) > _NEAR**2 * tf.stack(variances)
        near = safe & tf.math.logical_not(tf.reduce_any(far))

        def shifts() -> Tensors:
            return [_shift(*each, safe) for each in zip(given, means, variances, strict=True)]

        moved, shift = _moved(near, given, [tf.zeros_like(scale)] * number, shifts)
        found = tf.cond(near, lambda: first, lambda: called(moved))
        ys, rests, variances, *reserved = map(list, zip(*found, strict=True))
        if not reserved:
            reserved = [rests, [each * _freedom(count) for each in variances], [tf.zeros(0)] * number]
        return (_together(ys, axis), *map(tf.stack, (shift, rests, variances))), [*moved, *chain(*reserved)]

    def backward(dy: tf.Tensor, kept: Tensors, *sources: tf.Tensor) -> Tensors:
        moved, *reserved = (kept[i : i + number] for i in range(0, 4 * number, number))
        each = zip(_apart(dy, number, axis), moved, *reserved, strict=True)
        found = [_gradient(along, part, sources[1], epsilon, *of_one) for along, part, *of_one in each]
        dxs, dscales, doffsets = zip(*found, strict=True)
        return _together(dxs, axis), tf.add_n(dscales), tf.add_n(doffsets)

    y, shift, rest, unbiased = differentiable(forward, backward, (x, scale, offset))
    return y, shift, rest, unbiased * _freedom(count), unbiased


def _apart(x: tf.Tensor, number: int, axis: int) -> Tensors:
    parts: Tensors = [x] if number == 1 else tf.split(x, number, axis)
    return parts


def _together(parts: Tensors, axis: int) -> tf.Tensor:
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis)


def _by_sums(x: tf.Tensor, count: Any) -> tuple[tf.Tensor, ...]:
    """x, or x less the shift; shift, rest and biased variance, of shape (C,), without gradient.

    E[x^2] - E[x]^2 is off by K u (m^2 + v): where every |m| <= 2 sd, by 5 times what two passes are off by. Elsewhere
    the kernel takes them.
    """
    n = tf.cast(at_least_one(count), tf.float32)
    mean = total(x) / n
    variance = total_of_products(x, x) / n - tf.square(mean)
    near = tf.reduce_all(tf.square(mean) <= _NEAR_SQUARES**2 * variance)
    ones = tf.ones_like(mean)

    def called(x: tf.Tensor) -> list[tf.Tensor]:
        _, mean, unbiased, *_ = _called(x, ones, ones, 1.0)
        return [mean, unbiased * _freedom(count)]

    def shifts() -> Tensors:
        mean, variance = called(x)
        return [_shift(x, mean, variance, _two_pass(x))]

    [moved], [shift] = _moved(near, [x], [tf.zeros_like(mean)], shifts)
    rest, variance = tf.cond(near, lambda: [mean, variance], lambda: called(moved))
    return moved, shift, rest, variance


def _called(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, ...]:
    """The kernel: y, the mean, the unbiased variance, and on a GPU the three that its gradient needs."""
    found: tuple[tf.Tensor, ...] = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=scale, offset=offset, mean=tf.zeros(0), variance=tf.zeros(0), epsilon=epsilon
    )
    if on_cuda():
        return found
    # In a map over no element, as a condition's branch may be, the kernel is wrong about its results' shapes.
    return found[0], *(tf.reshape(each, scale.shape) for each in found[1:3])


def _gradient(dy: tf.Tensor, x: tf.Tensor, scale: tf.Tensor, epsilon: float, *reserved: tf.Tensor) -> Tensors:
    """The kernel's gradients of x, scale and offset."""
    one, two, three = reserved
    found: Tensors = tf.raw_ops.FusedBatchNormGradV3(
        y_backprop=dy, x=x, scale=scale, reserve_space_1=one, reserve_space_2=two, reserve_space_3=three,
        epsilon=epsilon,
    )[:3]  # fmt: skip
    return found


def _reserved(mean: tf.Tensor, variance: tf.Tensor) -> Tensors:
    """What the kernel's gradient needs on a CPU."""
    return mean, variance, tf.zeros(0)


def _freedom(count: Any) -> tf.Tensor:
    """1 - 1/n, and 1 of a single element."""
    n = tf.cast(at_least_one(count), tf.float64)
    return tf.cast(tf.maximum(n - 1.0, 1.0) / n, tf.float32)


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


def _moved(near: tf.Tensor, parts: Tensors, none: Tensors, shifts: Callable[[], Tensors]) -> tuple[Tensors, Tensors]:
    """The parts, or where 0 is not near the parts less their shifts; and the shifts, or none, without gradient."""
    found = [tf.stop_gradient(each) for each in tf.cond(near, lambda: none, shifts)]
    # Either way x's gradient is what comes in: a branch that did not use x would cost zeros of its size.
    moved = tf.cond(near, lambda: parts, lambda: [part - each for part, each in zip(parts, found, strict=True)])
    for part, like in zip(moved, parts, strict=True):
        part.set_shape(like.shape)
    return moved, found


def _shift(x: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, safe: tf.Tensor) -> tf.Tensor:
    """What to subtract: the mean, or a value of x that is near it.

    Deviations from a constant channel's own value are 0; from what its sum was rounded to, they are not.
    """
    value = tf.reduce_sum(rows(x)[:1], 0)  # 0 of an empty batch
    close = safe & (tf.square(value - mean) <= 4.0 * variance)
    shift = tf.where(close, value, mean)
    return tf.where(tf.math.is_finite(shift), shift, tf.zeros_like(shift))


def _two_pass(x: tf.Tensor) -> tf.Tensor:
    """Whether the kernel subtracts the mean before it squares, where it runs now.

    On a CPU it does, but not under XLA, where an integer shifted by as many bits as it has is 0. TensorFlow's own
    operation shifts by at most one less, and the lowest bit, which is set, becomes the highest. On a GPU the kernel
    itself tells; on a CPU that takes it longer than all else here together. Either answer depends on the data, so that
    nobody computes it ahead of time on another device.
    """
    if on_cuda():
        return _measured(x)
    bits = tf.bitcast(rows(x)[:1, :1], tf.int32) | 1
    return tf.reduce_all(tf.bitwise.left_shift(bits, 32) != 0)


def _measured(x: tf.Tensor) -> tf.Tensor:
    """`_two_pass`, by the kernel's variance of three numbers of which two are equal, and the third differs by 1.

    It is 1/3 if unbiased. Their squares are near 1e8, where float32 knows multiples of 8. Which two are equal depends
    on the data.
    """
    one = tf.cast(tf.reduce_any(rows(x)[:1, :1] > 0.0), tf.float32)
    probe = tf.reshape(1e4 + tf.stack([0.0, 1.0, one]), (3, 1, 1, 1))
    _, _, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=probe, scale=[1.0], offset=[0.0], mean=tf.zeros(0), variance=tf.zeros(0), epsilon=1.0
    )
    return tf.abs(variance[0] - 1.0 / 3.0) < 0.1


@cache
def on_cuda() -> bool:
    """Whether the kernel may be placed on a GPU."""
    return bool(tf.config.list_physical_devices("GPU"))
