"""Example weights and masks, in TensorFlow: checked, and as proportions of their total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bnlayer.call import CallPlan
from bnlayer.errors import InputError

from .ghosts import Ghosts


@dataclass(frozen=True, eq=False)
class Sums:
    """What weights add up to, relative to the largest of them, so that nothing overflows or vanishes; float64.

    Two sets of weights are put together from their sums (see `synchronized`).

    Attributes:
        largest: the largest weight, without gradient; 0 where none is positive.
        total: W over the largest.
        as_large: how many positions have the largest weight.
        others, squares: the sums of the other weights and of their squares, relative to the largest, without gradient.
    """

    largest: tf.Tensor
    total: tf.Tensor
    as_large: tf.Tensor
    others: tf.Tensor
    squares: tf.Tensor

    @property
    def freedom(self) -> tf.Tensor:
        """1 - Q/W^2, that is 1 - 1/n; exactly 0 where a single position has weight.

        With one position of largest weight set aside, W = 1 + R and W^2 - Q = 2 R + R^2 - Q_R, whose terms do not
        cancel: 1 - Q/W^2 itself would round to 0 under one dominant weight, and the unbiased variance to infinity.
        """
        more = tf.maximum(self.as_large - 1.0, 0.0)
        rest, squares = self.others + more, self.squares + more
        return (2.0 * rest + (tf.square(rest) - squares)) / tf.square(1.0 + rest)


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one call, or what the padding of its ghost batches amounts to.

    All tensors broadcast to x, or to x split into ghost batches, of which each has a W and a Q of its own; numbers are
    float64.

    Attributes:
        positive: whether a position has weight.
        proportions: w/W, so that they sum to 1 over all positions of a channel; all 0 where W is 0.
        any: whether W > 0.
        sums: what they add up to.
        share: W over the W of all ghost batches, without gradient; 0 where that is 0.
        valid: whether all are finite and not negative.
    """

    positive: tf.Tensor
    proportions: tf.Tensor
    any: tf.Tensor
    sums: Sums
    share: tf.Tensor
    valid: tf.Tensor


def read_weights(
    weights: tf.Tensor | None, plan: CallPlan, count: Any, ghosts: Ghosts | None, *, refuse: bool = True
) -> Weights | None:
    """Check the weights' values and relate them to their total.

    Args:
        weights: boolean or real, of the shape that `plan` accepted; None for none.
        plan: of the call.
        count: elements of x per channel, an integer or an int64 scalar.
        ghosts: of the call, or None.
        refuse: False leaves it to the caller to look at `valid`: replicas refuse together.

    Returns:
        None where every position counts the same: without weights, and without a ghost batch that has padding.

    Raises:
        InputError: a weight is negative, not finite, or not a real number. In a graph, values raise
            `tf.errors.InvalidArgumentError` when it runs; XLA drops such checks.
    """
    if weights is None and (ghosts is None or ghosts.even):
        return None
    rank = len(plan.channel_shape)
    if weights is None:
        values, valid = tf.ones([1] * rank, tf.float64), tf.constant(True)
    else:
        # There is one weight per position and not per element of x, so float64 costs little and Q/W^2 keeps its digits.
        values, valid = _values(weights, plan, refuse)
    if ghosts is not None:  # a weight that all rows share has to be there for each, for they part
        rows = tf.reshape(tf.cast(ghosts.rows, tf.int64), [1])
        values = tf.broadcast_to(values, tf.concat([rows, tf.shape(values, tf.int64)[1:]], 0))
    # How many positions of x one weight stands for: none in an empty batch, also where all rows would share it.
    spread = tf.cast(tf.cast(count, tf.int64) // tf.maximum(tf.size(values, tf.int64), 1), tf.float64)
    axes = tuple(range(rank))
    if ghosts is not None:
        values, axes = ghosts.split(values), tuple(i for i in range(rank + 1) if i != ghosts.axis)
    # Of an empty tensor it is -inf.
    largest = tf.maximum(tf.reduce_max(tf.stop_gradient(values), axes, keepdims=True), 0.0)
    largest = tf.where(spread > 0, largest, tf.zeros_like(largest))
    has_weight = largest > 0
    # Relative to the largest, neither the total nor the squares can overflow or vanish.
    relative = values / tf.where(has_weight, largest, tf.ones_like(largest))
    total = tf.reduce_sum(relative, axes, keepdims=True) * spread
    constant = tf.stop_gradient(relative)
    at_most = tf.equal(constant, 1.0)
    others = tf.where(at_most, tf.zeros_like(constant), constant)
    sums = Sums(
        largest=largest,
        total=total,
        as_large=tf.reduce_sum(tf.cast(at_most, constant.dtype), axes, keepdims=True) * spread,
        others=tf.reduce_sum(others, axes, keepdims=True) * spread,
        squares=tf.reduce_sum(tf.square(others), axes, keepdims=True) * spread,
    )
    return Weights(
        positive=values > 0,
        proportions=relative / tf.where(has_weight, total, tf.ones_like(total)),
        any=has_weight,
        sums=sums,
        share=_share(largest, tf.stop_gradient(total)),
        valid=valid,
    )


def checked_weights(weights: tf.Tensor, plan: CallPlan) -> tf.Tensor:
    """The weights as they broadcast to x, float64, where nothing is to be related to their total.

    Raises:
        InputError: see `read_weights`.
    """
    return _values(weights, plan, refuse=True)[0]


def _values(weights: tf.Tensor, plan: CallPlan, refuse: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """The weights as they broadcast to x, float64, and whether all are valid."""
    values = tf.cast(_aligned(_real(weights), plan), tf.float64)
    if weights.dtype.is_bool:
        return values, tf.constant(True)
    good = (values >= 0) & (values < float("inf"))
    valid = tf.reduce_all(good)
    return _checked(values, good, valid) if refuse else values, valid


def _share(largest: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
    """Each ghost batch's part of the weight of all; `total` is in units of its `largest`."""
    of_all = tf.reduce_max(largest)
    parts = largest / tf.where(of_all > 0, of_all, tf.ones_like(of_all)) * total
    whole = tf.reduce_sum(parts)
    return parts / tf.where(whole > 0, whole, tf.ones_like(whole))


def _real(weights: tf.Tensor) -> tf.Tensor:
    dtype = weights.dtype
    if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
        raise InputError(f"weights must be real or boolean; got {dtype.name}.")
    return weights


def _aligned(weights: tf.Tensor, plan: CallPlan) -> tf.Tensor:
    """The weights with the rank of x: what `plan.weights_shape` says, also where lengths are not known yet."""
    rank = len(plan.channel_shape)
    if weights.shape.rank == rank - 1:
        return tf.expand_dims(weights, plan.axis)
    while weights.shape.rank < rank:
        weights = tf.expand_dims(weights, -1)
    return weights


def _checked(values: tf.Tensor, good: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    if tf.executing_eagerly():
        if not bool(valid):
            raise InputError(
                f"weights must be finite and not negative; got {values[tf.math.logical_not(good)].numpy()[0]}."
            )
        return values
    check = tf.debugging.Assert(valid, ["weights must be finite and not negative; got", values])
    with tf.control_dependencies([check]):  # in a graph of TensorFlow 1 nothing else would run it
        return tf.identity(values)
