"""One batch, or ghost batch, by the formulas as they are written: forward, and the analytic backward.

`bnlayer_numpy.blocked` computes the same, faster; this is what it must agree with, and what computes the calls, and the
data, that it does not take.
"""

from __future__ import annotations

import numpy as np

from bnlayer.call import CallPlan

from .cache import Cache, NDArray, Part, PartGradients, per_channel
from .weights import Weights, summed


def output(cache: Cache, part: Part) -> NDArray:
    """y = gamma ((xhat r + d) s + b) + beta, of the part's rows, in the plan's arithmetic."""
    y = _corrected(cache, part, _normalized(cache, part))
    if cache.gamma is not None:
        y *= per_channel(cache.gamma, cache.plan)
    if cache.beta is not None:
        y += per_channel(cache.beta, cache.plan)
    return y


def gradients(cache: Cache, part: Part, dy: NDArray) -> tuple[NDArray, PartGradients]:
    """dx, and what this part adds to the other gradients; see `batch_norm_backward`."""
    plan, spec = cache.plan, cache.spec
    gamma = np.ones(plan.channel_shape) if cache.gamma is None else per_channel(cache.gamma, plan, np.float64)
    dy = dy.astype(plan.arithmetic)
    xhat = _normalized(cache, part)
    if part.weights is not None:
        # A masked position may hold anything; what is not finite there must not reach the sums.
        xhat = np.where((part.weights.values > 0) | np.isfinite(xhat), xhat, 0)
    scale = _adjustment(cache, part)[0]
    g = dy if scale is None else dy * scale
    s1, s2 = _total(g, plan), _total(g * xhat, plan)
    dgamma = _total(dy * _corrected(cache, part, xhat), plan)
    through = g if part.proportions is None else g - part.proportions * (s1 + xhat * s2)
    factor = gamma * part.r
    dx = factor / np.sqrt(part.variance + spec.epsilon) * through
    dweights = None
    if part.weights is not None and part.proportions is not None and cache.weights_are_real:
        dweights = _dweights(cache, part, part.weights, factor, xhat, s1, s2)
    return dx, PartGradients(dgamma.reshape(-1), _total(dy, plan).reshape(-1), dweights)


def _normalized(cache: Cache, part: Part) -> NDArray:
    """(x - mean) / sqrt(variance + eps) of the part's rows, at every position, in the plan's arithmetic."""
    scaled = (cache.x[part.rows] - part.mean) / np.sqrt(part.variance + cache.spec.epsilon)
    return scaled.astype(cache.plan.arithmetic)


def _corrected(cache: Cache, part: Part, xhat: NDArray) -> NDArray:
    """(xhat r + d) s + b: what gamma scales."""
    if cache.spec.renorm is not None:
        xhat = (xhat * part.r + part.d).astype(xhat.dtype)
    scale, bias = _adjustment(cache, part)
    return xhat if scale is None or bias is None else xhat * scale + bias


def _adjustment(cache: Cache, part: Part) -> tuple[NDArray, NDArray] | tuple[None, None]:
    """The adjustment in the plan's arithmetic, where the batch's statistics normalize; it goes with no ghosts."""
    if cache.adjustment is None or part.proportions is None:
        return None, None
    scale, bias = cache.adjustment
    return scale.astype(cache.plan.arithmetic), bias.astype(cache.plan.arithmetic)


def _dweights(
    cache: Cache, part: Part, w: Weights, factor: NDArray, xhat: NDArray, s1: NDArray, s2: NDArray
) -> NDArray:
    ratio = part.variance / (part.variance + cache.spec.epsilon)
    at_positions = -factor * (xhat * s1 + 0.5 * (np.square(xhat, dtype=np.float64) - ratio) * s2) / w.total
    return summed(at_positions, w)


def _total(values: NDArray, plan: CallPlan) -> NDArray:
    return np.asarray(np.sum(values, axis=plan.reduced, keepdims=True, dtype=np.float64))
