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
