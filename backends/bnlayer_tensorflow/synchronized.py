"""Batch statistics over all replicas of a `tf.distribute` strategy, with one collective forward and one backward."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from bnlayer.call import CallPlan, refuse_single_value
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec

from .statistics import Averaging, Moments, unbiased
from .weights import Sums, Weights

_INVALID = "weights must be finite and not negative on every replica; on at least one they are not."
_SCALARS = 7  # of a replica's row, before its three numbers per channel


def replicas_of(plan: CallPlan) -> tf.distribute.ReplicaContext | None:
    """The replica in which a synchronized call runs, or None where there is no other: outside `strategy.run`, under a
    strategy of one replica, and in what is not synchronized, which is eval too."""
    if not plan.synchronized:
        return None
    context = tf.distribute.get_replica_context()
    return None if context is None or context.num_replicas_in_sync == 1 else context


def merged_moments(
    x: tf.Tensor,
    hidden: tf.Tensor | None,
    plan: CallPlan,
    count: Any,
    weights: Weights | None,
    spec: BatchNormSpec,
    replica: tf.distribute.ReplicaContext,
) -> Moments:
    """m, v and u of `batch_moments`, over the batches of all replicas as if they were one.

    With f_k the weight of replica k over one unit for all, t_k its part of that (1, or 0 where it has none, with the
    gradient of its total weight), c_k its mean as a constant, T_k and S_k the first two moments around c_k:

        m = sum f_k (t_k c_k + T_k) / W
        v = sum f_k (S_k + 2 (c_k - m) T_k + t_k (c_k - m)^2) / W

    T_k is 0 up to rounding, but has the gradient of the mean: so the sums are exact for any c_k, and right to every
    order of differentiation, weights that are 0 on a whole replica included. (With T_k = 0 this is the pairwise update
    of Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983.)

    Args:
        x: in the plan's arithmetic; of any number of rows, also none.
        hidden: where x has no weight and is not finite; None: nowhere.
        plan: of the call.
        count: elements of x per channel on this replica, an integer or an int64 scalar.
        weights: of this replica, not yet checked, or None.
        spec: of the call.
        replica: of the strategy, see `replicas_of`.

    Raises:
        InputError: weights are invalid, or there is one value per channel on all replicas together. All replicas raise
            the same. In a graph they raise `tf.errors.InvalidArgumentError` when it runs; XLA drops such checks.
    """
    rows = _gathered(_row(x, hidden, plan, count, weights), replica)
    rows = _checked(rows, plan, count, weights, spec)
    largest, scale, part, as_large, others, squares, _ = tf.unstack(rows[:, :_SCALARS], axis=1)
    mean, first, second = tf.split(rows[:, _SCALARS:], 3, axis=1)

    top = tf.reduce_max(largest)
    present = top > 0
    unit = tf.where(present, top, tf.ones_like(top))
    # A replica without weight counts in units of 1, for its weights' gradient; the unit may be too small to divide by.
    own = tf.minimum(tf.where(largest > 0, largest, tf.ones_like(largest)) / unit, tf.float64.max)
    share = tf.expand_dims(own * scale, 1)
    part = tf.expand_dims(part, 1)
    total = tf.reduce_sum(share * part)
    total = tf.where(present, total, tf.ones_like(total))
    # Relative to one replica's mean, which in batches that are all the same constant is the mean of all, to the bit.
    near = tf.gather(mean, tf.argmax(tf.squeeze(share * part, 1)))
    away = mean - near
    rest = tf.reduce_sum(share * (part * away + first), 0) / total
    away -= rest
    variance = tf.reduce_sum(share * (second + 2.0 * away * first + part * tf.square(away)), 0) / total

    relative = largest / unit
    at_top = tf.equal(largest, top)
    sums = Sums(
        largest=top,
        total=total,
        as_large=tf.reduce_sum(tf.where(at_top, as_large, tf.zeros_like(as_large))),
        others=tf.reduce_sum(tf.where(at_top, others, relative * (as_large + others))),
        squares=tf.reduce_sum(tf.where(at_top, squares, tf.square(relative) * (as_large + squares))),
    )
    shift = tf.stop_gradient(tf.cast(near + rest, x.dtype))

    def shaped(values: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.cast(values, x.dtype), plan.channel_shape)

    v = shaped(variance)
    return Moments(
        shift=shaped(shift),
        rest=shaped(rest + (near - tf.cast(shift, tf.float64))),
        variance=v,
        unbiased=unbiased(v, sums.freedom),
        present=None if weights is None and plan.count else present,
    )


def _row(x: tf.Tensor, hidden: tf.Tensor | None, plan: CallPlan, count: Any, weights: Weights | None) -> tf.Tensor:
    """What the others have to know of this replica: (7 + 3 C,) numbers, as float64, which holds counts exactly."""
    n = tf.cast(count, tf.float64)
    some = tf.cast(n > 0, tf.float64)
    if weights is None:
        proportions = None
        scalars = [some, tf.maximum(n, 1.0), some, n, tf.zeros_like(n), tf.zeros_like(n)]
    else:
        total = tf.where(weights.any, weights.sums.total, tf.ones_like(weights.sums.total))
        scale = tf.stop_gradient(total)  # so that what is averaged is of the size of x, however many rows there are
        proportions = tf.cast(weights.proportions * (total / scale), x.dtype)
        sums = weights.sums
        scalars = [sums.largest, scale, sums.total / scale, sums.as_large, sums.others, sums.squares]
    # One number for both checks: how many elements there are, or -inf.
    scalars.append(n if weights is None else tf.where(weights.valid, n, tf.constant(-float("inf"), tf.float64)))

    averaging = Averaging(plan.reduced, hidden, proportions, tf.cast(tf.maximum(n, 1.0), x.dtype))
    shift, centered = averaging.centered(x)
    rest = tf.stop_gradient(averaging.mean(centered))
    deviation = centered - rest
    mean = tf.cast(shift, tf.float64) + tf.cast(rest, tf.float64)
    channels = [mean, averaging.mean(deviation), averaging.square(deviation)]
    return tf.concat([tf.reshape(tf.cast(each, tf.float64), [-1]) for each in (*scalars, *channels)], 0)


def _gathered(row: tf.Tensor, replica: tf.distribute.ReplicaContext) -> tf.Tensor:
    """Every replica's row, the same on all of them to the bit.

    As a sum, which every strategy has, differentiates (the gradient of an all-reduced sum is one again), and which is
    exact where all terms but one are 0. The replicas' own shapes differ, but not their rows'.
    """
    here = tf.equal(tf.range(replica.num_replicas_in_sync), tf.cast(replica.replica_id_in_sync_group, tf.int32))
    rows = tf.where(here[:, tf.newaxis], row[tf.newaxis], tf.zeros_like(row))
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, rows)


def _checked(rows: tf.Tensor, plan: CallPlan, count: Any, weights: Weights | None, spec: BatchNormSpec) -> tf.Tensor:
    """The rows, refused by all replicas alike: one that raised alone would leave the others waiting for it."""
    number = tf.reduce_sum(tf.stop_gradient(rows[:, _SCALARS - 1]))
    several = plan.count is not None and plan.count > 1  # then there are several in all, as each replica can tell
    single = spec.single_value == "raise" and not several
    if weights is None and not single:
        return rows
    whole = "batch of all replicas together"
    if tf.executing_eagerly():
        found = float(number)
        if found < 0:
            raise InputError(_INVALID)
        if single:
            refuse_single_value(spec, int(found), f"the {whole} has one", whole)
        return rows
    checks = [tf.debugging.Assert(number >= 0, [_INVALID])]
    if single:
        message = (
            f"batch statistics need more than one value per channel, and the {whole} has one. Give a larger batch."
        )
        checks.append(tf.debugging.Assert(tf.not_equal(number, 1.0), [message]))
    with tf.control_dependencies(checks):
        return tf.identity(rows)
