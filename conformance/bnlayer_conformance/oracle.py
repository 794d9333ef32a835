"""What must come out, in 60 decimal digits, by the definitions alone.

This is the suite's source of truth. It shares no code with any backend, uses no arrays and no library but mpmath, and
says each definition once, in the words of the design: w, W, Q, m, v, u, sd, xhat, S1, S2. Beside every number it
carries the forward error bound that a stable implementation keeps (`bounds`).

A tensor here is a flat list of numbers in row-major order, and a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

from mpmath import mp, mpf

from . import bounds

DIGITS: Final = 60
mp.dps = DIGITS

Number = Any  # an mpf
Numbers = list[Number]


@dataclass(frozen=True)
class Bounded:
    """Exact values and the error that is allowed on each."""

    values: Numbers
    tolerance: list[float]


@dataclass
class Average:
    """The moving statistics of one channel, with the error that may have built up on them."""

    mean: Number
    variance: Number
    mean_error: float = 0.0
    variance_error: float = 0.0


@dataclass
class State:
    """gamma and beta are exact (they are given); the averages carry their error bounds."""

    gamma: Numbers | None
    beta: Numbers | None
    averages: list[Average] | None
    num_updates: int


@dataclass(frozen=True)
class OneCall:
    """A call's tensors; `weights` are already spread to one number per position of a channel, in the order of the
    reduced positions; `weight_of` maps each such position to its place in the weights as given."""

    x: Numbers
    shape: tuple[int, ...]
    dtype: str
    dy: Numbers | None = None
    weights: Numbers | None = None
    weight_of: Sequence[int] | None = None
    real_weights: int | None = None  # how many weights want a gradient; None for a mask
    weights_dtype: str = "float32"


@dataclass
class CallResult:
    """What must come out of one call, each with its allowed error; gradients only where dy was given."""

    y: Bounded
    dx: Bounded | None = None
    dgamma: Bounded | None = None
    dbeta: Bounded | None = None
    dweights: Bounded | None = None


@dataclass
class Channel:
    """One channel of one call: its data, what normalizes it, and the bounds' ingredients."""

    x: Numbers
    gamma: Number
    beta: Number
    m: Number
    v: Number
    p: Numbers | None  # w/W per position; None: the moving statistics normalize
    errors: bounds.Errors
    xhat: Numbers = field(default_factory=list)


def step(
    spec: dict[str, Any],
    state: State,
    calls: Sequence[OneCall],
    *,
    training: bool,
    update_stats: bool = True,
    frozen_statistics: bool = False,
) -> tuple[list[CallResult], State]:
    """One step: every call in order, each seeing the averages the one before left; gradients of each call.

    Args:
        spec: a spec's fields by name.
        state: before the step.
        calls: the step's calls.
    """
    training = training and not frozen_statistics
    results = []
    for call in calls:
        result, state = _call(spec, state, call, training=training, update_stats=update_stats)
        results.append(result)
    return results, state


def _call(
    spec: dict[str, Any], state: State, call: OneCall, *, training: bool, update_stats: bool
) -> tuple[CallResult, State]:
    eps, tracked = mpf(spec["epsilon"]), bool(spec["track_moving_stats"])
    places = channel_places(call.shape, spec["axis"])
    count = len(places[0])
    w = call.weights if call.weights is not None else [mpf(1)] * count
    total = mp.fsum(w)
    batch = (training or not tracked) and count > 0 and total > 0
    rounding = bounds.Rounding(call.dtype, spec["param_dtype"], spec["stats_dtype"])
    update = training and tracked and update_stats and batch
    t = state.num_updates + 1
    decay = 1 - mpf(1) / t if spec["decay"] == "cumulative" else mpf(spec["decay"])

    channels, averages = [], []
    for c, where in enumerate(places):
        x = [call.x[i] for i in where]
        old = state.averages[c] if state.averages is not None else Average(mpf(0), mpf(1))
        if batch:
            m, v, u, one_over_n = moments(x, w)
            errors = bounds.batch_errors(rounding, count, m, v, u, one_over_n, eps)
            new = u if spec["moving_variance_estimator"] == "unbiased" else v
            new_error = errors.unbiased if spec["moving_variance_estimator"] == "unbiased" else errors.variance
            keep = spec["nonfinite"] == "keep" and not (mp.isfinite(m) and mp.isfinite(v))
            averages.append(old if keep else _moved(old, decay, m, new, errors.mean, new_error, rounding))
            p = [wi / total for wi in w]
        else:
            m, v, p = old.mean, old.variance, None
            errors = bounds.moving_errors(rounding, m, v, old.mean_error, old.variance_error, eps)
            averages.append(old)
        gamma = state.gamma[c] if state.gamma is not None else mpf(1)
        beta = state.beta[c] if state.beta is not None else mpf(0)
        channel = Channel(x, gamma, beta, m, v, p, errors)
        sd = mp.sqrt(v + eps)
        channel.xhat = [(xi - m) / sd for xi in x]
        channels.append(channel)

    after = State(state.gamma, state.beta, averages if update else state.averages, t if update else state.num_updates)
    result = CallResult(y=_scatter(call, places, [_output(ch, rounding) for ch in channels]))
    if call.dy is not None:
        _gradients(spec, call, places, channels, total, w, rounding, result)
    return result, after


def moments(x: Numbers, w: Numbers) -> tuple[Number, Number, Number, Number]:
    """m = sum(wx)/W, v = sum(w(x-m)^2)/W, u = v/(1-Q/W^2) (0 where n = 1), and Q/W^2 = 1/n.

    x counts only where w > 0: anything may lie under a mask.
    """
    kept = [(xi, wi) for xi, wi in zip(x, w, strict=True) if wi > 0]
    total = mp.fsum(wi for _, wi in kept)
    m = mp.fsum(wi * xi for xi, wi in kept) / total
    v = mp.fsum(wi * (xi - m) ** 2 for xi, wi in kept) / total
    one_over_n = mp.fsum(wi * wi for _, wi in kept) / total**2
    u = mpf(0) if len(kept) == 1 else v / (1 - one_over_n)
    return m, v, u, one_over_n


def _moved(
    old: Average, decay: Number, mean: Number, variance: Number, mean_error: float, variance_error: float,
    rounding: bounds.Rounding,
) -> Average:  # fmt: skip
    return Average(
        decay * old.mean + (1 - decay) * mean,
        decay * old.variance + (1 - decay) * variance,
        bounds.average_error(rounding, decay, old.mean, old.mean_error, mean, mean_error),
        bounds.average_error(rounding, decay, old.variance, old.variance_error, variance, variance_error),
    )


def _output(ch: Channel, rounding: bounds.Rounding) -> Bounded:
    y = [ch.gamma * h + ch.beta for h in ch.xhat]
    errors = [
        bounds.output_error(ch.errors, rounding, ch.gamma, ch.beta, h, yi) for h, yi in zip(ch.xhat, y, strict=True)
    ]
    return Bounded(y, errors)


def _gradients(
    spec: dict[str, Any], call: OneCall, places: list[list[int]], channels: list[Channel], total: Number, w: Numbers,
    rounding: bounds.Rounding, result: CallResult,
) -> None:  # fmt: skip
    assert call.dy is not None
    eps = mpf(spec["epsilon"])
    dx, dgamma, dbeta = [], Bounded([], []), Bounded([], [])
    dweights = Bounded([mpf(0)] * (call.real_weights or 0), [0.0] * (call.real_weights or 0))
    for ch, where in zip(channels, places, strict=True):
        dy = [call.dy[i] for i in where]
        # What lies under a mask and is not finite takes no part, as long as no gradient is sent there (dy = 0).
        xhat = [h if wi > 0 or mp.isfinite(h) else mpf(0) for h, wi in zip(ch.xhat, w, strict=True)]
        s1, s2 = mp.fsum(dy), mp.fsum(d * h for d, h in zip(dy, xhat, strict=True))
        sd = mp.sqrt(ch.v + eps)
        p = ch.p if ch.p is not None else [mpf(0)] * len(dy)
        dxs = [ch.gamma / sd * (d - pi * (s1 + h * s2)) for d, h, pi in zip(dy, xhat, p, strict=True)]
        sums = bounds.gradient_sums(ch.errors, dy, xhat)
        dx.append(Bounded(dxs, [
            bounds.dx_error(ch.errors, rounding, sums, ch.gamma / sd, d, h, pi, s2, dxi)
            for d, h, pi, dxi in zip(dy, xhat, p, dxs, strict=True)
        ]))  # fmt: skip
        dgamma.values.append(s2)
        dgamma.tolerance.append(bounds.dgamma_error(ch.errors, rounding, sums, s2))
        dbeta.values.append(s1)
        dbeta.tolerance.append(bounds.dbeta_error(ch.errors, rounding, sums, s1))
        if call.real_weights is not None and ch.p is not None:
            assert call.weight_of is not None
            r = ch.v / (ch.v + eps)
            for i, h in zip(call.weight_of, xhat, strict=True):
                dweights.values[i] += -ch.gamma / total * (h * s1 + (h * h - r) / 2 * s2)
                dweights.tolerance[i] += bounds.dweight_error(ch.errors, rounding, sums, ch.gamma / total, h, r, s1, s2)
    result.dx = _scatter(call, places, dx)
    result.dgamma = dgamma if spec["scale"] else None
    result.dbeta = dbeta if spec["center"] else None
    if call.real_weights is not None:
        # The last rounding, to the weights' own dtype.
        out = bounds.unit_roundoff(call.weights_dtype)
        dweights.tolerance[:] = [
            e + out * abs(float(g)) for e, g in zip(dweights.tolerance, dweights.values, strict=True)
        ]  # fmt: skip
        result.dweights = dweights


def channel_places(shape: tuple[int, ...], axis: int) -> list[list[int]]:
    """For each channel the flat places of its elements, in row-major order."""
    axis %= len(shape)
    inner = prod(shape[axis + 1 :])
    places: list[list[int]] = [[] for _ in range(shape[axis])]
    for i in range(prod(shape)):
        places[i // inner % shape[axis]].append(i)
    return places


def _scatter(call: OneCall, places: list[list[int]], parts: list[Bounded]) -> Bounded:
    values: Numbers = [None] * len(call.x)
    tolerance = [0.0] * len(call.x)
    for where, part in zip(places, parts, strict=True):
        for i, value, error in zip(where, part.values, part.tolerance, strict=True):
            values[i], tolerance[i] = value, error
    return Bounded(values, tolerance)
