"""`batch_norm` for NumPy: forward, and the analytic backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnlayer.call import CallPlan, plan_call
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype

from .statistics import batch_moments, updated
from .support import MISSING
from .weights import Weights, read_weights

NDArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Cache:
    """What the backward pass needs of one forward pass. `proportions` is None where the moving statistics
    normalized: then x reaches y directly only."""

    x: NDArray
    gamma: NDArray | None
    mean: NDArray
    variance: NDArray
    proportions: NDArray | float | None
    weights: Weights | None
    weights_dtype: np.dtype[Any] | None
    weights_given: tuple[int, ...] | None
    plan: CallPlan
    spec: BatchNormSpec


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one call: `dx` like x; `dgamma`, `dbeta` (C,) of `param_dtype`, None where the spec has no such
    parameter; `dweights` like the weights, None without weights or for a mask."""

    dx: NDArray
    dgamma: NDArray | None
    dbeta: NDArray | None
    dweights: NDArray | None


def batch_norm(
    x: NDArray,
    state: BatchNormState[NDArray],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: NDArray | None = None,
    update_stats: bool = True,
) -> tuple[NDArray, BatchNormState[NDArray]]:
    """Normalize x and update the moving statistics.

    Args:
        x: float array of rank 2 or more, `spec.num_features` long on `spec.axis`.
        state: parameters and moving statistics; not modified.
        spec: what the layer is.
        training: batch statistics if True, moving ones if False.
        weights: mask or weights of shape (N,), x's shape without the channel axis, or with 1 on it; at least 0.
        update_stats: False: batch statistics normalize, but the state is returned as it came.

    Returns:
        y, of x's shape and dtype, and the state after.

    Raises:
        InputError: x or the weights do not fit the spec.
        UnsupportedError: the spec asks for what this backend lacks.
    """
    y, after, _ = batch_norm_forward(x, state, spec, training=training, weights=weights, update_stats=update_stats)
    return y, after


def batch_norm_forward(
    x: NDArray,
    state: BatchNormState[NDArray],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: NDArray | None = None,
    update_stats: bool = True,
) -> tuple[NDArray, BatchNormState[NDArray], Cache]:
    """`batch_norm`, and what `batch_norm_backward` needs of it."""
    MISSING.refuse("numpy", spec)
    x = np.asarray(x)
    given = None if weights is None else np.asarray(weights)
    plan = plan_call(
        spec,
        x.shape,
        x.dtype.name,
        training=training,
        update_stats=update_stats,
        weights_shape=None if given is None else given.shape,
    )
    w = None if given is None else read_weights(given, plan)
    # Without a single weighted element there are no batch statistics: y comes by the eval formula.
    has_batch = plan.batch_statistics and plan.count != 0 and (w is None or w.total > 0)
    with np.errstate(all="ignore"):  # NaN, Inf and overflow travel into the results; the spec says what they do there
        if has_batch:
            batch = batch_moments(x, plan, w)
            mean, variance = batch.mean, batch.variance
            after = updated(state, batch, spec, plan) if plan.update else state
        else:
            mean, variance = _moving(state, plan)
            after = state
        proportions = None if not has_batch else 1.0 / (plan.count or 1) if w is None else w.proportions
        cache = Cache(x, state.gamma, mean, variance, proportions, w, None if given is None else given.dtype,
                      None if given is None else given.shape, plan, spec)  # fmt: skip
        y = _normalized(cache)
        if state.gamma is not None:
            y *= _per_channel(state.gamma, plan)
        if state.beta is not None:
            y += _per_channel(state.beta, plan)
        return y.astype(x.dtype), after, cache


def batch_norm_backward(dy: NDArray, cache: Cache) -> Gradients:
    """Gradients of a scalar loss, from dy = dloss/dy of the forward call that gave `cache`.

    With p_i = w_i/W (1/n without weights), S1 = sum(dy) and S2 = sum(dy xhat) over a channel:
    dx_i = gamma/sd (dy_i - p_i (S1 + xhat_i S2)), or gamma/sd dy_i where the moving statistics normalized;
    dgamma = S2; dbeta = S1; dw_i = -1/W sum_c gamma (xhat_i S1 + (xhat_i^2 - v/(v+eps))/2 S2).
    Ioffe & Szegedy, "Batch Normalization", 2015, section 3, with weights added.

    Raises:
        InputError: dy is not of y's shape.
    """
    plan, spec, w = cache.plan, cache.spec, cache.weights
    dy_given = np.asarray(dy)
    if dy_given.shape != cache.x.shape:
        raise InputError(f"dy must have y's shape {cache.x.shape}; got {dy_given.shape}.")
    with np.errstate(all="ignore"):
        dy = dy_given.astype(plan.arithmetic)
        xhat = _normalized(cache)
        if w is not None:
            # A masked position may hold anything; what is not finite there must not reach the sums.
            xhat = np.where((w.values > 0) | np.isfinite(xhat), xhat, 0)
        s1: NDArray = dy.sum(axis=plan.reduced, keepdims=True, dtype=np.float64)
        s2: NDArray = (dy * xhat).sum(axis=plan.reduced, keepdims=True, dtype=np.float64)
        sd2 = cache.variance + spec.epsilon
        gamma = np.ones(plan.channel_shape) if cache.gamma is None else _per_channel(cache.gamma, plan, np.float64)
        through = dy if cache.proportions is None else dy - cache.proportions * (s1 + xhat * s2)
        dx = gamma / np.sqrt(sd2) * through
        return Gradients(
            dx=dx.astype(cache.x.dtype),
            dgamma=s2.reshape(-1).astype(array_dtype(spec, "gamma")) if spec.scale else None,
            dbeta=s1.reshape(-1).astype(array_dtype(spec, "beta")) if spec.center else None,
            dweights=_dweights(cache, w, gamma, xhat, s1, s2) if w is not None and w.real else None,
        )


def _dweights(cache: Cache, w: Weights, gamma: NDArray, xhat: NDArray, s1: NDArray, s2: NDArray) -> NDArray:
    assert cache.weights_given is not None
    if cache.proportions is None:  # the moving statistics normalized: the weights had no part in y
        return np.zeros(cache.weights_given, cache.weights_dtype)
    ratio = cache.variance / (cache.variance + cache.spec.epsilon)
    at_positions: NDArray = -gamma * (xhat * s1 + 0.5 * (np.square(xhat, dtype=np.float64) - ratio) * s2) / w.total
    spread_over = tuple(i for i, length in enumerate(w.values.shape) if length == 1)
    summed: NDArray = at_positions.sum(axis=spread_over)
    return summed.reshape(cache.weights_given).astype(cache.weights_dtype)


def _normalized(cache: Cache) -> NDArray:
    """(x - mean) / sqrt(variance + eps), at every position, in the plan's arithmetic."""
    scaled: NDArray = (cache.x - cache.mean) / np.sqrt(cache.variance + cache.spec.epsilon)
    return scaled.astype(cache.plan.arithmetic)


def _moving(state: BatchNormState[NDArray], plan: CallPlan) -> tuple[NDArray, NDArray]:
    """The moving statistics broadcast against x; mean 0 and variance 1 where none are tracked."""
    if state.moving_mean is None or state.moving_variance is None:
        return np.zeros(plan.channel_shape), np.ones(plan.channel_shape)
    return _per_channel(state.moving_mean, plan, np.float64), _per_channel(state.moving_variance, plan, np.float64)


def _per_channel(values: NDArray, plan: CallPlan, dtype: Any = None) -> NDArray:
    return values.astype(dtype or plan.arithmetic).reshape(plan.channel_shape)
