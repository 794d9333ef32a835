"""A correct batch norm, written so that every rule is a line of its own: the base that mutants are made from.

Not for use: it is slow and plain on purpose. `catalogue` names the mutants, `build` makes them from this source text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnlayer.call import plan_call, trains
from bnlayer.contract import Call, CallOutcome, Missing, NDArray, Outcome, Request
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

_MISSING = Missing(
    fields=dict.fromkeys(("renorm", "virtual_batch_size", "zero_debias", "synchronized"), "not part of the mutants"),
    adjustment="not part of the mutants",
)


@dataclass
class Layer:
    """A spec and its state."""

    spec: BatchNormSpec
    state: BatchNormState[NDArray]


@dataclass
class Tape:
    """What one forward call leaves for its backward call. `p` is None where the moving statistics normalized."""

    x: NDArray
    xhat: NDArray
    variance: NDArray
    sd: NDArray
    p: NDArray | None
    w: NDArray
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
        return _MISSING.reason(spec, request)

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
                y, tape = _forward(layer, call, request)
                tapes.append((call, y, tape))
            for call, y, tape in tapes:
                if call.dy is None:
                    outcomes.append(CallOutcome(y))
                    continue
                dx, dgamma, dbeta, dweights = _backward(before, layer.spec, call, tape)
                gradients.append((dgamma, dbeta))
                outcomes.append(CallOutcome(y, dx=dx, dweights=dweights))
            sum_gamma = _sum([g for g, _ in gradients], before.gamma)
            sum_beta = _sum([b for _, b in gradients], before.beta)
        return layer, Outcome(tuple(outcomes), state=layer.state, dgamma=sum_gamma, dbeta=sum_beta)


def _sum(parts: list[NDArray], like: NDArray | None) -> NDArray | None:
    return None if like is None or not parts else np.sum(parts, axis=0).astype(like.dtype)


def _forward(layer: Layer, call: Call, request: Request) -> tuple[NDArray, Tape]:
    spec, state = layer.spec, layer.state
    training = trains(spec, request.training, request.frozen_statistics)
    given = None if call.weights is None else call.weights.shape
    plan_call(spec, call.x.shape, call.x.dtype.name, training=training, weights_shape=given)
    if call.weights is not None and not bool(np.all((call.weights >= 0) & (call.weights < np.inf))):
        raise InputError("weights must be finite and not negative.")
    arithmetic = np.float64 if call.x.dtype == np.float64 else np.float32
    x = call.x.astype(arithmetic)
    axis = spec.axis % x.ndim
    axes = tuple(i for i in range(x.ndim) if i != axis)
    shape = tuple(spec.num_features if i == axis else 1 for i in range(x.ndim))

    def per_channel(values: NDArray) -> NDArray:
        return values.astype(arithmetic).reshape(shape)

    def total(values: NDArray) -> NDArray:
        summed = np.sum(values, axis=axes, keepdims=True, dtype=np.float64)
        return np.asarray(summed.astype(arithmetic))

    w = _spread(call.weights, x.shape, axis)
    seen = np.where(w > 0, x, 0)
    W = np.sum(w)
    count = w.size
    batch = training or not spec.track_moving_stats
    batch = batch and bool(W > 0)
    if batch:
        p = (w / W).astype(arithmetic)
        mean = total(p * seen)
        variance = total(p * np.square(seen - mean))
        one_over_n = np.sum(np.square(w / W))
        single = np.count_nonzero(w) == 1
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
    y = xhat
    if state.gamma is not None:
        y = y * per_channel(state.gamma)
    if state.beta is not None:
        y = y + per_channel(state.beta)
    y = y.astype(call.x.dtype)
    moves = training and request.update_stats and spec.track_moving_stats and batch and count > 0
    if moves and state.moving_mean is not None and state.moving_variance is not None:
        t = state.num_updates + 1
        d = 1 - 1 / t if spec.decay == "cumulative" else float(spec.decay)
        entering = unbiased if spec.moving_variance_estimator == "unbiased" else variance
        old_mean = state.moving_mean.astype(np.float64)
        old_variance = state.moving_variance.astype(np.float64)
        new_mean = d * old_mean + (1 - d) * mean.reshape(-1)
        new_variance = d * old_variance + (1 - d) * entering.reshape(-1)
        if spec.nonfinite == "keep":
            good = np.isfinite(mean).reshape(-1) & np.isfinite(variance).reshape(-1)
            new_mean = np.where(good, new_mean, state.moving_mean)
            new_variance = np.where(good, new_variance, state.moving_variance)
        new_mean = new_mean.astype(state.moving_mean.dtype)
        new_variance = new_variance.astype(state.moving_variance.dtype)
        layer.state = state.replace(moving_mean=new_mean, moving_variance=new_variance, num_updates=t)
    return y, Tape(x, xhat, variance, sd, p, w, axis, axes)


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
    state: BatchNormState[NDArray], spec: BatchNormSpec, call: Call, tape: Tape
) -> tuple[NDArray, NDArray, NDArray, NDArray | None]:
    assert call.dy is not None
    x, sd, axes = tape.x, tape.sd, tape.axes
    shape = sd.shape
    dy = call.dy.astype(x.dtype)
    xhat = np.where((tape.w > 0) | np.isfinite(tape.xhat), tape.xhat, 0)

    def total(values: NDArray) -> NDArray:
        return np.asarray(np.sum(values, axis=axes, keepdims=True, dtype=np.float64))

    s1 = total(dy)
    s2 = total(dy * xhat)
    gamma = np.ones(shape) if state.gamma is None else state.gamma.astype(np.float64).reshape(shape)
    p = tape.p
    inner = dy
    if p is not None:
        inner = dy - p * (s1 + xhat * s2)
    dx = gamma / sd * inner
    dgamma = s2.reshape(-1)
    dbeta = s1.reshape(-1)
    dweights = None
    if call.weights is not None and call.weights.dtype.kind not in "biu":
        ratio = tape.variance / (tape.variance + spec.epsilon)
        each = xhat * s1 + 0.5 * (np.square(xhat) - ratio) * s2
        each = -gamma / max(float(np.sum(tape.w)), 1e-300) * each
        if tape.p is None:
            each = np.zeros(x.shape)
        dweights = _gathered(each, call.weights, tape.axis)
    return dx.astype(call.x.dtype), dgamma, dbeta, dweights


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
