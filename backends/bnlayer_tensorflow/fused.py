"""The path over the framework's own kernel: channels last, float32 or half."""

from __future__ import annotations

from functools import partial

import tensorflow as tf

from . import kernel, weighted
from .call import Call
from .ghosts import ghosts_of
from .renorm import corrections
from .statistics import Moments
from .tensors import elements, number


def normalized(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, call: Call
) -> tuple[tf.Tensor, Moments | None]:
    """See `composite.normalized`."""
    spec, state = call.spec, call.state
    scale = tf.ones(spec.num_features) if gamma is None else gamma
    offset = tf.zeros(spec.num_features) if beta is None else beta
    flat = x if x.shape.rank == 4 else tf.reshape(x, (-1, 1, 1, spec.num_features))
    batch = None
    if call.weights is not None:
        y, batch = _by_weights(x, flat, scale, offset, call)
    elif call.plan.ghosted:
        y, batch = _by_ghosts(x, scale, offset, call)
    elif call.plan.batch_statistics:
        values = tf.cast(flat, tf.float32)
        count = elements(x) // spec.num_features
        present = None if call.plan.count is not None else tf.size(x) > 0
        if spec.renorm is None:
            y, *found = kernel.by_batch(values, scale, offset, spec.epsilon, count)
        else:
            mean, stddev = (number(each, tf.float32) for each in (state.renorm_mean, state.renorm_stddev))
            correct = partial(corrections, mean=mean, stddev=stddev, epsilon=spec.epsilon, clips=call.clips)
            y, *found = kernel.by_corrected(values, scale, offset, spec.epsilon, count, correct)
        shift, rest, variance, unbiased = found
        batch = Moments(shift, rest, variance, unbiased, present)
    else:
        mean, variance = (number(moving, tf.float32) for moving in (state.moving_mean, state.moving_variance))
        y = kernel.by_given(flat, mean, variance, scale, offset, spec.epsilon)
    y = tf.cast(y, x.dtype)
    if y.shape.rank != x.shape.rank or call.plan.ghosted:
        y = tf.reshape(y, x.shape if x.shape.is_fully_defined() else tf.shape(x, tf.int64))
    y.set_shape(x.shape)
    return y, batch


def _by_weights(
    x: tf.Tensor, flat: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, call: Call
) -> tuple[tf.Tensor, Moments | None]:
    lengths = tf.shape(x)[:-1]
    if call.plan.batch_statistics:
        return weighted.by_batch(tf.cast(flat, tf.float32), lengths, scale, offset, call)
    mean, variance = (number(each, tf.float32) for each in (call.state.moving_mean, call.state.moving_variance))
    return weighted.by_moving(flat, lengths, mean, variance, scale, offset, call), None


def _by_ghosts(x: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, call: Call) -> tuple[tf.Tensor, Moments]:
    ghosts = ghosts_of(x, call.plan, call.spec)
    assert ghosts is not None
    lengths = (ghosts.size, ghosts.number, -1) if ghosts.strided else (ghosts.number, 1, -1)
    values = tf.reshape(tf.cast(x, tf.float32), (*lengths, call.spec.num_features))
    count = elements(x) // (call.spec.num_features * ghosts.number)
    present = None if call.plan.count is not None else tf.size(x) > 0
    y, shift, rest, variance, unbiased = kernel.by_ghosts(values, ghosts.axis, scale, offset, call.spec.epsilon, count)
    return y, Moments(shift, rest, variance, unbiased, present, ghosts=0)
