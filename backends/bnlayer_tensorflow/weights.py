"""Example weights and masks, in TensorFlow: checked, and as proportions of their total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bnlayer.call import CallPlan
from bnlayer.errors import InputError


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one call; every number is a float64 tensor.

    Attributes:
        positive: whether a position has weight, broadcastable to x.
        proportions: w/W, so that they sum to 1 over all positions of a channel; all 0 where W is 0.
        any: whether W > 0, a scalar.
        freedom: 1 - Q/W^2, that is 1 - 1/n, a scalar without gradient; exactly 0 where a single position has weight.
    """

    positive: tf.Tensor
    proportions: tf.Tensor
    any: tf.Tensor
    freedom: tf.Tensor


def read_weights(weights: tf.Tensor, plan: CallPlan, count: Any) -> Weights:
    """Check the weights' values and relate them to their total.

    Args:
        weights: boolean or real, of the shape that `plan` accepted.
        plan: of the call.
        count: elements of x per channel, an integer or an int64 scalar.

    Raises:
        InputError: a weight is negative, not finite, or not a real number. In a graph, values raise
            `tf.errors.InvalidArgumentError` when it runs; XLA drops such checks.
    """
    dtype = weights.dtype
    if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        raise InputError(f"weights must be real or boolean; got {dtype.name}.")
    # There is one weight per position and not per element of x, so float64 costs little and Q/W^2 keeps its digits.
    values = tf.cast(_aligned(weights, plan), tf.float64)
    _check(values)
    largest = tf.reduce_max(tf.concat([tf.reshape(tf.stop_gradient(values), [-1]), tf.zeros(1, tf.float64)], 0))
    has_weight = largest > 0
    # Relative to the largest, neither the total nor the squares can overflow or vanish.
    relative = values / tf.where(has_weight, largest, tf.ones_like(largest))
    size = tf.size(values, tf.int64)
    # How many positions of x one weight stands for; nothing comes of an empty batch, but no division by 0 either.
    spread = tf.cast(tf.maximum(tf.cast(count, tf.int64) // tf.maximum(size, 1), 1), tf.float64)
    total = tf.reduce_sum(relative) * spread
    proportions = relative / tf.where(has_weight, total, tf.ones_like(total))
    return Weights(
        positive=values > 0,
        proportions=proportions,
        any=has_weight,
        freedom=_freedom(tf.stop_gradient(relative), spread),
    )


def _freedom(relative: tf.Tensor, spread: tf.Tensor) -> tf.Tensor:
    """1 - Q/W^2 for weights whose largest is 1, each of which stands for `spread` positions.

    With one position of largest weight set aside, W = 1 + R and W^2 - Q = 2 R + R^2 - Q_R, whose terms do not cancel:
    1 - Q/W^2 itself would round to 0 under one dominant weight, and the unbiased variance to infinity.
    """
    flat = tf.reshape(relative, [-1])
    first = tf.argmax(tf.concat([flat, tf.zeros(1, tf.float64)], 0))  # of an empty one there is no argmax
    others = tf.where(tf.equal(tf.range(tf.size(flat, tf.int64)), first), tf.zeros_like(flat), flat)
    rest = tf.reduce_sum(others) * spread + (spread - 1.0)
    squares = tf.reduce_sum(tf.square(others)) * spread + (spread - 1.0)
    return (2.0 * rest + (tf.square(rest) - squares)) / tf.square(1.0 + rest)


def _aligned(weights: tf.Tensor, plan: CallPlan) -> tf.Tensor:
    """The weights with the rank of x: what `plan.weights_shape` says, also where lengths are not known yet."""
    rank = len(plan.channel_shape)
    if weights.shape.rank == rank - 1:
        return tf.expand_dims(weights, plan.axis)
    while weights.shape.rank < rank:
        weights = tf.expand_dims(weights, -1)
    return weights


def _check(values: tf.Tensor) -> None:
    good = (values >= 0) & (values < float("inf"))
    if tf.executing_eagerly():
        if not bool(tf.reduce_all(good)):
            raise InputError(
                f"weights must be finite and not negative; got {values[tf.math.logical_not(good)].numpy()[0]}."
            )
    else:
        tf.debugging.Assert(tf.reduce_all(good), ["weights must be finite and not negative; got", values])
