"""The smallest complete bnlayer backend: a batch norm layer in plain NumPy, and the adapter that makes it a backend.

It computes in float64 whatever x is, and rounds once at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnlayer.call import plan_call, trains
from bnlayer.contract import CallOutcome, Missing, NDArray, Outcome, Request
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

State = BatchNormState[NDArray]

FIELDS = ("renorm", "virtual_batch_size", "zero_debias", "synchronized")
NOT = "not implemented"
MISSING = Missing(fields=dict.fromkeys(FIELDS, NOT), adjustment=NOT, shards=NOT, direction=NOT)


class BatchNorm:
    """The layer. After `y = layer(x, training=True)`, `layer.backward(dy)` gives the gradients of that call."""

    def __init__(self, spec: BatchNormSpec, state: State) -> None:
        self.spec, self.state, self.frozen_statistics = spec, state, False

    def __call__(
        self, x: NDArray, *, training: bool, weights: NDArray | None = None, update_stats: bool = True
    ) -> NDArray:
        spec, state, training = self.spec, self.state, trains(self.spec, training, self.frozen_statistics)
        given = None if weights is None else weights.shape
        plan = plan_call(spec, x.shape, x.dtype.name, training=training, update_stats=update_stats, weights_shape=given)

        def per_channel(values: NDArray | None, otherwise: float) -> NDArray:
            values = np.full(spec.num_features, otherwise) if values is None else values
            return values.astype(np.float64).reshape(plan.channel_shape)

        def total(values: NDArray) -> NDArray:
            return np.asarray(values.sum(axis=plan.reduced, keepdims=True))

        x64, share = x.astype(np.float64), None
        w_shape = tuple(length or 0 for length in plan.weights_shape or ())  # broadcasts against x
        w = np.ones_like(x64) if weights is None else weights.astype(np.float64).reshape(w_shape)
        if not np.all((w >= 0) & (w < np.inf)):
            raise InputError("weights must be finite and not negative.")
        w = np.broadcast_to(w, x.shape).take([0], plan.axis)  # one weight for each position of a channel
        mean, variance = per_channel(state.moving_mean, 0), per_channel(state.moving_variance, 1)
        if plan.batch_statistics and w.any():  # without any weight the moving statistics normalize
            share = w / w.max()  # so that neither huge nor tiny weights overflow or vanish in the sum
            share /= share.sum()
            seen = np.where(w > 0, x64, 0)  # anything may lie under a mask
            mean = total(share * seen)
            variance = total(share * (seen - mean) ** 2)  # never E[x^2] - E[x]^2, which cancels
            self.state = moved(state, spec, mean.ravel(), variance.ravel(), np.sum(share**2)) if plan.update else state
        gamma, sd = per_channel(state.gamma, 1), np.sqrt(variance + spec.epsilon)
        xhat = (x64 - mean) / sd

        def backward(dy: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray | None]:
            h = np.where((w > 0) | np.isfinite(xhat), xhat, 0)  # what is not finite under a mask stays there
            s1, s2 = total(dy.astype(np.float64)), total(dy * h)
            pull = 0 if share is None else share * (s1 + h * s2)  # the moving statistics do not depend on x
            dx, dweights = (gamma / sd * (dy - pull)).astype(x.dtype), None
            if weights is not None and weights.dtype.kind not in "biu":  # a mask has no gradient
                each = np.where(share is None, 0, -gamma / w.sum() * (h * s1 + (h**2 - variance / sd**2) / 2 * s2))
                spread = tuple(i for i, length in enumerate(w_shape) if length == 1)
                dweights = each.sum(axis=spread).reshape(weights.shape).astype(weights.dtype)
            return dx, s2.ravel(), s1.ravel(), dweights

        self.backward = backward
        return (gamma * xhat + per_channel(state.beta, 0)).astype(x.dtype)


def moved(state: State, spec: BatchNormSpec, mean: NDArray, variance: NDArray, one_over_n: float) -> State:
    """The state after one batch's statistics entered it."""
    t = state.num_updates + 1
    decay = 1 - 1 / t if spec.decay == "cumulative" else float(spec.decay)
    keep = ~np.isfinite(mean + variance) & (spec.nonfinite == "keep")
    if spec.moving_variance_estimator == "unbiased":
        variance = variance / (1 - one_over_n) if one_over_n < 1 else 0 * variance
    old = np.array([state.moving_mean, state.moving_variance])
    new = decay * old.astype(np.float64) + (1 - decay) * np.array([mean, variance])
    new = np.where(keep, old, new.astype(old.dtype))
    return state.replace(moving_mean=new[0], moving_variance=new[1], num_updates=t)


class PlainBackend:
    """The adapter: `bnlayer.contract.Backend` over the layer."""

    name = "plain"

    def version(self) -> str:
        return np.__version__

    def owns(self, layer: Any) -> bool:
        return isinstance(layer, BatchNorm)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        return MISSING.reason(spec, request)

    def build(self, spec: BatchNormSpec, state: State | None = None, *, device: Any = None) -> BatchNorm:
        MISSING.refuse(self.name, spec)
        if device not in (None, "cpu"):
            raise UnsupportedError(f"backend 'plain' runs on the CPU; got device {device!r}.")
        return BatchNorm(spec, BatchNormState.initial(spec) if state is None else state.checked(spec))

    def extract(self, layer: BatchNorm) -> tuple[BatchNormSpec, State]:
        return layer.spec, layer.state.copy()

    def load(self, layer: BatchNorm, state: State) -> BatchNorm:
        layer.state = state.checked(layer.spec)
        return layer

    @np.errstate(all="ignore")  # NaN and infinities are results here; the vectors say which
    def step(self, layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
        MISSING.refuse(self.name, layer.spec, request)
        layer.frozen_statistics = request.frozen_statistics
        outcomes, got = [], []
        for call in request.calls:
            y = layer(call.x, training=request.training, weights=call.weights, update_stats=request.update_stats)
            dx, dgamma, dbeta, dweights = (None,) * 4 if call.dy is None else layer.backward(call.dy)
            outcomes.append(CallOutcome(y, dx=dx, dweights=dweights))
            got.append((dgamma, dbeta))
        dgamma, dbeta = summed([g for g, _ in got], layer.state.gamma), summed([b for _, b in got], layer.state.beta)
        return layer, Outcome(tuple(outcomes), state=layer.state, dgamma=dgamma, dbeta=dbeta)


def summed(parts: list[NDArray | None], like: NDArray | None) -> NDArray | None:
    """A parameter's gradient over all calls, in its dtype; None without parts, or without the parameter."""
    given = [part for part in parts if part is not None]
    return np.sum(given, axis=0).astype(like.dtype) if given and like is not None else None


BACKEND = PlainBackend()
