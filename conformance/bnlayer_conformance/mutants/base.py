"""A correct batch norm, written so that every rule is a line of its own: the base that mutants are made from.

Not for use: it is slow and plain on purpose. `catalogue` names the mutants, `build` makes them from this source text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from bnlayer.call import RenormClips, plan_call, refuse_single_value, renorm_clips, trains
from bnlayer.contract import Call, CallOutcome, NDArray, Outcome, Request
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState


@dataclass
class Layer:
    """A spec and its state."""

    spec: BatchNormSpec
    state: BatchNormState[NDArray]


@dataclass
class Batch:
    """What may enter the averages: a (ghost) batch's mean, biased and unbiased variance, broadcast; its weight."""

    mean: NDArray
    variance: NDArray
    unbiased: NDArray
    W: float


@dataclass
class Tape:
    """What one (ghost) batch leaves for the backward pass. `p` is None where the moving statistics normalized;
    `replicas` are the rows of each."""

    rows: slice
    replicas: list[slice]
    xhat: NDArray
    variance: NDArray
    sd: NDArray
    p: NDArray | None
    w: NDArray
    r: NDArray
    dd: NDArray
    s: NDArray
    b: NDArray
    axis: int
    axes: tuple[int, ...]


class Base:
    """The backend."""

    name = "base"

    def version(self) -> str:
        """See `bnlayer.contract.Backend`, as for all the methods here."""
        return "1"

    def owns(self, layer: Any) -> bool:  # noqa: D102
        return isinstance(layer, Layer)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:  # noqa: D102
        return None

    def build(self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None) -> Layer:  # noqa: D102
        state = BatchNormState.initial(spec) if state is None else state
        state = state.checked(spec)
        return Layer(spec, state)

    def extract(self, layer: Layer) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:  # noqa: D102
        state = layer.state.copy()
        return layer.spec, state

    def load(self, layer: Layer, state: BatchNormState[NDArray]) -> Layer:  # noqa: D102
        state = state.checked(layer.spec)
        layer.state = state
        return layer

    def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:  # noqa: D102
        with np.errstate(all="ignore"):
            outcomes, gradients, tapes = [], [], []
            before = layer.state
            for call in request.calls:
                y, of_call = _forward(layer, call, request)
                tapes.append((call, y, of_call))
            for call, y, of_call in tapes:
                if call.dy is None:
                    outcomes.append(CallOutcome(y))
                    continue
                dx, dgamma, dbeta, dweights, hvp = _backward(before, layer.spec, call, of_call)
                gradients.append((dgamma, dbeta))
                outcomes.append(CallOutcome(y, dx=dx, dweights=dweights, hvp=hvp))
            sum_gamma = _sum([g for g, _ in gradients], before.gamma)
            sum_beta = _sum([b for _, b in gradients], before.beta)
        return layer, Outcome(tuple(outcomes), state=layer.state, dgamma=sum_gamma, dbeta=sum_beta)


def _sum(parts: list[NDArray], like: NDArray | None) -> NDArray | None:
    return None if like is None or not parts else np.sum(parts, axis=0).astype(like.dtype)


def _forward(layer: Layer, call: Call, request: Request) -> tuple[NDArray, list[Tape]]:
    spec, state = layer.spec, layer.state
    training = trains(spec, request.training, request.frozen_statistics)
    given = None if call.weights is None else call.weights.shape
    adjusted = None if call.adjustment is None else (call.adjustment[0].shape, call.adjustment[1].shape)
    clips = renorm_clips(spec, request.renorm_clips)
    kind = call.x.dtype.name
    plan = plan_call(spec, call.x.shape, kind, training=training, weights_shape=given, adjustment_shapes=adjusted)
    if plan.synchronized:
        refuse_single_value(spec, plan.count, "batch")
    if call.weights is not None and not bool(np.all((call.weights >= 0) & (call.weights < np.inf))):
        raise InputError("weights must be finite and not negative.")
    arithmetic = np.float64 if call.x.dtype == np.float64 else np.float32
    x = call.x.astype(arithmetic)
    axis = spec.axis % x.ndim
    axes = tuple(i for i in range(x.ndim) if i != axis)
    shape = tuple(spec.num_features if i == axis else 1 for i in range(x.ndim))

    def per_channel(values: NDArray) -> NDArray:
        return values.astype(arithmetic).reshape(shape)

    w = _spread(call.weights, x.shape, axis)
    replicas = _replicas(request.shards if training else None)
    y, tapes, batches = np.empty_like(x), [], []
    for rows in _ghosts(spec, x.shape[0], training):
        tape, entering = _part(state, spec, call, clips, x[rows], w[rows], axis, axes, shape, training, replicas)
        tape.rows = rows
        z = tape.xhat * tape.r + tape.dd
        y[rows] = z * tape.s + tape.b
        tapes.append(tape)
        if entering is not None:
            batches.append(entering)
    if state.gamma is not None:
        y = y * per_channel(state.gamma)
    if state.beta is not None:
        y = y + per_channel(state.beta)
    y = y.astype(call.x.dtype)
    moves = training and request.update_stats and spec.track_moving_stats and len(batches) > 0
    if moves:
        layer.state = _moved(state, spec, _joined(batches))
    return y, tapes


def _replicas(shards: tuple[int, ...] | None) -> list[slice]:
    """The rows of each replica; all rows together on one."""
    if shards is None:
        return [slice(None)]
    return [slice(*edge) for edge in pairwise(accumulate(shards, initial=0))]


def _ghosts(spec: BatchNormSpec, rows: int, training: bool) -> list[slice]:
    size = spec.virtual_batch_size
    if size is None or not training or rows == 0:
        return [slice(None)]
    number = math.ceil(rows / size)
    if spec.virtual_batch_layout == "strided":
        return [slice(g, None, number) for g in range(number)]
    sizes = [len(part) for part in np.array_split(np.arange(rows), number)]
    return [slice(sum(sizes[:g]), sum(sizes[: g + 1])) for g in range(number)]


def _part(
    state: BatchNormState[NDArray],
    spec: BatchNormSpec,
    call: Call,
    clips: RenormClips,
    x: NDArray,
    w: NDArray,
    axis: int,
    axes: tuple[int, ...],
    shape: tuple[int, ...],
    training: bool,
    replicas: list[slice],
) -> tuple[Tape, Batch | None]:
    arithmetic = x.dtype.type

    def per_channel(values: NDArray) -> NDArray:
        return values.astype(arithmetic).reshape(shape)

    def total(values: NDArray) -> NDArray:
        summed = np.sum(values, axis=axes, keepdims=True, dtype=np.float64)
        return np.asarray(summed.astype(arithmetic))

    seen = np.where(w > 0, x, 0)
    W = np.sum(w)
    batch = training or not spec.track_moving_stats
    batch = batch and bool(W > 0)
    if batch:
        p = (w / W).astype(arithmetic)
        mean = total(p * seen)
        variance = total(p * np.square(seen - mean))
        one_over_n = np.sum(np.square(w / W))
        single = np.count_nonzero(w) == 1
        if len(replicas) > 1:
            mean, variance, one_over_n = _merged(seen, w, replicas, axes)
        unbiased = variance * 0 if single else variance / (1 - one_over_n)
    elif state.moving_mean is not None and state.moving_variance is not None:
        p = None
        mean = per_channel(state.moving_mean)
        variance = unbiased = per_channel(state.moving_variance)
    else:
        p = None
        mean = np.zeros(shape, arithmetic)
        variance = unbiased = np.ones(shape, arithmetic)
    sd = np.sqrt(variance + arithmetic(spec.epsilon))
    xhat = (x - mean) / sd
    r, dd = np.ones(shape, arithmetic), np.zeros(shape, arithmetic)
    corrects = batch and training
    if corrects and state.renorm_mean is not None and state.renorm_stddev is not None:
        den = np.maximum(per_channel(state.renorm_stddev), arithmetic(math.sqrt(spec.epsilon)))
        r = sd / den
        dd = (mean - per_channel(state.renorm_mean)) / den
        r = r if clips.r_min is None else np.maximum(r, arithmetic(clips.r_min))
        r = r if clips.r_max is None else np.minimum(r, arithmetic(clips.r_max))
        dd = dd if clips.d_max is None else np.clip(dd, arithmetic(-clips.d_max), arithmetic(clips.d_max))
    s, b = np.ones((), arithmetic), np.zeros((), arithmetic)
    adjusts = batch and training
    if adjusts and call.adjustment is not None:
        s = call.adjustment[0].astype(arithmetic)
        b = call.adjustment[1].astype(arithmetic)
    enters = Batch(mean, variance, unbiased, float(W)) if batch or not training else None
    return Tape(slice(None), replicas, xhat, variance, sd, p, w, r, dd, s, b, axis, axes), enters


def _merged(x: NDArray, w: NDArray, replicas: list[slice], axes: tuple[int, ...]) -> tuple[NDArray, NDArray, Any]:
    """The mean, the biased variance and 1/n of several replicas' rows, each from its own moments.

    In float64: the difference of two means that float32 has rounded is off by their size, and so is its square.
    """
    totals = [float(np.sum(w[rows])) for rows in replicas]
    W = sum(totals)
    shares = [own / W for own in totals]
    means, variances, squares = [], [], []
    for rows, own in zip(replicas, totals, strict=True):
        p = w[rows] / (own if own > 0 else 1.0)
        m = np.sum(p * x[rows], axis=axes, keepdims=True)
        v = np.sum(p * np.square(x[rows] - m), axis=axes, keepdims=True)
        means.append(m)
        variances.append(v)
        squares.append(float(np.sum(np.square(w[rows]))))
    mean = np.sum([share * m for share, m in zip(shares, means, strict=True)], axis=0)
    between = [np.square(m - mean) for m in means]
    variance = np.sum([s * (v + b) for s, v, b in zip(shares, variances, between, strict=True)], axis=0)
    one_over_n = sum(squares) / W**2
    return mean.astype(x.dtype), variance.astype(x.dtype), one_over_n


def _joined(batches: list[Batch]) -> Batch:
    """What enters for all ghosts together."""
    shares = np.array([batch.W for batch in batches]) / sum(batch.W for batch in batches)
    mean = sum(q * batch.mean for q, batch in zip(shares, batches, strict=True))
    variance = sum(q * batch.variance for q, batch in zip(shares, batches, strict=True))
    unbiased = sum(q * batch.unbiased for q, batch in zip(shares, batches, strict=True))
    return Batch(np.asarray(mean), np.asarray(variance), np.asarray(unbiased), 1.0)


def _moved(state: BatchNormState[NDArray], spec: BatchNormSpec, batch: Batch) -> BatchNormState[NDArray]:
    mean, variance, unbiased = batch.mean, batch.variance, batch.unbiased
    t = state.num_updates + 1
    d = 1 - 1 / t if spec.decay == "cumulative" else float(spec.decay)
    entering = unbiased if spec.moving_variance_estimator == "unbiased" else variance
    old = {name: array.astype(np.float64) for name, array in state.arrays().items()}
    old_mean = old["moving_mean"]
    old_variance = old["moving_variance"]
    new = {}
    new_mean = d * old_mean + (1 - d) * mean.reshape(-1)
    new_variance = d * old_variance + (1 - d) * entering.reshape(-1)
    started = -math.expm1(t * math.log(d)) if d > 0 else 1.0
    if spec.zero_debias != "none":
        new["hidden_mean"] = d * old["hidden_mean"] + (1 - d) * mean.reshape(-1)
        new_mean = new["hidden_mean"] / started
    if spec.zero_debias == "all":
        new["hidden_variance"] = d * old["hidden_variance"] + (1 - d) * entering.reshape(-1)
        new_variance = new["hidden_variance"] / started
    if spec.renorm is not None:
        R = spec.renorm.decay
        stddev = np.sqrt(variance.astype(np.float64).reshape(-1) + spec.epsilon)
        new["renorm_mean"] = R * old["renorm_mean"] + (1 - R) * mean.reshape(-1)
        new["renorm_stddev"] = R * old["renorm_stddev"] + (1 - R) * stddev
        new["moving_stddev"] = d * old["moving_stddev"] + (1 - d) * stddev
        new_variance = np.maximum(np.square(new["moving_stddev"]) - spec.epsilon, 0)
    new["moving_mean"] = new_mean
    new["moving_variance"] = new_variance
    if spec.nonfinite == "keep":
        good = np.isfinite(mean).reshape(-1) & np.isfinite(variance).reshape(-1)
        new = {name: np.where(good, values, old[name]) for name, values in new.items()}
    new = {name: values.astype(getattr(state, name).dtype) for name, values in new.items()}
    return state.replace(**new, num_updates=t)


def _spread(weights: NDArray | None, shape: tuple[int, ...], axis: int) -> NDArray:
    """The weights at every position of a channel, as if x had one channel."""
    places = tuple(1 if i == axis else length for i, length in enumerate(shape))
    if weights is None:
        return np.ones(places)
    w = weights.astype(np.float64)
    if w.ndim == 1:
        w = w.reshape(-1, *[1] * (len(shape) - 1))
    elif w.ndim == len(shape) - 1:
        w = np.expand_dims(w, axis)
    return np.broadcast_to(w, places)


def _backward(
    state: BatchNormState[NDArray], spec: BatchNormSpec, call: Call, tapes: list[Tape]
) -> tuple[NDArray, NDArray, NDArray, NDArray | None, NDArray | None]:
    assert call.dy is not None
    axes, shape = tapes[0].axes, tapes[0].sd.shape
    arithmetic = tapes[0].xhat.dtype
    dy = call.dy.astype(arithmetic)
    gamma = np.ones(shape) if state.gamma is None else state.gamma.astype(np.float64).reshape(shape)
    dx, each, hvp = np.zeros(dy.shape), np.zeros(dy.shape), np.zeros(dy.shape)
    dgamma = np.zeros(spec.num_features)

    def total(values: NDArray) -> NDArray:
        return np.asarray(np.sum(values, axis=axes, keepdims=True, dtype=np.float64))

    def over_replicas(values: NDArray) -> NDArray:
        sums = [total(values[rows]) for rows in tapes[0].replicas]
        return np.asarray(sum(sums))

    for tape in tapes:
        xhat = np.where((tape.w > 0) | np.isfinite(tape.xhat), tape.xhat, 0)
        dz = dy[tape.rows]
        g = dz * tape.s
        sd, r = tape.sd, tape.r
        s1 = over_replicas(g)
        s2 = over_replicas(g * xhat)
        p = tape.p
        inner = g
        if p is not None:
            inner = g - p * (s1 + xhat * s2)
        dx[tape.rows] = gamma * r / sd * inner
        if call.direction is not None and p is not None:
            t = np.where((tape.w > 0) | np.isfinite(tape.xhat), call.direction[tape.rows].astype(arithmetic), 0)
            shift = over_replicas(p * t)
            q = over_replicas(p * xhat * t)
            moved = (t - shift - xhat * q) / sd
            s2_moved = over_replicas(g * moved)
            of_sd = inner * q / sd
            of_xhat = p * (moved * s2 + xhat * s2_moved)
            hvp[tape.rows] = -gamma * r / sd * (of_sd + of_xhat)
        z = (xhat * r + tape.dd) * tape.s + tape.b
        dgamma = dgamma + total(dz * z).reshape(-1)
        ratio = tape.variance / (tape.variance + spec.epsilon)
        at = xhat * s1 + 0.5 * (np.square(xhat) - ratio) * s2
        at = -gamma * r / max(float(np.sum(tape.w)), 1e-300) * at
        if p is None:
            at = np.zeros(xhat.shape)
        each[tape.rows] = at
    dbeta = total(dy).reshape(-1)
    dweights = None
    if call.weights is not None and call.weights.dtype.kind not in "biu":
        dweights = _gathered(each, call.weights, tapes[0].axis)
    second = None if call.direction is None else hvp.astype(call.x.dtype)
    return dx.astype(call.x.dtype), dgamma, dbeta, dweights, second


def _gathered(each: NDArray, weights: NDArray, axis: int) -> NDArray:
    """The gradient at every element of x, summed to the weights' shape."""
    at = each.sum(axis=axis, keepdims=True)
    like = weights.shape
    if len(like) == 1:
        like = (*like, *[1] * (each.ndim - 1))
    elif len(like) == each.ndim - 1:
        like = (*like[:axis], 1, *like[axis:])
    spread = tuple(i for i in range(each.ndim) if like[i] == 1)
    return np.asarray(at.sum(axis=spread).reshape(weights.shape).astype(weights.dtype))


BACKEND = Base()
