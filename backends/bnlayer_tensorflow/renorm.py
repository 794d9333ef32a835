"""Batch renormalization's corrections, in TensorFlow.

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017.
"""

from __future__ import annotations

import tensorflow as tf

from bnlayer.call import RenormClips

from .tensors import number


def corrections(
    shift: tf.Tensor,
    rest: tf.Tensor,
    variance: tf.Tensor,
    *,
    mean: tf.Tensor,
    stddev: tf.Tensor,
    epsilon: float,
    clips: RenormClips,
) -> tuple[tf.Tensor, tf.Tensor]:
    """r = sd/den and d = (m - renorm_mean)/den, clipped, with den = max(renorm_stddev, sqrt(epsilon)); no gradient.

    Args:
        shift, rest, variance: the statistics that normalize, as in `Moments`.
        mean, stddev: the renorm averages before the update, to broadcast against the batch's statistics.
        epsilon: the spec's.
        clips: of this call; numbers or scalar tensors.
    """
    floor = tf.constant(epsilon, mean.dtype)
    den = tf.maximum(stddev, tf.sqrt(floor))
    r = tf.sqrt(variance + floor) / den
    d = ((shift - mean) + rest) / den
    if clips.r_min is not None:
        r = tf.maximum(r, number(clips.r_min, r.dtype))
    if clips.r_max is not None:
        r = tf.minimum(r, number(clips.r_max, r.dtype))
    if clips.d_max is not None:
        d_max = number(clips.d_max, d.dtype)
        d = tf.clip_by_value(d, -d_max, d_max)
    return tf.stop_gradient(r), tf.stop_gradient(d)
