"""Batch renormalization's corrections, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnlayer.call import CallPlan, RenormClips
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .statistics import Moments

NDArray = np.ndarray[Any, np.dtype[Any]]


def corrections(
    state: BatchNormState[NDArray], batch: Moments, spec: BatchNormSpec, clips: RenormClips, plan: CallPlan
) -> tuple[NDArray, NDArray]:
    """r and d, which move a batch's normalization towards the averages; constants to the gradient.

    r = sd/den and d = (m - renorm_mean)/den, clipped, with den = max(renorm_stddev, sqrt(epsilon)) from the state
    before the update. Ioffe, "Batch Renormalization", 2017, with Keras's floor under den.

    Returns:
        float64 arrays of the plan's `channel_shape`.
    """
    assert state.renorm_mean is not None and state.renorm_stddev is not None
    mean = state.renorm_mean.astype(np.float64).reshape(plan.channel_shape)
    stddev = state.renorm_stddev.astype(np.float64).reshape(plan.channel_shape)
    den = np.maximum(stddev, np.sqrt(spec.epsilon))
    r = np.sqrt(batch.variance + spec.epsilon) / den
    d = (batch.mean - mean) / den
    if clips.r_min is not None:
        r = np.maximum(r, clips.r_min)
    if clips.r_max is not None:
        r = np.minimum(r, clips.r_max)
    if clips.d_max is not None:
        d = np.clip(d, -clips.d_max, clips.d_max)
    return r, d
