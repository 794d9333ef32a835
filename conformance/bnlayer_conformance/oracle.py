"""What must come out, in 60 decimal digits, by the definitions alone.

This is the suite's source of truth. It shares no code with any backend, uses no arrays and no library but mpmath, and
says each definition once, in the words of the design: w, W, Q, m, v, u, sd, xhat, S1, S2. Beside every number it
carries the forward error bound that a stable implementation keeps (`bounds`).

A tensor here is a flat list of numbers in row-major order, and a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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


@dataclass(frozen=True)
class Tracked:
    """One average of one channel, and the error that may have built up on it."""

    value: Number
    error: float = 0.0


Averages = dict[str, Tracked]  # one channel's, by the state arrays' names


@dataclass
class State:
    """gamma and beta are exact (they are given); the averages carry their error bounds."""

    gamma: Numbers | None
    beta: Numbers | None
    averages: list[Averages] | None
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
    adjustment: tuple[Numbers, Numbers] | None = None  # spread to every element of x
    direction: Numbers | None = None  # along which the derivative of dx is asked for


@dataclass
class CallResult:
    """What must come out of one call, each with its allowed error; gradients only where dy was given."""

    y: Bounded
    dx: Bounded | None = None
    dgamma: Bounded | None = None
    dbeta: Bounded | None = None
    dweights: Bounded | None = None
    hvp: Bounded | None = None


@dataclass
class Batch:
    """What one channel of one (ghost) batch contributes to the averages."""

    total: Number
    m: Number
    v: Number
    u: Number
    errors: bounds.Errors


@dataclass
class Channel:
    """One channel of one (ghost) batch: its data, what normalizes it, and the bounds' ingredients.

    `z` is what gamma scales: (xhat r + d) s + b.
    """

    where: list[int]
    w: Numbers
    gamma: Number
    beta: Number
    v: Number
    sd: Number
    p: Numbers | None  # w/W per position; None: the moving statistics normalize
    r: Number
    scale: Numbers
    errors: bounds.Errors
    r_error: float  # relative
    xhat: Numbers
    z: Numbers
    z_error: list[float]


def step(
    spec: dict[str, Any],
    state: State,
    calls: Sequence[OneCall],
    *,
    training: bool,
    update_stats: bool = True,
    frozen_statistics: bool = False,
    renorm_clips: dict[str, Any] | None = None,
) -> tuple[list[CallResult], State]:
    """One step: every call in order, each seeing the averages the one before left; gradients of each call.

    Args:
        spec: a spec's fields by name.
        state: before the step.
        calls: the step's calls.
        renorm_clips: clips that hold in this step instead of the spec's.
    """
    training = training and not frozen_statistics
    if spec["renorm"] is not None and renorm_clips is not None:
        spec = {**spec, "renorm": {**spec["renorm"], **renorm_clips}}
    results = []
    for call in calls:
        result, state = _call(spec, state, call, training=training, update_stats=update_stats)
        results.append(result)
    return results, state


def _call(
    spec: dict[str, Any], state: State, call: OneCall, *, training: bool, update_stats: bool
) -> tuple[CallResult, State]:
    tracked = bool(spec["track_moving_stats"])
    rounding = bounds.Rounding(call.dtype, spec["param_dtype"], spec["stats_dtype"])
    places = channel_places(call.shape, spec["axis"])
    weights = call.weights if call.weights is not None else [mpf(1)] * len(places[0])
    rows = [i // prod(call.shape[1:]) for i in places[0]]

    channels: list[list[Channel]] = []  # by ghost, then by channel
    batches: list[list[Batch]] = [[] for _ in places]
    for ghost in ghosts(spec, call.shape[0]) if training else [range(call.shape[0])]:
        inside = [k for k, row in enumerate(rows) if row in ghost]
        w = [weights[k] for k in inside]
        total = mp.fsum(w)
        batch = (training or not tracked) and len(w) > 0 and total > 0
        of_ghost = []
        for c, where in enumerate(places):
            mine = [where[k] for k in inside]
            x = [call.x[i] for i in mine]
            old = state.averages[c] if state.averages is not None else None
            found = _moments_of(x, w, total, spec, rounding) if batch else None
            if found is not None:
                batches[c].append(found)
            of_ghost.append(_channel(spec, state, call, c, mine, x, w, found, old, rounding, training))
        channels.append(of_ghost)

    enters = training and tracked and update_stats and all(batches)
    t = state.num_updates + 1
    averages = state.averages
    if enters and state.averages is not None:
        averages = [
            _moved(spec, old, _joined(parts, rounding), t, rounding)
            for old, parts in zip(state.averages, batches, strict=True)
        ]
    after = State(state.gamma, state.beta, averages, t if enters else state.num_updates)
    result = CallResult(y=_scatter(call, [(ch.where, _output(ch, rounding)) for ghost in channels for ch in ghost]))
    if call.dy is not None:
        _gradients(spec, call, places, channels, rounding, result)
    return result, after


def ghosts(spec: dict[str, Any], rows: int) -> list[range]:
    """The rows of each ghost batch; all rows together without ghosts."""
    size = spec["virtual_batch_size"]
    if size is None or rows == 0:
        return [range(rows)]
    number = -(-rows // size)
    if spec["virtual_batch_layout"] == "strided":
        return [range(g, rows, number) for g in range(number)]
    cuts = [0]
    for g in range(number):  # the first `rows % number` ghosts take one row more
        cuts.append(cuts[-1] + rows // number + (1 if g < rows % number else 0))
    return [range(a, b) for a, b in pairwise(cuts)]


def _moments_of(x: Numbers, w: Numbers, total: Number, spec: dict[str, Any], rounding: bounds.Rounding) -> Batch:
    m, v, u, one_over_n = moments(x, w)
    errors = bounds.batch_errors(rounding, len(x), m, v, u, one_over_n, mpf(spec["epsilon"]))
    return Batch(total, m, v, u, errors)


def _channel(
    spec: dict[str, Any], state: State, call: OneCall, c: int, where: list[int], x: Numbers, w: Numbers,
    batch: Batch | None, old: Averages | None, rounding: bounds.Rounding, training: bool,
) -> Channel:  # fmt: skip
    eps = mpf(spec["epsilon"])
    r, d, r_error, d_error = mpf(1), mpf(0), 0.0, 0.0
    scale, bias = [mpf(1)] * len(x), [mpf(0)] * len(x)
    if batch is not None:
        m, v, errors = batch.m, batch.v, batch.errors
        sd = mp.sqrt(v + eps)
        if spec["renorm"] is not None and old is not None and training:
            r, d, r_error, d_error = _renorm(spec["renorm"], old, batch, sd, mp.sqrt(eps), rounding)
        if call.adjustment is not None and training:
            scale, bias = ([values[i] for i in where] for values in call.adjustment)
    else:
        mean = old["moving_mean"] if old is not None else Tracked(mpf(0))
        variance = old["moving_variance"] if old is not None else Tracked(mpf(1))
        m, v = mean.value, variance.value
        errors = bounds.moving_errors(rounding, len(x), m, v, mean.error, variance.error, eps)
        sd = mp.sqrt(v + eps)
    xhat = [(xi - m) / sd for xi in x]
    z = [(h * r + d) * s + b for h, s, b in zip(xhat, scale, bias, strict=True)]
    plain = spec["renorm"] is None and call.adjustment is None
    z_error = [
        bounds.xhat_error(errors, h)
        if plain
        else bounds.corrected_error(errors, rounding, h, r, r_error, d, d_error, s, b)
        for h, s, b in zip(xhat, scale, bias, strict=True)
    ]
    return Channel(
        where=where,
        w=w,
        gamma=state.gamma[c] if state.gamma is not None else mpf(1),
        beta=state.beta[c] if state.beta is not None else mpf(0),
        v=v,
        sd=sd,
        p=[wi / batch.total for wi in w] if batch is not None else None,
        r=r,
        scale=scale,
        errors=errors,
        r_error=r_error,
        xhat=xhat,
        z=z,
        z_error=z_error,
    )


def _renorm(
    renorm: dict[str, Any], old: Averages, batch: Batch, sd: Number, floor: Number, rounding: bounds.Rounding
) -> tuple[Number, Number, float, float]:
    """r = sd/den and d = (m - renorm_mean)/den, clipped, den = max(renorm_stddev, sqrt(eps)); their errors."""
    mean, stddev = old["renorm_mean"], old["renorm_stddev"]
    den = max(stddev.value, floor)
    raw_r, raw_d = sd / den, (batch.m - mean.value) / den
    r, d = raw_r, raw_d
    if renorm["r_min"] is not None:
        r = max(r, mpf(renorm["r_min"]))
    if renorm["r_max"] is not None:
        r = min(r, mpf(renorm["r_max"]))
    if renorm["d_max"] is not None:
        d = max(-mpf(renorm["d_max"]), min(d, mpf(renorm["d_max"])))
    r_error, d_error = bounds.renorm_errors(
        batch.errors, rounding, batch.m, mean.value, mean.error, den, stddev.error, raw_d
    )
    # A clip passes on no more error than it gets, and none where it holds by a margin.
    r_held = abs(raw_r - r) > 2 * r_error * raw_r
    d_held = abs(raw_d - d) > 2 * d_error
    return r, d, rounding.u if r_held else r_error, rounding.u * abs(float(d)) if d_held else d_error


def _joined(parts: list[Batch], rounding: bounds.Rounding) -> Batch:
    """What enters for several ghosts: the means of theirs, by their total weights."""
    if len(parts) == 1:
        return parts[0]
    total = mp.fsum(part.total for part in parts)

    def mean(values: Numbers) -> Number:
        return mp.fsum(part.total * value for part, value in zip(parts, values, strict=True)) / total

    shares = [float(part.total / total) for part in parts]
    return Batch(
        total,
        mean([part.m for part in parts]),
        mean([part.v for part in parts]),
        mean([part.u for part in parts]),
        bounds.joined_errors([part.errors for part in parts], shares, [(p.m, p.v, p.u) for p in parts], rounding),
    )


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


def _moved(spec: dict[str, Any], old: Averages, batch: Batch, t: int, rounding: bounds.Rounding) -> Averages:
    """One channel's averages after one update."""
    if spec["nonfinite"] == "keep" and not (mp.isfinite(batch.m) and mp.isfinite(batch.v)):
        return old
    eps, errors = mpf(spec["epsilon"]), batch.errors
    d = 1 - mpf(1) / t if spec["decay"] == "cumulative" else mpf(spec["decay"])
    unbiased = spec["moving_variance_estimator"] == "unbiased"
    entering = Tracked(batch.u, errors.unbiased) if unbiased else Tracked(batch.v, errors.variance)
    mean = Tracked(batch.m, errors.mean)

    def average(name: str, new: Tracked, decay: Number = d) -> Tracked:
        was = old[name]
        error = bounds.average_error(rounding, decay, was.value, was.error, new.value, new.error)
        return Tracked(decay * was.value + (1 - decay) * new.value, error)

    def debiased(hidden: Tracked) -> Tracked:
        started = 1 - d**t
        value = hidden.value / started
        return Tracked(value, bounds.debiased_error(rounding, hidden.error, started, value))

    if spec["renorm"] is not None:
        stddev = Tracked(mp.sqrt(batch.v + eps), errors.rho * float(mp.sqrt(batch.v + eps)))
        deviation = average("moving_stddev", stddev)
        squared = deviation.value**2 - eps
        return {
            "renorm_mean": average("renorm_mean", mean, mpf(spec["renorm"]["decay"])),
            "renorm_stddev": average("renorm_stddev", stddev, mpf(spec["renorm"]["decay"])),
            "moving_mean": average("moving_mean", mean),
            "moving_stddev": deviation,
            "moving_variance": Tracked(
                max(squared, mpf(0)), bounds.squared_error(rounding, deviation.value, deviation.error, eps)
            ),
        }
    after: Averages = {}
    if spec["zero_debias"] == "none":
        after["moving_mean"] = average("moving_mean", mean)
    else:
        after["hidden_mean"] = average("hidden_mean", mean)
        after["moving_mean"] = debiased(after["hidden_mean"])
    if spec["zero_debias"] == "all":
        after["hidden_variance"] = average("hidden_variance", entering)
        after["moving_variance"] = debiased(after["hidden_variance"])
    else:
        after["moving_variance"] = average("moving_variance", entering)
    return after


def _output(ch: Channel, rounding: bounds.Rounding) -> Bounded:
    y = [ch.gamma * z + ch.beta for z in ch.z]
    errors = [bounds.output_error(rounding, ch.gamma, ch.beta, e, yi) for e, yi in zip(ch.z_error, y, strict=True)]
    return Bounded(y, errors)


def _gradients(
    spec: dict[str, Any], call: OneCall, places: list[list[int]], channels: list[list[Channel]],
    rounding: bounds.Rounding, result: CallResult,
) -> None:  # fmt: skip
    assert call.dy is not None
    eps, features = mpf(spec["epsilon"]), len(places)
    position = {i: k for where in places for k, i in enumerate(where)}
    dx: list[tuple[list[int], Bounded]] = []
    hvp: list[tuple[list[int], Bounded]] = []
    dgamma = Bounded([mpf(0)] * features, [0.0] * features)
    dweights = Bounded([mpf(0)] * (call.real_weights or 0), [0.0] * (call.real_weights or 0))
    for ghost in channels:
        for c, ch in enumerate(ghost):
            dy = [call.dy[i] for i in ch.where]
            # What lies under a mask and is not finite takes no part, as long as no gradient is sent there (dy = 0).
            sound = [wi > 0 or mp.isfinite(h) for h, wi in zip(ch.xhat, ch.w, strict=True)]
            xhat = [h if ok else mpf(0) for h, ok in zip(ch.xhat, sound, strict=True)]
            z = [zi if ok else mpf(0) for zi, ok in zip(ch.z, sound, strict=True)]
            g = [d * s for d, s in zip(dy, ch.scale, strict=True)]
            s1, s2 = mp.fsum(g), mp.fsum(gi * h for gi, h in zip(g, xhat, strict=True))
            p = ch.p if ch.p is not None else [mpf(0)] * len(dy)
            factor = ch.gamma * ch.r / ch.sd
            dxs = [factor * (gi - pi * (s1 + h * s2)) for gi, h, pi in zip(g, xhat, p, strict=True)]
            sums = bounds.gradient_sums(ch.errors, g, xhat)
            dx_errors = [
                bounds.dx_error(ch.errors, rounding, sums, factor, ch.r_error, gi, h, pi, s2, dxi)
                for gi, h, pi, dxi in zip(g, xhat, p, dxs, strict=True)
            ]
            dx.append((ch.where, Bounded(dxs, dx_errors)))
            if call.direction is not None:
                t = [call.direction[i] if ok else mpf(0) for i, ok in zip(ch.where, sound, strict=True)]
                second = _second_order(ch, g, xhat, p, t, factor, s2, Bounded(dxs, dx_errors), sums, rounding)
                hvp.append((ch.where, second))
            dgamma.values[c] += mp.fsum(d * zi for d, zi in zip(dy, z, strict=True))
            dgamma.tolerance[c] += bounds.product_sum_error(ch.errors, dy, z, ch.z_error)
            if call.real_weights is not None and ch.p is not None:
                assert call.weight_of is not None
                ratio, total = ch.v / (ch.v + eps), mp.fsum(ch.w)
                for i, h in zip(ch.where, xhat, strict=True):
                    k = call.weight_of[position[i]]
                    term = -ch.gamma * ch.r / total * (h * s1 + (h * h - ratio) / 2 * s2)
                    dweights.values[k] += term
                    dweights.tolerance[k] += bounds.dweight_error(
                        ch.errors, rounding, sums, ch.gamma * ch.r / total, ch.r_error, h, ratio, s1, s2
                    )
    result.dx = _scatter(call, dx)
    if call.direction is not None:
        result.hvp = _scatter(call, hvp)
    if spec["scale"]:
        result.dgamma = Bounded(dgamma.values, [
            bounds.rounded(rounding.param, rounding.param_floor, e, v)
            for v, e in zip(dgamma.values, dgamma.tolerance, strict=True)
        ])  # fmt: skip
    if spec["center"]:
        dys = [[call.dy[i] for i in where] for where in places]
        result.dbeta = Bounded([mp.fsum(dy) for dy in dys], [bounds.dbeta_error(rounding, dy) for dy in dys])
    if call.real_weights is not None:
        # The last rounding, to the weights' own dtype.
        out = bounds.unit_roundoff(call.weights_dtype)
        dweights.tolerance[:] = [
            e + out * abs(float(v)) for e, v in zip(dweights.tolerance, dweights.values, strict=True)
        ]  # fmt: skip
        result.dweights = dweights


def _second_order(
    ch: Channel, g: Numbers, xhat: Numbers, p: Numbers, t: Numbers, factor: Number, s2: Number, dx: Bounded,
    sums: bounds.Sums, rounding: bounds.Rounding,
) -> Bounded:  # fmt: skip
    """The derivative of dx = F (g - p (S1 + xhat S2)), F = gamma r/sd, when x moves along t; g and r are constant.

    The mean moves by sum(pt), the deviation by q = sum(p xhat t), so xhat' = (t - sum(pt) - xhat q)/sd,
    S2' = sum(g xhat') and F' = -F q/sd: dx' = -dx q/sd - F p (xhat' S2 + xhat S2').
    """
    mean = mp.fsum(pi * ti for pi, ti in zip(p, t, strict=True))
    q = mp.fsum(pi * h * ti for pi, h, ti in zip(p, xhat, t, strict=True))
    moved = [(ti - mean - h * q) / ch.sd for ti, h in zip(t, xhat, strict=True)]
    s2_moved = mp.fsum(gi * d for gi, d in zip(g, moved, strict=True))
    values = [
        -dxi * q / ch.sd - factor * pi * (d * s2 + h * s2_moved)
        for dxi, pi, d, h in zip(dx.values, p, moved, xhat, strict=True)
    ]
    tolerance = bounds.second_order_errors(
        ch.errors, rounding, sums, factor, ch.r_error, ch.sd, g, xhat, p, t, mean, q, moved, s2, s2_moved, dx.values,
        dx.tolerance, values,
    )  # fmt: skip
    return Bounded(values, tolerance)


def channel_places(shape: tuple[int, ...], axis: int) -> list[list[int]]:
    """For each channel the flat places of its elements, in row-major order."""
    axis %= len(shape)
    inner = prod(shape[axis + 1 :])
    places: list[list[int]] = [[] for _ in range(shape[axis])]
    for i in range(prod(shape)):
        places[i // inner % shape[axis]].append(i)
    return places


def _scatter(call: OneCall, parts: list[tuple[list[int], Bounded]]) -> Bounded:
    values: Numbers = [None] * len(call.x)
    tolerance = [0.0] * len(call.x)
    for where, part in parts:
        for i, value, error in zip(where, part.values, part.tolerance, strict=True):
            values[i], tolerance[i] = value, error
    return Bounded(values, tolerance)
