"""What callers give, as tensors of the arithmetic's dtype."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def number(value: Any, dtype: tf.DType) -> tf.Tensor:
    """A tensor, or what can become one, in this dtype. A bare `tf.cast` takes Python's numbers through float32."""
    return tf.cast(tf.convert_to_tensor(value, dtype_hint=dtype), dtype)


def per_channel(values: Any, shape: tuple[int, ...], dtype: tf.DType) -> tf.Tensor:
    """An array of the state, of shape (C,), as it broadcasts against x."""
    return tf.reshape(tf.cast(values, dtype), shape)


def at_least_one(number: Any) -> Any:
    """An integer or an int64 scalar, and 1 in place of 0."""
    return max(number, 1) if isinstance(number, int) else tf.maximum(number, tf.constant(1, tf.int64))


def elements(x: tf.Tensor) -> Any:
    """How many there are: an integer where the shape says it, else an int64 scalar."""
    number = x.shape.num_elements()
    return tf.size(x, tf.int64) if number is None else number
