"""Batch statistics and the moving average, in NumPy.

Sums run in float64 whatever x is, so that float32 and half inputs lose nothing; the variance is the mean of squared
deviations from the mean, never E[x^2] - E[x]^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype

from .weights import Weights

NDArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Moments:
    """One batch's mean, biased and unbiased variance: float64, of the plan's `channel_shape`."""

    mean: NDArray
    variance: NDArray
    unbiased: NDArray


def batch_moments(x: NDArray, plan: CallPlan, weights: Weights | None) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over all axes but the channel's.

    x has at least one element a channel, and the weights a total above 0.
    """
    if weights is not None:
        x = np.where((weights.values > 0) | np.isfinite(x), x, 0)  # anything may lie under a mask

    def mean(values: NDArray) -> NDArray:
        values = values if weights is None else values * weights.proportions
        total: NDArray = values.sum(axis=plan.reduced, keepdims=True, dtype=np.float64)
        return total if weights is not None else total / plan.count

    concentration = 1.0 / (plan.count or 1) if weights is None else weights.concentration
    # The first mean is off by its rounding, c is what it missed: without it a constant channel would get a variance.
    shift = mean(x)
    deviation = x - shift
    c = mean(deviation)
    variance = mean(np.square(deviation - c))
    one_value = concentration >= 1.0
    unbiased = np.zeros_like(variance) if one_value else variance / (1.0 - concentration)
    return Moments(shift + c, variance, unbiased)


def updated(
    state: BatchNormState[NDArray], batch: Moments, spec: BatchNormSpec, plan: CallPlan
) -> BatchNormState[NDArray]:
    """The state after one batch's statistics entered it."""
    assert state.moving_mean is not None and state.moving_variance is not None
    t = int(state.num_updates) + 1
    decay = 1.0 - 1.0 / t if spec.decay == "cumulative" else float(spec.decay)
    variance = batch.unbiased if spec.moving_variance_estimator == "unbiased" else batch.variance
    keep = np.zeros(spec.num_features, bool)
    if spec.nonfinite == "keep":
        # Finite in the arithmetic that the spec prescribes, not in the wider one that the sums run in.
        m, v = batch.mean.astype(plan.arithmetic), batch.variance.astype(plan.arithmetic)
        keep = ~(np.isfinite(m) & np.isfinite(v)).reshape(-1)

    def average(name: str, old: NDArray, new: NDArray) -> NDArray:
        moved = decay * old.astype(np.float64) + (1.0 - decay) * new.reshape(-1)
        return np.where(keep, old, moved.astype(array_dtype(spec, name)))

    return state.replace(
        moving_mean=average("moving_mean", state.moving_mean, batch.mean),
        moving_variance=average("moving_variance", state.moving_variance, variance),
        num_updates=t,
    )
