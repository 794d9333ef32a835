"""Which of their own implementations the originals would have chosen, and what depends on that choice.

Both originals hand some calls to a fused kernel and the rest to plain operations. The kernel stores the unbiased
variance (Bessel's correction) where the plain operations store the biased one; contrib's three implementations also
differ in the variables' dtype and order, and in what `trainable=False` stops. Checkpoints and trained statistics
depend on all of it, so the drop-ins follow. Measured on tf-slim 1.1.0 and tf.compat.v1.layers of TensorFlow 2.21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bnlayer.errors import UnsupportedError
from bnlayer.spec import Estimator


@dataclass(frozen=True)
class Path:
    """What depends on the implementation that the original would have run.

    Attributes:
        estimator: what enters the moving variance.
        dtype: of every variable.
        gamma_first: whether gamma is created before beta, so that it comes first in every collection.
        trainable_stops: whether `trainable=False` stops the moving statistics too.
        debias_is_model: whether the variables of zero-debiasing are model variables.
    """

    estimator: Estimator
    dtype: tf.DType
    gamma_first: bool
    trainable_stops: bool
    debias_is_model: bool = False


def layers_path(x: tf.Tensor, axis: int, *, fused: bool | None, special: bool) -> Path:
    """The path of `tf.layers.batch_normalization`.

    Args:
        x: the inputs.
        axis: of the channels.
        fused: as given; None and True ask for the kernel where it can be had.
        special: whether renorm, a virtual batch size or an adjustment keeps the kernel from being used.
    """
    rank = x.shape.rank
    can_fuse = rank in (4, 5) and axis % rank in (1, rank - 1) and x.dtype != tf.float64
    bessel = fused is not False and not special and can_fuse
    return Path("unbiased" if bessel else "biased", _wide(x), gamma_first=True, trainable_stops=True)


def contrib_path(
    x: tf.Tensor,
    axis: int,
    *,
    fused: bool | None,
    updates_collections: Any,
    weighted: bool,
    zero_debias: bool,
    renorm: bool,
    adjusted: bool,
) -> Path:
    """The path of `tf.contrib.layers.batch_norm`: its own kernel code, the core layer, or its own plain code.

    Raises:
        UnsupportedError: renorm is asked for together with what only the plain code does.
    """
    rank = x.shape.rank
    may_fuse = fused is not False and not weighted and not renorm and not adjusted
    beyond_core = zero_debias or updates_collections != tf.compat.v1.GraphKeys.UPDATE_OPS
    if may_fuse and (rank == 2 or (rank == 4 and beyond_core)):
        return Path("unbiased", _wide(x), gamma_first=False, trainable_stops=False)
    if not weighted and not beyond_core:
        return layers_path(x, axis, fused=fused, special=renorm or adjusted)
    if renorm:
        raise UnsupportedError(
            "renorm cannot be combined with batch_weights, zero_debias_moving_mean or other updates_collections than"
            " UPDATE_OPS. Leave one of the two out."
        )
    return Path("biased", x.dtype, gamma_first=False, trainable_stops=False, debias_is_model=True)


def _wide(x: tf.Tensor) -> tf.DType:
    return tf.float64 if x.dtype == tf.float64 else tf.float32
