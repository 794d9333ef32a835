"""The oracle's gradients against numerical derivatives, in 60 digits, of its own forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from mpmath import mp, mpf

from bnlayer.spec import BatchNormSpec, Renorm
from bnlayer_conformance import oracle
from bnlayer_conformance.authoring import draw
from bnlayer_conformance.authoring.case import exact

H = mpf(10) ** -20
SHAPE, AXIS = (3, 2, 2), 1
PLACES = oracle.channel_places(SHAPE, AXIS)


def _spec(**fields: Any) -> dict[str, Any]:
    return BatchNormSpec(2, axis=AXIS, epsilon=1e-3, decay=0.75, **fields).to_dict()


def _state() -> oracle.State:
    averages = [
        {
            "moving_mean": oracle.Tracked(mpf(mean)),
            "moving_variance": oracle.Tracked(mpf(variance)),
            "renorm_mean": oracle.Tracked(mpf(40)),  # far enough that the clips below hold
            "renorm_stddev": oracle.Tracked(mpf(20)),
            "moving_stddev": oracle.Tracked(mpf(1)),
        }
        for mean, variance in (("0.3", "1.7"), ("-1.1", "0.4"))
    ]
    return oracle.State([mpf("1.25"), mpf("-0.5")], [mpf("0.1"), mpf(2)], averages, 0)


def _call(weights: list[Any] | None, adjusted: bool = False) -> oracle.OneCall:
    count = len(PLACES[0])
    adjustment = (exact(draw.normal("oracle/s", SHAPE, "float64")), exact(draw.normal("oracle/b", SHAPE, "float64")))
    return oracle.OneCall(
        x=exact(draw.normal("oracle/x", SHAPE, "float64", mean=0.5, std=2.0)),
        shape=SHAPE,
        dtype="float64",
        dy=exact(draw.normal("oracle/dy", SHAPE, "float64")),
        weights=weights,
        weight_of=list(range(count)),
        real_weights=None if weights is None else count,
        weights_dtype="float64",
        adjustment=adjustment if adjusted else None,
    )


WEIGHTS = [mpf(w) for w in ("1", "0.5", "2", "0.25", "3", "1.5")]
MODES = [
    pytest.param(True, {}, None, id="train"),
    pytest.param(False, {}, None, id="eval"),
    pytest.param(True, {}, WEIGHTS, id="weighted"),
    pytest.param(False, {"track_moving_stats": False}, WEIGHTS, id="untracked-weighted"),
    pytest.param(True, {"scale": False}, WEIGHTS, id="no-gamma"),
    pytest.param(True, {"virtual_batch_size": 2}, WEIGHTS, id="ghosts-strided"),
    pytest.param(True, {"virtual_batch_size": 2, "virtual_batch_layout": "consecutive"}, WEIGHTS, id="ghosts"),
    # r and d carry no gradient: here their clips hold, so that they are constant in truth.
    pytest.param(True, {"renorm": Renorm(r_min=0.75, r_max=2.0, d_max=0.5)}, WEIGHTS, id="renorm"),
    pytest.param(True, {"adjusted": True}, WEIGHTS, id="adjusted"),
]


def _loss(spec: dict[str, Any], state: oracle.State, call: oracle.OneCall, training: bool) -> Any:
    (result,), _ = oracle.step(spec, state, [replace(call, dy=None)], training=training)
    assert call.dy is not None
    return mp.fsum(y * d for y, d in zip(result.y.values, call.dy, strict=True))


def _derivatives(values: list[Any], loss: Any) -> list[Any]:
    """Central differences of loss(values) with step 1e-20, right to about 1e-38."""

    def at(i: int, step: Any) -> Any:
        return loss([v + step if j == i else v for j, v in enumerate(values)])

    return [(at(i, H) - at(i, -H)) / (2 * H) for i in range(len(values))]


def _close(got: list[Any], want: list[Any]) -> None:
    assert len(got) == len(want)
    assert max(abs(g - w) for g, w in zip(got, want, strict=True)) < mpf(10) ** -30


@pytest.mark.parametrize(("training", "fields", "weights"), MODES)
def test_gradients_are_the_derivatives_of_the_forward_pass(
    training: bool, fields: dict[str, Any], weights: list[Any] | None
) -> None:
    fields = dict(fields)
    call = _call(weights, fields.pop("adjusted", False))
    spec, state = _spec(**fields), _state()
    if fields.get("scale") is False:
        state.gamma = None
    if fields.get("track_moving_stats") is False:
        state.averages = None
    (result,), _ = oracle.step(spec, state, [call], training=training)
    assert result.dx is not None
    _close(result.dx.values, _derivatives(call.x, lambda x: _loss(spec, state, replace(call, x=x), training)))
    assert result.dbeta is not None
    _close(result.dbeta.values, _derivatives(state.beta, lambda b: _loss(spec, replace(state, beta=b), call, training)))  # type: ignore[arg-type]
    if state.gamma is not None:
        assert result.dgamma is not None
        _close(
            result.dgamma.values,
            _derivatives(state.gamma, lambda g: _loss(spec, replace(state, gamma=g), call, training)),
        )
    else:
        assert result.dgamma is None
    if weights is not None:
        assert result.dweights is not None
        _close(
            result.dweights.values,
            _derivatives(weights, lambda w: _loss(spec, state, replace(call, weights=w), training)),
        )


def test_weight_gradient_at_zero_is_the_limit_from_above() -> None:
    weights = [mpf(0), *WEIGHTS[1:]]
    spec, state, call = _spec(), _state(), _call(weights)
    (result,), _ = oracle.step(spec, state, [call], training=True)
    assert result.dweights is not None

    def loss(w0: Any) -> Any:
        return _loss(spec, state, replace(call, weights=[w0, *weights[1:]]), True)

    assert abs((loss(H) - loss(mpf(0))) / H - result.dweights.values[0]) < mpf(10) ** -18


def test_moments_against_textbook_cases() -> None:
    m, v, u, one_over_n = oracle.moments([mpf(1), mpf(4)], [mpf(1), mpf(1)])
    assert (m, v, u, one_over_n) == (mpf("2.5"), mpf("2.25"), mpf("4.5"), mpf("0.5"))
    m, v, u, _ = oracle.moments([mpf(1), mpf(7), mpf(4)], [mpf(1), mpf(0), mpf(1)])
    assert (m, v, u) == (mpf("2.5"), mpf("2.25"), mpf("4.5"))
    _, v, u, one_over_n = oracle.moments([mpf(3), mpf(7)], [mpf("0.3"), mpf(0)])
    assert (v, u, one_over_n) == (0, 0, 1)


def test_moments_agree_with_the_standard_library() -> None:
    from fractions import Fraction
    from statistics import mean, pvariance, variance

    x = [Fraction(n, 7) for n in (3, -8, 12, 5, 1)]
    m, v, u, _ = oracle.moments([mpf(f.numerator) / f.denominator for f in x], [mpf(1)] * 5)
    for got, want in ((m, mean(x)), (v, pvariance(x)), (u, variance(x))):
        assert abs(got - mpf(want.numerator) / want.denominator) < mpf(10) ** -55


def test_channel_places_by_numpy() -> None:
    import numpy as np

    index = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    for axis in (1, 2, 3, -1, -3):
        want = [np.take(index, c, axis=axis).reshape(-1).tolist() for c in range(index.shape[axis])]
        assert oracle.channel_places(index.shape, axis) == want


@pytest.mark.parametrize("n", [16, 256])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_bounds_hold_for_careful_float32_arithmetic_and_not_for_careless(n: int, mean: float) -> None:
    """The bounds are neither too tight for a two-pass computation in float32, nor so wide that E[x^2]-E[x]^2 fits."""
    import numpy as np

    from bnlayer_conformance import bounds

    rounding = bounds.Rounding("float32", "float32", "float32")
    worst_careless = 0.0
    for case in range(20):
        x = draw.normal(f"bounds/{n}/{mean}/{case}", (n,), "float32", mean=mean)
        m, v, u, p = oracle.moments(exact(x), [mpf(1)] * n)
        errors = bounds.batch_errors(rounding, n, m, v, u, p, mpf("1e-3"))
        m32 = np.mean(x, dtype=np.float32)
        v32 = np.mean(np.square(x - m32), dtype=np.float32)
        assert abs(float(m32) - float(m)) <= errors.mean
        assert abs(float(v32) - float(v)) <= errors.variance
        careless = np.mean(np.square(x), dtype=np.float32) - np.square(m32)
        worst_careless = max(worst_careless, abs(float(careless) - float(v)) / errors.variance)
    assert (worst_careless > 10) == (mean > 0)


SECOND = [
    *MODES,
    pytest.param(True, {}, [mpf(w) for w in (1, 0, 1, 1, 0, 1)], id="masked"),
    pytest.param(True, {"virtual_batch_size": 2}, [mpf(w) for w in (1, 0, 1, 1, 0, 1)], id="ghosts-masked"),
    pytest.param(True, {"synchronized": True}, WEIGHTS, id="synchronized"),
    pytest.param(True, {}, [mpf(0)] * 6, id="no-weight"),
]


@pytest.mark.parametrize(("training", "fields", "weights"), SECOND)
def test_the_second_order_is_the_derivative_of_dx(
    training: bool, fields: dict[str, Any], weights: list[Any] | None
) -> None:
    fields = dict(fields)
    call = _call(weights, fields.pop("adjusted", False))
    direction = exact(draw.normal("oracle/direction", SHAPE, "float64"))
    spec, state = _spec(**fields), _state()
    if fields.get("scale") is False:
        state.gamma = None
    if fields.get("track_moving_stats") is False:
        state.averages = None

    def dx(step: Any) -> list[Any]:
        moved = [x + step * t for x, t in zip(call.x, direction, strict=True)]
        (result,), _ = oracle.step(spec, state, [replace(call, x=moved)], training=training)
        assert result.dx is not None
        return result.dx.values

    (result,), _ = oracle.step(spec, state, [replace(call, direction=direction)], training=training)
    assert result.hvp is not None
    _close(result.hvp.values, [(a - b) / (2 * H) for a, b in zip(dx(H), dx(-H), strict=True)])


@pytest.mark.parametrize("n", [8, 128])
@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_the_second_orders_bound_holds_in_float32_by_either_way_and_not_without_a_term(n: int, mean: float) -> None:
    """Differentiating dx along the direction, or taking the gradient of <dx, direction>: both stay within the bound,
    and each term that is left out is at least ten bounds away."""
    import numpy as np

    one = np.float32(1)
    for case in range(5):
        x = draw.normal(f"second/{n}/{mean}/{case}/x", (n, 1), "float32", mean=mean)
        dy = draw.normal(f"second/{n}/{mean}/{case}/dy", (n, 1), "float32")
        t = draw.normal(f"second/{n}/{mean}/{case}/t", (n, 1), "float32")
        spec = BatchNormSpec(1, epsilon=1e-3).to_dict()
        state = oracle.State([mpf(1)], [mpf(0)], None, 0)
        spec["track_moving_stats"] = False
        call = oracle.OneCall(exact(x), (n, 1), "float32", dy=exact(dy), direction=exact(t))
        (result,), _ = oracle.step(spec, state, [call], training=True)
        assert result.hvp is not None
        want = np.array([float(v) for v in result.hvp.values])[:, None]
        bound = np.array(result.hvp.tolerance)[:, None]

        p = one / np.float32(n)
        m = x.mean(dtype=np.float32)
        variance = np.square(x - m).mean(dtype=np.float32)
        sd = np.sqrt(variance + np.float32(1e-3))
        h = (x - m) / sd
        s1, s2 = dy.sum(dtype=np.float32), (dy * h).sum(dtype=np.float32)
        shift, q = (p * t).sum(dtype=np.float32), (p * h * t).sum(dtype=np.float32)
        dx = (dy - p * (s1 + h * s2)) / sd
        moved = (t - shift - h * q) / sd
        s2_moved = (dy * moved).sum(dtype=np.float32)
        of_sd, of_xhat, of_sum = dx * q / sd, p * moved * s2 / sd, p * h * s2_moved / sd
        forward = -(of_sd + of_xhat + of_sum)
        # The gradient of L = <dx, t> = (<dy, t> - s1 shift - s2 q)/sd, through xhat and through sd.
        inner = (dy * t).sum(dtype=np.float32) - s1 * shift - s2 * q
        of_h = -(dy * q + p * t * s2) / sd
        reverse = (of_h - p * of_h.sum(dtype=np.float32) - p * h * (of_h * h).sum(dtype=np.float32)) / sd
        reverse = reverse - p * h * inner / (sd * sd)
        for got in (forward, reverse):
            assert got.dtype == np.float32
            assert (np.abs(got - want) <= bound).all()
        if mean < 1000:  # there float32 cannot tell x from its neighbors to more than three digits
            for lacking in (of_sd, of_xhat, of_sum):
                assert (np.abs(forward + lacking - want) / bound).max() > 10
