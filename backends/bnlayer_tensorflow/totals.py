"""Sums over the positions of each channel, where it is the last axis."""

from __future__ import annotations

from functools import cache
from math import isqrt

import tensorflow as tf

from .tensors import elements


def rows(x: tf.Tensor) -> tf.Tensor:
    """As a matrix with a row for each position."""
    return tf.reshape(x, (-1, x.shape[-1]))


def total(x: tf.Tensor) -> tf.Tensor:
    """The sums, of shape (C,): a product with ones, which is as fast as memory; TensorFlow's own sum is not."""
    values = rows(x)
    return tf.reshape(tf.ones(tf.stack([1, tf.shape(values)[0]]), x.dtype) @ values, (-1,))


def total_of_products(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The sums of a b, of shape (C,), for a and b of the same shape, with no tensor in between where lengths are known.

    That sum is the gradient of a depthwise convolution by its filter of one element, taken from k images of n/k places
    each. It adds up places one after the other, then images, so it is off by at most (k + n/k) u/2, relative to the sum
    of magnitudes: with n/4 <= k^2 <= n by 1.25 sqrt(n) u, however alike the terms are.
    """
    channels, count = a.shape[-1], elements(a) // a.shape[-1]
    images = _divisor(count) if isinstance(count, int) else 0
    if 4 * images**2 < count or not images:
        return total(a * b)
    a, b = (tf.reshape(each, (images, count // images, 1, channels)) for each in (a, b))
    found = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
        input=a, filter_sizes=(1, 1, channels, 1), out_backprop=b, strides=[1, 1, 1, 1], padding="VALID"
    )
    return tf.reshape(found, (-1,))


@cache
def _divisor(number: int) -> int:
    """Its largest divisor that is at most its square root; 0 of 0."""
    return max((k for k in range(1, isqrt(number) + 1) if number % k == 0), default=0)
