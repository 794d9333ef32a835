"""`batch_norm` for NumPy: forward, and the analytic backward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from bnlayer.call import CallPlan, plan_call, refuse_single_value, renorm_clips
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype

from . import at_once, blocked, definition
from .abreast import entering, ghosts_abreast, wide_call
from .averages import updated
from .cache import Cache, Gradients, NDArray, Part, PartGradients
from .evaluated import evaluated
from .layout import BLOCK_BYTES, BUFFER, Layout, layout_of
from .paths import PATHS
from .renorm import corrections
from .statistics import Moments, batch_moments, combined, completed
from .threads import FEWEST_BLOCKS, cores, each
from .weights import checked, of_rows, read_weights, related, unrelated

WHOLE = slice(None)


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
    plan = _plan(
        spec,
        x.shape,
        x.dtype,
        training,
        update_stats,
        None if weights is None else weights.shape,
        None if adjustment is None else (adjustment[0].shape, adjustment[1].shape),
    )
    if plan.synchronized:  # the count of all replicas, and this is all of them
        refuse_single_value(spec, plan.count, f"batch; got x with shape {x.shape}")
    abreast = ghosts_abreast(x, spec, plan) if weights is None and adjustment is None else None
    if abreast is not None:
        wide = wide_call(x, state, spec, abreast)
        y, _, cache = batch_norm_forward(*wide, training=True, update_stats=False, renorm_clips=renorm_clips)
        if plan.update:
            (part,) = cache.parts
            with np.errstate(all="ignore"):
                state = updated(state, entering(part.mean, part.variance, abreast, plan), spec, plan)
        return abreast.narrowed(y), state, cache._replace(abreast=abreast)
    able = ("definition",) if (adjustment is not None and training) or x.size == 0 else ("blocked", "definition")
    layout = layout_of(x, plan.axis) if PATHS.chosen(able[0], able) == "blocked" else None
    if layout is not None and not plan.batch_statistics and at_once.is_one_block(x):
        found = _eval_at_once(x, layout, state, spec, plan, weights)
        if found is not None:
            return found
    with np.errstate(all="ignore"):  # NaN, Inf and overflow travel into the results; the spec says what they do there
        np.setbufsize(BUFFER)  # until the end of `with`
        view = None if layout is None else layout.view(x)
        parts, batch = _parts(x, view, layout, state, spec, plan, weights, training, renorm_clips)
        after = updated(state, batch, spec, plan) if plan.update and batch is not None else state
        used = adjustment if training else None
        cache = Cache(x, state.gamma, state.beta, weights, used, parts, plan, spec, layout)
        y = _empty(x, layout)
        target = None if layout is None else layout.view(y)

        def normalize(part: Part) -> None:
            if view is None or target is None or not blocked.normalize(view, target, cache, part):
                y[part.rows] = definition.output(cache, part)

        each(parts, normalize, large=_is_large(x))
        return y, after, cache


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
    plan, spec, x, layout = cache.plan, cache.spec, cache.x, cache.layout
    dy = np.asarray(dy)
    if dy.shape != cache.shape:
        raise InputError(f"dy must have y's shape {cache.shape}; got {dy.shape}.")
    abreast = cache.abreast
    dy = dy if abreast is None else abreast.widened(dy)
    dx = _empty(x, layout)
    dgamma, dbeta = np.zeros(spec.num_features), np.zeros(spec.num_features)
    dweights = np.zeros(_shape_of_weights(plan)) if cache.weights_are_real else None
    with np.errstate(all="ignore"):
        np.setbufsize(BUFFER)
        views = None if layout is None else (layout.view(x), layout.view(dy), layout.view(dx))

        def gradients(part: Part) -> PartGradients:
            found = None if views is None else blocked.gradients(*views, cache, part)
            if found is None:
                dx[part.rows], found = definition.gradients(cache, part, dy[part.rows])
            return found

        for part, found in zip(cache.parts, each(cache.parts, gradients, large=_is_large(x)), strict=True):
            dgamma += found.dgamma
            dbeta += found.dbeta
            if dweights is not None and found.dweights is not None:
                of_rows(dweights, part.rows)[...] += found.dweights
    if abreast is not None:
        dx, dgamma, dbeta = abreast.narrowed(dx), abreast.added(dgamma), abreast.added(dbeta)
    return Gradients(
        dx=dx,
        dgamma=dgamma.astype(array_dtype(spec, "gamma")) if spec.scale else None,
        dbeta=dbeta.astype(array_dtype(spec, "beta")) if spec.center else None,
        dweights=None if dweights is None or cache.weights is None
        else dweights.reshape(cache.weights.shape).astype(cache.weights.dtype),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _plan(
    spec: BatchNormSpec,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    training: bool,
    update_stats: bool,
    weights_shape: tuple[int, ...] | None,
    adjustment_shapes: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> CallPlan:
    return plan_call(
        spec,
        shape,
        dtype.name,
        training=training,
        update_stats=update_stats,
        weights_shape=weights_shape,
        adjustment_shapes=adjustment_shapes,
    )


def _empty(x: NDArray, layout: Layout | None) -> NDArray:
    """A result like x."""
    return np.empty(x.shape, x.dtype) if layout is None else layout.empty(x.dtype)


def _eval_at_once(
    x: NDArray, layout: Layout, state: BatchNormState[NDArray], spec: BatchNormSpec, plan: CallPlan,
    weights: NDArray | None,
) -> tuple[NDArray, BatchNormState[NDArray], Cache] | None:  # fmt: skip
    """`batch_norm_forward` by the moving statistics, of a batch that is one block, channels last; None where it is not
    to be had at once."""
    if layout.order is not None or layout.shape[3] != 1:
        return None
    with np.errstate(all="ignore"):
        mean, variance, scaling, row = evaluated(state, spec, plan.arithmetic, x.size // spec.num_features)
        if row is None or row[0].dtype != x.dtype:
            return None
        w = None if weights is None else unrelated(checked(weights, plan))
        y = np.empty(x.shape, x.dtype)
        at_once.apply(x.reshape(-1, len(row[0])), y.reshape(-1, len(row[0])), *row)
    cs = plan.channel_shape
    part = Part(WHOLE, mean.reshape(cs), variance.reshape(cs), 1.0, 0.0, None, w, scaling)
    return y, state, Cache(x, state.gamma, state.beta, weights, None, (part,), plan, spec, layout)


def _parts(
    x: NDArray,
    view: NDArray | None,
    layout: Layout | None,
    state: BatchNormState[NDArray],
    spec: BatchNormSpec,
    plan: CallPlan,
    weights: NDArray | None,
    training: bool,
    clips: Mapping[str, float | None] | None,
) -> tuple[tuple[Part, ...], Moments | None]:
    """What normalizes which rows, and what enters the averages: None where nothing has weight."""
    values = None if weights is None else read_weights(weights, plan)
    limits = None if spec.renorm is None and clips is None else renorm_clips(spec, clips)
    cs = plan.channel_shape

    def part(rows: slice) -> tuple[Part, Moments | None]:
        of_part = x[rows]
        count = of_part.size // spec.num_features
        w = None
        if values is not None:
            held = of_rows(values, rows)
            w = related(held, count) if plan.batch_statistics else unrelated(held)
        # Without a single weighted element there are no batch statistics: y comes by the eval formula.
        if not plan.batch_statistics or count == 0 or (w is not None and w.total == 0):
            mean, variance, scaling, _ = evaluated(state, spec, plan.arithmetic, count)
            return Part(rows, mean.reshape(cs), variance.reshape(cs), 1.0, 0.0, None, w, scaling), None
        found = (
            None if layout is None or view is None else blocked.moments(view[rows], layout, w, spec, plan.arithmetic)
        )
        if found is None:
            batch, standard = batch_moments(of_part, plan, w), None
        else:
            mean, variance, standard = found
            batch = completed(mean.reshape(cs), variance.reshape(cs), w, count)
        correction = None if limits is None or not training else corrections(state, batch, spec, limits, plan)
        scaling = None if standard is None else blocked.scaled(standard, state.gamma, state.beta, correction)
        p = 1.0 / count if w is None else w.proportions
        r, d = (1.0, 0.0) if correction is None else correction
        return Part(rows, batch.mean, batch.variance, r, d, p, w, scaling), batch

    found = each(plan.ghosts or (WHOLE,), part, large=_is_large(x))
    entering = [batch for _, batch in found if batch is not None]
    return tuple(each_part for each_part, _ in found), combined(entering) if entering else None


def _is_large(x: NDArray) -> bool:
    """Whether ghost batches of x are worth a thread."""
    return x.nbytes >= FEWEST_BLOCKS * BLOCK_BYTES * cores()


def _shape_of_weights(plan: CallPlan) -> tuple[int, ...]:
    return tuple(int(length or 0) for length in plan.weights_shape or ())
