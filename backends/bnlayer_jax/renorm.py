"""Batch renormalization in JAX: the corrections r and d, and their clips.

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bnlayer.call import RenormClips, renorm_clips
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .statistics import Moments


def read_clips(spec: BatchNormSpec, given: Mapping[str, Any] | None) -> RenormClips:
    """The clips of one call, checked by their values too; traced ones are taken as they are.

    Raises:
        InputError: a clip is not a scalar, or is refused by `bnlayer.call.renorm_clips`.
    """
    numbers: dict[str, Any] = dict(given or {})
    for name, clip in numbers.items():
        if getattr(clip, "shape", ()) != ():
            raise InputError(f"a renorm clip is one number; {name} has shape {clip.shape}.")
        if hasattr(clip, "dtype") and not isinstance(clip, Tracer):
            numbers[name] = float(clip)
    return renorm_clips(spec, None if given is None else numbers)


def corrections(
    batch: Moments, state: BatchNormState[Any], spec: BatchNormSpec, clips: RenormClips, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """r = sd/renorm_stddev and d = (m - renorm_mean)/renorm_stddev of each group, clipped; they carry no gradient.

    Args:
        batch: the groups' statistics.
        state: before the update.
        spec: with renorm.
        clips: of this call.
        shape: of a per-channel array against the statistics.
    """
    dtype, stopped = batch.shift.dtype, jax.lax.stop_gradient
    mean = stopped(jnp.asarray(state.renorm_mean, dtype).reshape(shape))
    stddev = jnp.maximum(stopped(jnp.asarray(state.renorm_stddev, dtype).reshape(shape)), spec.epsilon**0.5)
    r = jnp.sqrt(stopped(batch.variance) + spec.epsilon) / stddev
    d = ((batch.shift - mean) + stopped(batch.rest)) / stddev
    if clips.r_min is not None:
        r = jnp.maximum(r, _number(clips.r_min, r))
    if clips.r_max is not None:
        r = jnp.minimum(r, _number(clips.r_max, r))
    if clips.d_max is not None:
        d_max = _number(clips.d_max, d)
        d = jnp.clip(d, -d_max, d_max)
    return r, d


def _number(clip: Any, like: jax.Array) -> jax.Array:
    """The clip in the dtype of what it clips, without a gradient."""
    return jax.lax.stop_gradient(jnp.asarray(clip, like.dtype))
