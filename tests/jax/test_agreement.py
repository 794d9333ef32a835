"""The JAX backend and the NumPy one agree on random specs and inputs: in float64, where only a formula can differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormSpec, BatchNormState, Renorm
from bnlayer.contract import Call, Outcome, Request
from bnlayer_jax.backend import BACKEND as JAX
from bnlayer_numpy.backend import BACKEND as NUMPY

pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")


def random_weights(rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: str) -> np.ndarray | None:
    without = tuple(n for i, n in enumerate(shape) if i != axis)
    form = [shape[:1], without, tuple(1 if i == axis else n for i, n in enumerate(shape)), (*without[:-1], 1)]
    given = form[int(rng.integers(len(form)))]
    kind = int(rng.integers(6))
    drawn = rng.uniform(0.0, 2.0, given)
    drawn[rng.uniform(size=given) < 0.3] = 0.0
    one = np.zeros(given)
    one.flat[0] = 0.7
    choices = [None, drawn.astype(dtype), drawn > 0.5, (drawn * 3).astype(np.int64), np.zeros(given, dtype), one]
    return choices[kind]


def random_state(rng: np.random.Generator, spec: BatchNormSpec) -> BatchNormState[Any]:
    drawn = {
        name: rng.normal(size=a.shape).astype(a.dtype) for name, a in BatchNormState.initial(spec).arrays().items()
    }
    for name in set(drawn) & {"moving_variance", "hidden_variance", "renorm_stddev", "moving_stddev"}:
        drawn[name] = np.exp(drawn[name])
    return BatchNormState(**drawn, num_updates=int(rng.integers(5)))


def random_case(seed: int, options: bool) -> tuple[BatchNormSpec, BatchNormState[Any], list[Request]]:
    rng = np.random.default_rng([24 if options else 20, seed])

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    rank = pick(2, 3, 4, 5)
    shape = tuple(int(n) for n in rng.integers(2, 5, rank))
    axis = int(rng.integers(1, rank))
    if options:
        shape = (int(rng.integers(3, 9)), *shape[1:])
    track = options or bool(rng.uniform() < 0.85)
    decay = pick(0.0, 0.5, 0.9, 1.0, "cumulative") if track else 0.9
    spec = BatchNormSpec(
        shape[axis],
        axis=pick(axis, axis - rank),
        epsilon=pick(1e-8, 1e-5, 1e-3),
        decay=decay,
        center=bool(rng.integers(2)),
        scale=bool(rng.integers(2)),
        moving_variance_estimator=pick("biased", "unbiased"),
        track_moving_stats=track,
        nonfinite="propagate" if decay == "cumulative" else pick("propagate", "keep"),
        param_dtype="float64",
        stats_dtype="float64",
    )
    if options:
        spec = with_options(rng, spec)
    adjusts = options and spec.virtual_batch_size is None

    def adjustment() -> tuple[np.ndarray, np.ndarray] | None:
        forms = [shape, (shape[0], *(1,) * (rank - 1)), shape[1:], ()]
        return pick(None, tuple(rng.uniform(0.5, 1.5, forms[int(rng.integers(4))]) for _ in range(2)))

    def call() -> Call:
        x = rng.normal(2.0, 3.0, shape)
        if rng.uniform() < 0.2:  # one channel is not finite
            np.moveaxis(x, axis, 0)[0].flat[0] = pick(np.nan, np.inf)
        dy = rng.normal(size=shape) if rng.uniform() < 0.9 else None
        weights = random_weights(rng, shape, axis, "float64")
        return Call(x, dy=dy, weights=weights, adjustment=adjustment() if adjusts else None)

    def request() -> Request:
        return Request(
            tuple(call() for _ in range(pick(1, 1, 2))),
            training=pick(True, True, True, False),
            update_stats=pick(True, True, False),
            frozen_statistics=track and pick(True, False, False, False),
            renorm_clips=pick(None, {"r_max": 1.5, "d_max": None}) if spec.renorm is not None else None,
        )

    return spec, random_state(rng, spec), [request(), request()]


def with_options(rng: np.random.Generator, spec: BatchNormSpec) -> BatchNormSpec:
    """The spec with renorm or zero_debias, or with ghost batches, or with ghosts and one of the two."""
    kind, ghosted = int(rng.integers(3)), bool(rng.integers(2))
    if kind == 0:
        clips = {"r_max": 2.0, "r_min": 0.5, "d_max": 0.5}
        renorm = Renorm(**{name: clip for name, clip in clips.items() if rng.integers(2)}, decay=0.7)
        spec = spec.replace(renorm=renorm, decay=0.9, moving_variance_estimator="biased")
    elif kind == 1:
        zero_debias = ("mean", "all")[int(rng.integers(2))]
        spec = spec.replace(zero_debias=zero_debias, decay=float(rng.choice([0.0, 0.6, 0.99])), nonfinite="propagate")
    if ghosted:
        layout = ("strided", "consecutive")[int(rng.integers(2))]
        size = int(rng.integers(1, 6))
        spec = spec.replace(virtual_batch_size=size, virtual_batch_layout=layout, single_value="allow")
    return spec


def assert_same(got: Any, want: Any, what: str) -> None:
    assert (got is None) == (want is None), what
    if want is not None:
        assert got.dtype == want.dtype, what
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9, err_msg=what)


def assert_agree(got: Outcome, want: Outcome) -> None:
    for i, (a, b) in enumerate(zip(got.calls, want.calls, strict=True)):
        for name in ("y", "dx", "dweights"):
            assert_same(getattr(a, name), getattr(b, name), f"call {i}: {name}")
    for name in ("dgamma", "dbeta"):
        assert_same(getattr(got, name), getattr(want, name), name)
    assert got.state.num_updates == want.state.num_updates
    assert list(got.state.arrays()) == list(want.state.arrays())
    for name, array in want.state.arrays().items():
        assert_same(got.state.arrays()[name], array, name)


@pytest.mark.parametrize(("seed", "options"), [(s, False) for s in range(12)] + [(s, True) for s in range(20)])
def test_random_case(seed: int, options: bool) -> None:
    spec, state, requests = random_case(seed, options)
    ours, reference = JAX.build(spec, state), NUMPY.build(spec, state)
    for request in requests:
        ours, got = JAX.step(ours, request)
        reference, want = NUMPY.step(reference, request)
        assert_agree(got, want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("training", [True, False])
def test_what_lies_under_a_mask_poisons_nothing(value: float, training: bool) -> None:
    rng = np.random.default_rng(3)
    x, dy, weights = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2, 3)), rng.uniform(0.5, 1.0, (6, 3))
    weights[4, 1] = 0.0
    x[4, :, 1], dy[4, :, 1] = value, 0.0
    spec = BatchNormSpec(2, axis=1, param_dtype="float64", stats_dtype="float64")
    request = Request((Call(x, dy=dy, weights=weights),), training=training)
    _, got = JAX.step(JAX.build(spec), request)
    _, want = NUMPY.step(NUMPY.build(spec), request)
    elsewhere = np.ones((6, 3), bool)
    elsewhere[4, 1] = False
    assert not np.isfinite(got.calls[0].y[4, :, 1]).any()
    assert np.isfinite(got.calls[0].dx).all()
    for name in ("y", "dx"):
        a, b = getattr(got.calls[0], name), getattr(want.calls[0], name)
        np.testing.assert_allclose(a.swapaxes(1, 2)[elsewhere], b.swapaxes(1, 2)[elsewhere], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got.calls[0].dweights[elsewhere], want.calls[0].dweights[elsewhere], atol=1e-12)
    assert_same(got.dgamma, want.dgamma, "dgamma")
    assert_same(got.dbeta, want.dbeta, "dbeta")


def test_empty_batch_changes_nothing() -> None:
    spec = BatchNormSpec(3)
    x = np.zeros((0, 3), np.float32)
    _, got = JAX.step(JAX.build(spec), Request((Call(x, dy=x, weights=np.zeros(0, np.float32)),), training=True))
    assert got.calls[0].y.shape == got.calls[0].dx.shape == (0, 3)
    assert got.calls[0].dweights.shape == (0,)
    assert not got.dgamma.any()
    assert not got.dbeta.any()
    assert got.state.num_updates == 0
    np.testing.assert_array_equal(got.state.moving_variance, np.ones(3))


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(4096, 4), (16, 4, 16, 16)])
def test_float32_is_within_the_forward_error_bound(mean: float, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(5).normal(mean, 1.0, shape).astype(np.float32)
    spec = BatchNormSpec(4, axis=1, decay=0.0)
    _, got = JAX.step(JAX.build(spec), Request((Call(x),), training=True))
    axes = tuple(i for i in range(x.ndim) if i != 1)
    wide = x.astype(np.float64)
    m, v = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
    xhat = (wide - m) / np.sqrt(v + spec.epsilon)
    u, n = 2.0**-24, 4096
    kappa = np.sqrt((m**2 + v) / (v + spec.epsilon))
    assert (np.abs(got.calls[0].y - xhat) <= (8 + n**0.5) * u * (kappa + np.abs(xhat)) + u * np.abs(xhat)).all()
    # Far inside that bound: the deviations are taken twice, so a large mean costs nothing.
    assert np.abs(got.calls[0].y - xhat).max() < 1e-5
    np.testing.assert_allclose(got.state.moving_variance, v.reshape(-1), rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 12345.678, -3.7e9])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_constant_channel_has_no_variance(value: float, weighted: bool) -> None:
    x = np.full((7, 1, 10, 10), value, np.float32)
    weights = np.random.default_rng(1).uniform(0.1, 1.0, (7, 10, 10)).astype(np.float32) if weighted else None
    spec = BatchNormSpec(1, axis=1, decay=0.0)
    _, got = JAX.step(JAX.build(spec), Request((Call(x, weights=weights),), training=True))
    # Proportions add up to 1 only within √n u, and the first mean is off by √n u |x|: what remains is their product.
    left = (x[0, 0, 0, 0] * x[:, 0].size * 2.0**-48) if weighted else 0.0
    assert np.abs(got.calls[0].y).max() <= abs(left) / spec.epsilon**0.5
    assert got.state.moving_variance[0] <= left**2
    np.testing.assert_allclose(got.state.moving_mean, x[0, 0, 0, 0], rtol=2e-7)


def test_one_dominant_weight_leaves_the_unbiased_variance_right() -> None:
    x = np.array([[1.0], [2.0], [4.0]], np.float32)
    weights = np.array([1.0, 1e-9, 1e-10], np.float32)
    spec = BatchNormSpec(1, decay=0.0, moving_variance_estimator="unbiased")
    request = Request((Call(x, weights=weights),), training=True)
    _, got = JAX.step(JAX.build(spec), request)
    _, want = NUMPY.step(NUMPY.build(spec), request)
    np.testing.assert_allclose(got.state.moving_variance, want.state.moving_variance, rtol=1e-5)
