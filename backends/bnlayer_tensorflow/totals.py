"""Sums over the positions of each channel, where it is the last axis."""

from __future__ import annotations

from functools import cache
from math import gcd, isqrt
from typing import Any, Final

import tensorflow as tf

from .tensors import elements

_WIDE: Final = 2**13  # channels side by side, whose sums stay in a core's cache


def rows(x: tf.Tensor) -> tf.Tensor:
    """As a matrix with a row for each position."""
    return tf.reshape(x, (-1, x.shape[-1]))


def total(x: tf.Tensor) -> tf.Tensor:
    """The sums, of shape (C,): products with ones, which are as fast as memory; TensorFlow's own sum is not.

    One product adds up one position after the other, and would drift on many that are alike; see `_parts`.
    """
    channels, parts = x.shape[-1], _parts(x)
    if parts is not None:
        sums = tf.ones((parts[0], 1, parts[1]), x.dtype) @ tf.reshape(x, (*parts, channels))
        return tf.reshape(tf.ones((1, parts[0]), x.dtype) @ tf.reshape(sums, (parts[0], channels)), (-1,))
    values = rows(x)
    return tf.reshape(tf.ones(tf.stack([1, tf.shape(values)[0]]), x.dtype) @ values, (-1,))


def total_of_products(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The sums of a b, of shape (C,), for a and b of the same shape.

    They are the gradient of a depthwise convolution by its filter of one element, of which there is no tensor in
    between. It adds up one position after the other, so k of them side by side are taken for one with k C channels: the
    sums are off by at most n/(2 k) u, relative to that of magnitudes, which is 2 sqrt(n) u at the most.
    """
    channels: Any = a.shape[-1]
    count = elements(a) // channels
    k = gcd(count, max(_WIDE // channels, 1)) if isinstance(count, int) else 0
    if not k or count // k > 4 * isqrt(count):
        return total(a * b)
    number = max(i for i in range(1, 9) if count // k % i == 0)  # images are what cores share
    images = (tf.reshape(each, (number, -1, 1, k * channels)) for each in (a, b))
    found = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
        input=next(images), filter_sizes=(1, 1, k * channels, 1), out_backprop=next(images), strides=[1, 1, 1, 1],
        padding="VALID",
    )  # fmt: skip
    return total(tf.reshape(found, (k, channels)))


def _parts(x: tf.Tensor) -> tuple[int, int] | None:
    """k and n/k, for n positions; None where n is not known, or has no divisor near its square root.

    Sums within each part, and then of the parts, are off by at most (k + n/k) u/2, relative to the sum of magnitudes:
    with n/4 <= k^2 <= n by 1.25 sqrt(n) u, however alike the terms are.
    """
    count = elements(x) // x.shape[-1]
    k = _divisor(count) if isinstance(count, int) else 0
    return (k, count // k) if k and 4 * k**2 >= count else None


@cache
def _divisor(number: int) -> int:
    """Its largest divisor that is at most its square root; 0 of 0."""
    return max((k for k in range(1, isqrt(number) + 1) if number % k == 0), default=0)
