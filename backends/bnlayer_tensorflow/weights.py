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
        concentration: Q/W^2, that is 1/n, a scalar.
        single: whether exactly one position of a channel has weight, so that n is 1 without a rounding.
    """

    positive: tf.Tensor
    proportions: tf.Tensor
    any: tf.Tensor
    concentration: tf.Tensor
    single: tf.Tensor


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
    spread = tf.cast(count, tf.int64) // tf.maximum(size, 1)  # positions of x that one weight stands for
    total = tf.reduce_sum(relative) * tf.cast(spread, tf.float64)
    proportions = relative / tf.where(has_weight, total, tf.ones_like(total))
    positive = values > 0
    return Weights(
        positive=positive,
        proportions=proportions,
        any=has_weight,
        concentration=tf.reduce_sum(tf.square(proportions)) * tf.cast(spread, tf.float64),
        single=tf.equal(tf.math.count_nonzero(positive) * spread, 1),
    )


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
