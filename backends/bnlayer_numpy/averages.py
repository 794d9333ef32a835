"""How one batch's statistics enter the moving ones, in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype

from .statistics import Moments

NDArray = np.ndarray[Any, np.dtype[Any]]


def updated(
    state: BatchNormState[NDArray], batch: Moments, spec: BatchNormSpec, plan: CallPlan
) -> BatchNormState[NDArray]:
    """The state after one batch's statistics entered it: every average in float64, rounded once to `stats_dtype`."""
    t = int(state.num_updates) + 1
    decay = 1.0 - 1.0 / t if spec.decay == "cumulative" else float(spec.decay)
    mean, variance = batch.mean.reshape(-1), batch.variance.reshape(-1)
    entering = batch.unbiased.reshape(-1) if spec.moving_variance_estimator == "unbiased" else variance

    def average(old: NDArray | None, new: NDArray, decay: float = decay) -> NDArray:
        assert old is not None
        return decay * old.astype(np.float64) + (1.0 - decay) * new

    after: dict[str, NDArray] = {}
    if spec.renorm is not None:
        stddev = np.sqrt(variance + spec.epsilon)
        after["renorm_mean"] = average(state.renorm_mean, mean, spec.renorm.decay)
        after["renorm_stddev"] = average(state.renorm_stddev, stddev, spec.renorm.decay)
        after["moving_mean"] = average(state.moving_mean, mean)
        # renorm averages the deviation, and eval's variance follows from it.
        after["moving_stddev"] = average(state.moving_stddev, stddev)
        after["moving_variance"] = np.maximum(np.square(after["moving_stddev"]) - spec.epsilon, 0.0)
    else:
        # The share of an average from 0 that is data: 1 - decay**t, which that form would round to few digits.
        started = -math.expm1(t * math.log(decay)) if decay > 0 and spec.zero_debias != "none" else 1.0
        if spec.zero_debias == "none":
            after["moving_mean"] = average(state.moving_mean, mean)
        else:
            after["hidden_mean"] = average(state.hidden_mean, mean)
            after["moving_mean"] = after["hidden_mean"] / started
        if spec.zero_debias == "all":
            after["hidden_variance"] = average(state.hidden_variance, entering)
            after["moving_variance"] = after["hidden_variance"] / started
        else:
            after["moving_variance"] = average(state.moving_variance, entering)
    rounded = {name: values.astype(array_dtype(spec, name)) for name, values in after.items()}
    if spec.nonfinite == "keep":
        kept = _not_finite(batch, plan)
        rounded = {name: np.where(kept, getattr(state, name), values) for name, values in rounded.items()}
    # Not `replace`, whose checks take a small batch as long as ten of these operations.
    return BatchNormState(**{**vars(state), **rounded, "num_updates": t})


def _not_finite(batch: Moments, plan: CallPlan) -> NDArray:
    """The channels whose batch statistics are not finite."""
    # Finite in the arithmetic that the spec prescribes, not in the wider one that the sums run in.
    m, v = batch.mean.astype(plan.arithmetic), batch.variance.astype(plan.arithmetic)
    return np.asarray(~(np.isfinite(m) & np.isfinite(v)).reshape(-1))
