"""Batch statistics, in NumPy.

Sums run in float64 whatever x is, so that float32 and half inputs lose nothing; the variance is the mean of squared
deviations from the mean, never E[x^2] - E[x]^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bnlayer.call import CallPlan

from .weights import Weights

NDArray = np.ndarray[Any, np.dtype[Any]]


class Moments(NamedTuple):
    """One batch's mean, biased and unbiased variance: float64, of the plan's `channel_shape`; its total weight."""

    mean: NDArray
    variance: NDArray
    unbiased: NDArray
    total: float


def batch_moments(x: NDArray, plan: CallPlan, weights: Weights | None) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over all axes but the channel's.

    x has at least one element a channel, and the weights a total above 0.
    """
    count = x.size // x.shape[plan.axis]
    if weights is not None:
        x = np.where((weights.values > 0) | np.isfinite(x), x, 0)  # anything may lie under a mask

    def mean(values: NDArray) -> NDArray:
        values = values if weights is None else values * weights.proportions
        total = np.asarray(np.sum(values, axis=plan.reduced, keepdims=True, dtype=np.float64))
        return total if weights is not None else total / count

    # The first mean is off by its rounding, c is what it missed: without it a constant channel would get a variance.
    shift = mean(x)
    deviation = x - shift
    c = mean(deviation)
    return completed(shift + c, mean(np.square(deviation - c)), weights, count)


def completed(mean: NDArray, variance: NDArray, weights: Weights | None, count: int) -> Moments:
    """The moments with this mean and biased variance, of `count` elements a channel."""
    concentration = 1.0 / count if weights is None else weights.concentration
    one_value = concentration >= 1.0
    unbiased = np.zeros_like(variance) if one_value else variance / (1.0 - concentration)
    return Moments(mean, variance, unbiased, float(count) if weights is None else weights.total)


def combined(parts: Sequence[Moments]) -> Moments:
    """What enters the averages for several ghost batches: the means of theirs, by their total weights."""
    if len(parts) == 1:
        return parts[0]
    largest = max(part.total for part in parts)
    shares = [part.total / largest for part in parts]  # the totals' sum could overflow

    def mean(values: Sequence[NDArray]) -> NDArray:
        weighted = [share * value for share, value in zip(shares, values, strict=True)]
        return np.asarray(sum(weighted[1:], weighted[0]) / sum(shares))

    return Moments(
        mean([part.mean for part in parts]),
        mean([part.variance for part in parts]),
        mean([part.unbiased for part in parts]),
        largest,
    )
