"""The path that computes everything: plain operations, so that autodiff is right to every order and in either mode."""

from __future__ import annotations

import tensorflow as tf

from .call import Call
from .ghosts import ghosts_of
from .normalization import Normalizer, adjusted, by_batch, by_moving, chosen, transform
from .statistics import Moments, batch_moments
from .synchronized import merged_moments
from .tensors import per_channel
from .weights import read_weights


def normalized(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, call: Call
) -> tuple[tf.Tensor, Moments | None]:
    """y, and the batch's statistics where the plan wants them.

    Args:
        x: of any of the four dtypes.
        gamma, beta: of shape (C,), or None.
        call: with the weights.
    """
    plan, work, count = call.plan, call.work, call.count(x)
    ghosts = ghosts_of(x, plan, call.spec)
    channel_shape = plan.channel_shape if ghosts is None else (1, *plan.channel_shape)
    values = tf.cast(x, work) if ghosts is None else ghosts.split(tf.cast(x, work))
    w = read_weights(call.weights, plan, count, ghosts, refuse=call.replica is None)
    # Padding has no weight, but is finite.
    hidden = None if call.weights is None or w is None else tf.math.logical_not(w.positive | tf.math.is_finite(values))

    batch = None

    def moving() -> Normalizer:
        return by_moving(call.state, channel_shape, work)

    if plan.batch_statistics and (plan.count != 0 or call.replica is not None):  # the others wait for an empty one too
        if call.replica is None:
            batch = batch_moments(values, hidden, plan, count, ghosts, w)
        else:
            batch = merged_moments(values, hidden, plan, count, w, call.spec, call.replica)
        of_batch = by_batch(batch, call.state, call.spec, call.clips, channel_shape)
        if call.adjustment is not None:
            of_batch = adjusted(of_batch, *call.adjustment)
        by = of_batch if batch.present is None else chosen(batch.present, of_batch, moving())
    else:
        by = moving()

    centered = values - by.shift
    if hidden is not None:
        # Anything may lie under a mask. What is not finite there must not reach the sums of the backward pass, so
        # the computation sees the mean in its place, and y gets back what the formula gives there.
        centered = _substituted(centered, hidden, by.rest)
    gain = None if gamma is None else per_channel(gamma, channel_shape, work)
    offset = None if beta is None else per_channel(beta, channel_shape, work)
    y = transform(centered - by.rest, by, call.spec, gain, offset)
    if hidden is not None:
        y = _substituted(y, hidden, transform(values, by, call.spec, gain, offset))
    if ghosts is not None:
        y = ghosts.join(y)
        y.set_shape(x.shape)
    return tf.cast(y, x.dtype), batch


def _substituted(values: tf.Tensor, where: tf.Tensor, by: tf.Tensor) -> tf.Tensor:
    """Other values at some positions, with the gradient of the ones that were there."""
    by = tf.stop_gradient(by)
    return tf.grad_pass_through(lambda kept: tf.where(where, by, kept))(values)
