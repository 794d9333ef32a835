"""`batch_norm` for TensorFlow: one composite of plain operations, so that autodiff is right to every order."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from bnlayer.call import CallPlan, plan_call
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .statistics import Moments, batch_moments, updated
from .support import MISSING
from .weights import read_weights


def batch_norm(
    x: tf.Tensor,
    state: BatchNormState[tf.Tensor],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: tf.Tensor | None = None,
    update_stats: bool = True,
) -> tuple[tf.Tensor, BatchNormState[tf.Tensor]]:
    """Normalize x and update the moving statistics; eagerly, in a `tf.function`, and under `jit_compile`.

    Lengths of x may be unknown in a graph, its rank and its channel count may not. What then depends on them (an
    empty batch, one value per channel) is decided when the graph runs.

    Args:
        x: float16, bfloat16, float32 or float64, of rank 2 or more, `spec.num_features` long on `spec.axis`.
        state: parameters and moving statistics as tensors, variables or numpy arrays; not modified.
        spec: what the layer is.
        training: batch statistics if True, moving ones if False; a Python boolean.
        weights: mask or weights of shape (N,), x's shape without the channel axis, or with 1 on it; at least 0.
            Real ones get a gradient, boolean and integer ones do not.
        update_stats: False: batch statistics normalize, but the state is returned as it came.

    Returns:
        y, of x's shape and dtype, and the state after: `state` itself where nothing can enter it, else new tensors,
        which carry no gradient; `num_updates` is an int64 scalar.

    Raises:
        InputError: x or the weights do not fit the spec. Negative or non-finite weights, and one value per channel
            where only the running graph can tell, raise `tf.errors.InvalidArgumentError`; XLA drops such checks.
        UnsupportedError: the spec asks for what this backend lacks.
    """
    MISSING.refuse("tensorflow", spec)
    x = tf.convert_to_tensor(x)
    given = None if weights is None else tf.convert_to_tensor(weights)
    plan = plan_call(
        spec,
        _lengths("x", x),
        x.dtype.name,
        training=training,
        update_stats=update_stats,
        weights_shape=None if given is None else _lengths("weights", given),
    )
    count = _count(x, plan, spec)
    work = tf.as_dtype(plan.arithmetic)
    values = tf.cast(x, work)
    w = None if given is None else read_weights(given, plan, count)
    hidden = None if w is None else tf.math.logical_not(w.positive | tf.math.is_finite(values))

    after = state
    shift, rest, variance = _moving(state, plan, work)
    if plan.batch_statistics and plan.count != 0:
        batch = batch_moments(values, hidden, plan, count, w)
        if plan.update:
            after = updated(state, batch, plan, spec)
        shift, rest, variance = _chosen(batch, shift, rest, variance)

    centered = values - shift
    if hidden is not None:
        # Anything may lie under a mask. What is not finite there must not reach the sums of the backward pass, so
        # the computation sees the mean in its place, and y gets back what the formula gives there.
        centered = _substituted(centered, hidden, rest)
    gain, offset = _parameter(state.gamma, plan, work), _parameter(state.beta, plan, work)
    scale = (1.0 if gain is None else gain) / tf.sqrt(variance + tf.constant(spec.epsilon, work))
    y = (centered - rest) * scale
    if offset is not None:
        y += offset
    if hidden is not None:
        y = _substituted(y, hidden, values * scale)
    return tf.cast(y, x.dtype), after


def _chosen(batch: Moments, shift: tf.Tensor, rest: tf.Tensor, variance: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The batch's statistics, or the moving ones where nothing has weight: then y comes by the eval formula."""
    if batch.present is None:
        return batch.shift, batch.rest, batch.variance
    return (
        tf.where(batch.present, batch.shift, shift),
        tf.where(batch.present, batch.rest, rest),
        tf.where(batch.present, batch.variance, variance),
    )


def _moving(state: BatchNormState[tf.Tensor], plan: CallPlan, work: tf.DType) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The moving statistics as shift, rest and variance; mean 0 and variance 1 where none are tracked."""
    zero = tf.zeros(plan.channel_shape, work)
    mean, variance = _parameter(state.moving_mean, plan, work), _parameter(state.moving_variance, plan, work)
    return zero if mean is None else mean, zero, tf.ones_like(zero) if variance is None else variance


def _parameter(values: Any, plan: CallPlan, work: tf.DType) -> tf.Tensor | None:
    return None if values is None else tf.reshape(tf.cast(values, work), plan.channel_shape)


def _substituted(values: tf.Tensor, where: tf.Tensor, by: tf.Tensor) -> tf.Tensor:
    """Other values at some positions, with the gradient of the ones that were there."""
    by = tf.stop_gradient(by)
    return tf.grad_pass_through(lambda kept: tf.where(where, by, kept))(values)


def _count(x: tf.Tensor, plan: CallPlan, spec: BatchNormSpec) -> Any:
    """Elements per channel: an integer where the shape says it, else an int64 scalar, checked when the graph runs."""
    if plan.count is not None:
        return plan.count
    count = tf.reduce_prod(tf.gather(tf.shape(x, tf.int64), plan.reduced))
    if plan.batch_statistics and spec.single_value == "raise":
        tf.debugging.assert_none_equal(
            count,
            tf.constant(1, tf.int64),
            message="batch statistics need more than one value per channel. Give a larger batch, call with"
            " training=False, or build the layer with single_value='allow'.",
        )
    return count


def _lengths(what: str, tensor: tf.Tensor) -> list[int | None]:
    if tensor.shape.rank is None:
        raise InputError(f"{what} must have a known rank in a graph; give it one with tf.ensure_shape.")
    lengths: list[int | None] = tensor.shape.as_list()
    return lengths
