"""`batch_norm` for NumPy: forward, and the analytic backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnlayer.call import CallPlan, plan_call, refuse_single_value, renorm_clips
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype

from .averages import updated
from .renorm import corrections
from .statistics import Moments, batch_moments, combined
from .weights import Weights, is_real, of_rows, read_weights, related

NDArray = np.ndarray[Any, np.dtype[Any]]
WHOLE = slice(None)


@dataclass(frozen=True, eq=False)
class Part:
    """The rows that one set of statistics normalizes: the whole batch, or a ghost batch.

    Attributes:
        rows: of the batch axis.
        mean, variance: what normalizes, float64, of the plan's `channel_shape`.
        r, d: batch renormalization's corrections; 1 and 0 without.
        proportions: w/W (1/n without weights); None where the moving statistics normalize: then x reaches y directly
            only.
        weights: of these rows, or None.
    """

    rows: slice
    mean: NDArray
    variance: NDArray
    r: NDArray | float
    d: NDArray | float
    proportions: NDArray | float | None
    weights: Weights | None


@dataclass(frozen=True, eq=False)
class Cache:
    """What the backward pass needs of one forward pass."""

    x: NDArray
    gamma: NDArray | None
    weights: NDArray | None
    adjustment: tuple[NDArray, NDArray] | None
    parts: tuple[Part, ...]
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
    adjustment: tuple[NDArray, NDArray] | None = None,
    renorm_clips: Mapping[str, float | None] | None = None,
) -> tuple[NDArray, BatchNormState[NDArray]]:
    """Normalize x and update the moving statistics.

    NumPy has no engine that runs replicas, so with `spec.synchronized` this process is the only one, and its batch the
    whole batch.

    Args:
        x: float array of rank 2 or more, `spec.num_features` long on `spec.axis`.
        state: parameters and moving statistics; not modified.
        spec: what the layer is.
        training: batch statistics if True, moving ones if False.
        weights: mask or weights of shape (N,), x's shape without the channel axis, or with 1 on it; at least 0.
        update_stats: False: batch statistics normalize, but the state is returned as it came.
        adjustment: in training, a scale and a bias of the normalized values before gamma and beta; each broadcastable
            to x.
        renorm_clips: "r_max", "r_min" or "d_max" in place of the spec's for this call; None is no clip.

    Returns:
        y, of x's shape and dtype, and the state after.

    Raises:
        InputError: x, the weights, the adjustment or the clips do not fit the spec.
    """
    y, after, _ = batch_norm_forward(
        x,
        state,
        spec,
        training=training,
        weights=weights,
        update_stats=update_stats,
        adjustment=adjustment,
        renorm_clips=renorm_clips,
    )
    return y, after


def batch_norm_forward(
    x: NDArray,
    state: BatchNormState[NDArray],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: NDArray | None = None,
    update_stats: bool = True,
    adjustment: tuple[NDArray, NDArray] | None = None,
    renorm_clips: Mapping[str, float | None] | None = None,
) -> tuple[NDArray, BatchNormState[NDArray], Cache]:
    """`batch_norm`, and what `batch_norm_backward` needs of it."""
    x = np.asarray(x)
    weights = None if weights is None else np.asarray(weights)
    if adjustment is not None:
        adjustment = (np.asarray(adjustment[0]), np.asarray(adjustment[1]))
    plan = plan_call(
        spec,
        x.shape,
        x.dtype.name,
        training=training,
        update_stats=update_stats,
        weights_shape=None if weights is None else weights.shape,
        adjustment_shapes=None if adjustment is None else (adjustment[0].shape, adjustment[1].shape),
    )
    if plan.synchronized:  # the count of all replicas, and this is all of them
        refuse_single_value(spec, plan.count, f"batch; got x with shape {x.shape}")
    with np.errstate(all="ignore"):  # NaN, Inf and overflow travel into the results; the spec says what they do there
        parts, batch = _parts(x, state, spec, plan, weights, training, renorm_clips)
        after = updated(state, batch, spec, plan) if plan.update and batch is not None else state
        cache = Cache(x, state.gamma, weights, adjustment if training else None, parts, plan, spec)
        y = np.empty(x.shape, plan.arithmetic)
        for part in parts:
            y[part.rows] = _corrected(cache, part, _normalized(cache, part))
        if state.gamma is not None:
            y *= _per_channel(state.gamma, plan)
        if state.beta is not None:
            y += _per_channel(state.beta, plan)
        return y.astype(x.dtype), after, cache


def batch_norm_backward(dy: NDArray, cache: Cache) -> Gradients:
    """Gradients of a scalar loss, from dy = dloss/dy of the forward call that gave `cache`.

    With p_i = w_i/W (1/n without weights), g = dy (times the adjustment's scale), S1 = sum(g) and S2 = sum(g xhat) over
    a channel of the batch or ghost batch:
    dx_i = gamma r/sd (g_i - p_i (S1 + xhat_i S2)), or gamma/sd g_i where the moving statistics normalized;
    dgamma = sum(dy ((xhat r + d) s + b)); dbeta = sum(dy);
    dw_i = -1/W sum_c gamma r (xhat_i S1 + (xhat_i^2 - v/(v+eps))/2 S2).
    Ioffe & Szegedy, "Batch Normalization", 2015, section 3, with weights and the corrections added.

    Raises:
        InputError: dy is not of y's shape.
    """
    plan, spec = cache.plan, cache.spec
    dy_given = np.asarray(dy)
    if dy_given.shape != cache.x.shape:
        raise InputError(f"dy must have y's shape {cache.x.shape}; got {dy_given.shape}.")
    gamma = np.ones(plan.channel_shape) if cache.gamma is None else _per_channel(cache.gamma, plan, np.float64)
    dx, dgamma = np.empty(cache.x.shape, cache.x.dtype), np.zeros(plan.channel_shape)
    dweights = None if cache.weights is None or not is_real(cache.weights) else np.zeros(_shape_of_weights(plan))
    with np.errstate(all="ignore"):
        dy = dy_given.astype(plan.arithmetic)
        for part in cache.parts:
            xhat = _normalized(cache, part)
            if part.weights is not None:
                # A masked position may hold anything; what is not finite there must not reach the sums.
                xhat = np.where((part.weights.values > 0) | np.isfinite(xhat), xhat, 0)
            scale = _adjustment(cache, part)[0]
            g = dy[part.rows] if scale is None else dy[part.rows] * scale
            s1, s2 = _total(g, plan), _total(g * xhat, plan)
            dgamma += _total(dy[part.rows] * _corrected(cache, part, xhat), plan)
            through = g if part.proportions is None else g - part.proportions * (s1 + xhat * s2)
            factor = gamma * part.r
            dx[part.rows] = factor / np.sqrt(part.variance + spec.epsilon) * through
            if dweights is not None and part.weights is not None and part.proportions is not None:
                of_rows(dweights, part.rows)[...] += _dweights(cache, part, part.weights, factor, xhat, s1, s2)
        dbeta = _total(dy, plan)
    return Gradients(
        dx=dx,
        dgamma=dgamma.reshape(-1).astype(array_dtype(spec, "gamma")) if spec.scale else None,
        dbeta=dbeta.reshape(-1).astype(array_dtype(spec, "beta")) if spec.center else None,
        dweights=None if dweights is None or cache.weights is None
        else dweights.reshape(cache.weights.shape).astype(cache.weights.dtype),
    )  # fmt: skip


def _parts(
    x: NDArray,
    state: BatchNormState[NDArray],
    spec: BatchNormSpec,
    plan: CallPlan,
    weights: NDArray | None,
    training: bool,
    clips: Mapping[str, float | None] | None,
) -> tuple[tuple[Part, ...], Moments | None]:
    """What normalizes which rows, and what enters the averages: None where nothing has weight."""
    values = None if weights is None else read_weights(weights, plan)
    limits = renorm_clips(spec, clips)
    parts, entering = [], []
    for rows in plan.ghosts or (WHOLE,):
        of_part = x[rows]
        count = of_part.size // spec.num_features
        w = None if values is None else related(of_rows(values, rows), count)
        # Without a single weighted element there are no batch statistics: y comes by the eval formula.
        if not plan.batch_statistics or count == 0 or (w is not None and w.total == 0):
            parts.append(Part(rows, *_moving(state, plan), 1.0, 0.0, None, w))
            continue
        batch = batch_moments(of_part, plan, w)
        r, d = corrections(state, batch, spec, limits, plan) if training and spec.renorm is not None else (1.0, 0.0)
        p = 1.0 / count if w is None else w.proportions
        parts.append(Part(rows, batch.mean, batch.variance, r, d, p, w))
        entering.append(batch)
    return tuple(parts), combined(entering) if entering else None


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
    spread_over = tuple(i for i, length in enumerate(w.values.shape) if length == 1)
    return np.asarray(at_positions.sum(axis=spread_over, keepdims=True))


def _moving(state: BatchNormState[NDArray], plan: CallPlan) -> tuple[NDArray, NDArray]:
    """The moving statistics broadcast against x; mean 0 and variance 1 where none are tracked."""
    if state.moving_mean is None or state.moving_variance is None:
        return np.zeros(plan.channel_shape), np.ones(plan.channel_shape)
    return _per_channel(state.moving_mean, plan, np.float64), _per_channel(state.moving_variance, plan, np.float64)


def _total(values: NDArray, plan: CallPlan) -> NDArray:
    return np.asarray(np.sum(values, axis=plan.reduced, keepdims=True, dtype=np.float64))


def _shape_of_weights(plan: CallPlan) -> tuple[int, ...]:
    return tuple(int(length or 0) for length in plan.weights_shape or ())


def _per_channel(values: NDArray, plan: CallPlan, dtype: Any = None) -> NDArray:
    return values.astype(dtype or plan.arithmetic).reshape(plan.channel_shape)
