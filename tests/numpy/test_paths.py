"""Both ways to compute a call are right wherever they are taken, and ordinary calls take the fast one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm
from bnlayer_conformance import runner, vector
from bnlayer_numpy import (
    Cache,
    Gradients,
    batch_norm_backward,
    batch_norm_forward,
    definition,
    function,
    layout,
)
from bnlayer_numpy.backend import BACKEND
from bnlayer_numpy.paths import PATHS

NDArray = np.ndarray[Any, np.dtype[Any]]
U = 2.0**-24


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 256 numbers in float32, so that small arrays have many."""
    monkeypatch.setattr(layout, "BLOCK_BYTES", 2**10)
    layout.panels.cache_clear()
    yield
    layout.panels.cache_clear()


@pytest.fixture(params=["many blocks", "one block"])
def blocks(request: pytest.FixtureRequest) -> None:
    """What a small array is cut into; one block alone goes another way (at_once.py)."""
    if request.param == "many blocks":
        request.getfixturevalue("small_blocks")


@pytest.fixture
def no_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition must not be needed."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the definition was taken")

    monkeypatch.setattr(definition, "output", refuse)
    monkeypatch.setattr(definition, "gradients", refuse)
    monkeypatch.setattr(function, "batch_moments", refuse)


def state_of(spec: BatchNormSpec) -> BatchNormState[NDArray]:
    random = np.random.default_rng(1)
    state: BatchNormState[NDArray] = BatchNormState.initial(spec)
    drawn = {name: random.uniform(0.5, 1.5, spec.num_features).astype(array.dtype)
             for name, array in state.arrays().items()}  # fmt: skip
    return state.replace(**drawn)


def run(
    x: NDArray, spec: BatchNormSpec, *, training: bool = True, weights: NDArray | None = None, path: str | None = None
) -> tuple[NDArray, BatchNormState[NDArray], Gradients, Cache]:
    """One call and its gradients, of dy drawn from the normal distribution."""
    dy = np.asarray(np.random.default_rng(2).standard_normal(x.shape)).astype(x.dtype)
    with PATHS.forced(path) as taken:
        y, after, cache = batch_norm_forward(x, state_of(spec), spec, training=training, weights=weights)
        gradients = batch_norm_backward(dy, cache)
    assert path is None or taken[path] == 1
    return y, after, gradients, cache


def close(got: NDArray | None, want: NDArray | None, dtype: Any, factor: float = 1.0) -> None:
    """To within 64 unit roundoffs of the larger of 1 and the largest value."""
    if want is None or got is None:
        assert want is got
        return
    assert got.dtype == want.dtype and got.shape == want.shape
    eps = {np.dtype(np.float16): 2.0**-11, np.dtype(ml_dtypes.bfloat16): 2.0**-8}.get(np.dtype(dtype), U)
    exact = want.astype(np.float64)
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=0, atol=64 * eps * factor * max(1, abs(exact).max()))


@pytest.mark.parametrize("path", PATHS.names)
def test_every_vector_on_each_path(path: str) -> None:
    with PATHS.forced(path) as taken:
        results = [runner.run_vector(one, BACKEND) for one in vector.load()]
    failed = [f"{r.vector}: {r.observable} {r.reason}" for r in results if r.status not in ("pass", "unsupported")]
    assert not failed
    assert taken[path] > 500


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean", [0.0, 0.5, 1e3])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 64), -1), ((300, 128), -1), ((4, 7, 7, 33), -1), ((4, 40, 13, 13), 1)]
)
def test_ordinary_calls_take_the_fast_path(
    shape: tuple[int, ...], axis: int, dtype: Any, mean: float, training: bool, no_definition: None
) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) + mean).astype(dtype)
    run(x, BatchNormSpec(shape[axis], axis=axis), training=training, path="blocked")


@pytest.mark.parametrize("kind", ["renorm", "ghosts", "consecutive", "mask", "weights", "dead", "shift"])
def test_options_and_dead_channels_take_the_fast_path(kind: str, no_definition: None) -> None:
    x = np.random.default_rng(0).standard_normal((32, 9, 9, 5), np.float32)
    every: dict[str, dict[str, Any]] = {
        "renorm": {"renorm": Renorm()},
        "ghosts": {"virtual_batch_size": 8},
        "consecutive": {"virtual_batch_size": 8, "virtual_batch_layout": "consecutive"},
    }
    options = every.get(kind, {})
    if kind == "dead":
        x[..., 2] = 0.0
    if kind == "shift":
        x[..., 2] = 1000.1
    random = np.random.default_rng(3).random((32, 9, 9))
    weights = random < 0.5 if kind == "mask" else random if kind == "weights" else None
    *_, cache = run(x, BatchNormSpec(5, **options), weights=weights)
    if kind in ("dead", "shift"):
        assert cache.parts[0].variance[..., 2] == 0.0
        assert cache.parts[0].mean[..., 2] == np.float32(x[0, 0, 0, 2])


@pytest.mark.parametrize("weights", [None, "rows", "positions", "mask"])
@pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 3}, {"renorm": Renorm(r_max=2, d_max=1)}, {"scale": False}]
)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((150, 5), -1), ((7, 300), -1), ((11, 5, 7, 6), -1), ((11, 6, 5, 7), 1), ((5, 3, 9, 40), 1), ((4, 5, 6, 3), 2),
     ((6, 2, 600), 1)],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_blocks_add_up_to_the_definition(
    shape: tuple[int, ...], axis: int, options: dict[str, Any], weights: str | None, training: bool, blocks: None
) -> None:
    random = np.random.default_rng(4)
    x = (random.standard_normal(shape) * 2.0 + random.choice([0.0, 5.0], shape[axis]).reshape(
        [-1 if i == axis % len(shape) else 1 for i in range(len(shape))])).astype(np.float32)  # fmt: skip
    positions = tuple(length for i, length in enumerate(shape) if i != axis % len(shape))
    given: NDArray | None = None
    if weights == "rows":
        given = random.random(shape[0]) + 0.5
    elif weights is not None:
        given = random.random(positions) + 0.5 if weights == "positions" else random.random(positions) < 0.5
    spec = BatchNormSpec(shape[axis], axis=axis, single_value="allow", **options)
    y, after, gradients, cache = run(x, spec, training=training, weights=given, path="blocked")
    assert all(part.scaling is not None for part in cache.parts)
    want_y, want_after, want, _ = run(x, spec, training=training, weights=given, path="definition")
    close(y, want_y, np.float32)
    for name, array in want_after.arrays().items():
        close(getattr(after, name), array, np.float32)
    for name in ("dx", "dgamma", "dbeta", "dweights"):
        close(getattr(gradients, name), getattr(want, name), np.float32, factor=4.0)


@pytest.mark.parametrize("form", ["channels last", "strided", "reversed", "byte order", "Fortran", "unaligned"])
def test_memory_in_any_order(form: str, small_blocks: None) -> None:
    x = np.random.default_rng(5).standard_normal((6, 4, 5, 7), np.float32)
    if form == "channels last":
        given = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    elif form == "strided":
        given = np.repeat(x, 2, axis=2)[:, :, ::2]
    elif form == "reversed":
        given = np.ascontiguousarray(x[::-1])[::-1]
    elif form == "byte order":
        given = x.astype(x.dtype.newbyteorder())
    elif form == "Fortran":
        given = np.asfortranarray(x)
    else:
        given = np.frombuffer(b"\0" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    spec = BatchNormSpec(4, axis=1)
    y, _, gradients, _ = run(given, spec, path="blocked")
    want_y, _, want, _ = run(x, spec, path="definition")
    assert y.dtype == given.dtype
    close(y.astype(np.float32), want_y, np.float32)
    close(gradients.dx.astype(np.float32), want.dx, np.float32)
    if form == "channels last":  # as NumPy's own functions, a result lies in memory as its argument does
        assert y.strides == gradients.dx.strides == given.strides


@pytest.mark.parametrize(
    ("mean", "stddev"), [(0.0, 1.0), (1.9, 1.0), (2.1, 1.0), (1e3, 1.0), (1e6, 1.0), (1e-3, 1e-3), (1e5, 1e9)]
)
def test_statistics_to_their_bound_on_both_sides_of_the_shift(mean: float, stddev: float, blocks: None) -> None:
    x = (np.random.default_rng(6).standard_normal((4096, 3)) * stddev + mean).astype(np.float32)
    part = run(x, BatchNormSpec(3), path="blocked")[3].parts[0]
    exact = x.astype(np.float64)
    m, v = exact.mean(0), exact.var(0)
    allowed = (8.0 + 64.0) * U  # bounds.py: K u, for n = 4096
    rms = np.sqrt(m * m + v)
    assert (np.abs(part.mean[0] - m) <= allowed * rms).all()
    assert (np.abs(part.variance[0] - v) <= allowed * v + (allowed * rms) ** 2).all()
    assert part.scaling is not None


def test_data_in_order_is_as_good_as_shuffled(blocks: None, no_definition: None) -> None:
    x = np.sort(np.random.default_rng(7).standard_normal((4096, 3), np.float32) + np.float32(100.0), axis=0)
    part = run(x, BatchNormSpec(3))[3].parts[0]
    np.testing.assert_allclose(part.variance[0], x.astype(np.float64).var(0), rtol=72 * U)


@pytest.mark.parametrize("scale", [1e30, 1e-25])
def test_squares_beyond_float32_are_left_to_the_definition(scale: float) -> None:
    x = (np.random.default_rng(8).standard_normal((64, 3)) * scale).astype(np.float32)
    spec = BatchNormSpec(3, epsilon=0.0)
    y, _, gradients, cache = run(x, spec)
    assert cache.parts[0].scaling is None
    want_y, _, want, _ = run(x, spec, path="definition")
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(gradients.dx, want.dx)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("gamma", [0.0, 1e-38, 1e30, np.inf, np.nan])
@pytest.mark.parametrize("stddev", [1.0, 1e9])
@pytest.mark.parametrize("training", [True, False])
def test_scales_at_the_ends_of_float32(gamma: float, stddev: float, training: bool) -> None:
    x = (np.random.default_rng(9).standard_normal((64, 3)) * stddev).astype(np.float32)
    spec = BatchNormSpec(3)
    moving = np.full(3, np.float32(stddev) ** 2)
    state = state_of(spec).replace(gamma=np.array([1.0, gamma, 1.0], np.float32), moving_variance=moving)
    dy = np.random.default_rng(2).standard_normal(x.shape, np.float32)
    found = []
    for path in PATHS.names:
        with PATHS.forced(path):
            y, _, cache = batch_norm_forward(x, state, spec, training=training)
            found.append((y, batch_norm_backward(dy, cache).dx))
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got[:, [0, 2]], want[:, [0, 2]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-5, atol=1e-6 * max(1.0, gamma))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_finite_stays_in_its_channel(value: float, training: bool) -> None:
    x = np.random.default_rng(10).standard_normal((64, 3), np.float32)
    x[5, 1] = value
    y, after, gradients, _ = run(x, BatchNormSpec(3), training=training, path="blocked")
    want_y, want_after, want, _ = run(x, BatchNormSpec(3), training=training, path="definition")
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-6)
    for name, array in want_after.arrays().items():
        np.testing.assert_allclose(getattr(after, name), array, rtol=1e-5)
    np.testing.assert_allclose(gradients.dx, want.dx, rtol=1e-4, atol=1e-6)
    assert np.isfinite(y[:, [0, 2]]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 3e38])
@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_anything_may_lie_under_a_mask(value: float, kind: str, blocks: None) -> None:
    random = np.random.default_rng(11)
    x = random.standard_normal((40, 6, 3)).astype(np.float32)
    mask = random.random((40, 6)) < 0.6
    x[~mask] = value
    weights = mask if kind == "mask" else mask * random.random((40, 6))
    y, after, gradients, _ = run(x, BatchNormSpec(3), weights=weights, path="blocked")
    want_y, want_after, want, _ = run(x, BatchNormSpec(3), weights=weights, path="definition")
    np.testing.assert_allclose(y[mask], want_y[mask], rtol=1e-5, atol=1e-5)
    close(after.moving_mean, want_after.moving_mean, np.float32)
    close(after.moving_variance, want_after.moving_variance, np.float32)
    np.testing.assert_allclose(gradients.dx[~mask], want.dx[~mask], rtol=1e-5, atol=1e-6)
    assert after.moving_variance is not None and np.isfinite(after.moving_variance).all()


def test_large_results_are_the_memory_that_a_call_takes() -> None:
    import tracemalloc

    x = np.random.default_rng(12).standard_normal((64, 64, 64, 32), np.float32)
    spec = BatchNormSpec(32)
    state = state_of(spec)
    batch_norm_forward(x[:2], state, spec, training=True)
    tracemalloc.start()
    y, _, cache = batch_norm_forward(x, state, spec, training=True)
    forward = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    dx = batch_norm_backward(x, cache).dx
    backward = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert forward <= 1.1 * y.nbytes
    assert backward <= 1.1 * dx.nbytes


def test_the_path_is_named() -> None:
    x = np.ones((4, 3), np.float32)
    spec = BatchNormSpec(3)
    ones = np.ones((4, 3), np.float32)
    with PATHS.forced() as taken:
        batch_norm_forward(x, state_of(spec), spec, training=True)
        assert taken == {"blocked": 1}
        batch_norm_forward(x, state_of(spec), spec, training=True, adjustment=(ones, ones))
        batch_norm_forward(x[:0], state_of(spec), spec, training=True)
    assert taken == {"blocked": 1, "definition": 2}


def test_numpy_s_own_settings_are_as_they_were() -> None:
    before = np.getbufsize(), np.geterr()
    x = np.ones((64, 3), np.float32)
    run(x, BatchNormSpec(3))
    run(x, BatchNormSpec(3, virtual_batch_size=16))
    with pytest.raises(InputError):
        run(x, BatchNormSpec(4))
    assert (np.getbufsize(), np.geterr()) == before
