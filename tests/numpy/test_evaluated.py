"""What eval remembers of a state must never show: what counts is what the arrays hold when the call is made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnlayer
from bnlayer_numpy import batch_norm_backward, batch_norm_forward
from bnlayer_numpy.paths import PATHS

Array = np.ndarray[Any, np.dtype[Any]]
ARRAYS = ("gamma", "beta", "moving_mean", "moving_variance")
DRAWN = np.random.default_rng(0)


def called(x: Array, state: Any, spec: bnlayer.BatchNormSpec, dy: Array) -> tuple[Array, Array]:
    y, after, cache = batch_norm_forward(x, state, spec, training=False)
    assert after is state
    return y, batch_norm_backward(dy, cache).dx


def agrees(x: Array, state: Any, spec: bnlayer.BatchNormSpec) -> None:
    """With the formulas as they are written, which remember nothing."""
    dy = DRAWN.normal(size=x.shape).astype(x.dtype)
    with PATHS.forced("definition"):
        expected = called(x, state, spec, dy)
    for found, exact in zip(called(x, state, spec, dy), expected, strict=True):
        tolerance = 64 * np.finfo(x.dtype).eps
        np.testing.assert_allclose(found, exact, rtol=tolerance, atol=tolerance * np.abs(exact).max())


def of(features: int, **fields: Any) -> tuple[Any, bnlayer.BatchNormSpec]:
    spec = bnlayer.BatchNormSpec(features, **fields)
    state = bnlayer.BatchNormState.initial(spec)
    for name, array in state.arrays().items():
        array[...] = DRAWN.uniform(0.5, 1.5, features) if name in ARRAYS else array
    return state, spec


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("shape", [(256, 128), (8, 64), (7, 5)])
def test_a_write_to_an_array_is_seen(shape: tuple[int, int], name: str) -> None:
    x, (state, spec) = DRAWN.normal(size=shape).astype(np.float32), of(shape[1])
    agrees(x, state, spec)
    before, *_ = batch_norm_forward(x, state, spec, training=False)
    getattr(state, name)[-1] += 0.25
    agrees(x, state, spec)
    after, *_ = batch_norm_forward(x, state, spec, training=False)
    assert (before[:, :-1] == after[:, :-1]).all()
    assert (before[:, -1] != after[:, -1]).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65, 4096])
@pytest.mark.parametrize("features", [1, 3, 64, 1023, 1025])
def test_any_number_of_rows_and_channels(rows: int, features: int) -> None:
    state, spec = of(features)
    agrees(DRAWN.normal(size=(rows, features)).astype(np.float32), state, spec)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fields", [{}, {"scale": False}, {"center": False}, {"epsilon": 0.25}])
def test_states_that_differ_in_little_are_told_apart(fields: dict[str, Any], dtype: str) -> None:
    """Equal bytes under another name, dtype or epsilon are another state."""
    spec = bnlayer.BatchNormSpec(4, stats_dtype=dtype, param_dtype=dtype, **fields)
    state = bnlayer.BatchNormState.initial(spec)
    for _ in range(2):
        agrees(DRAWN.normal(size=(16, 4)).astype(dtype), state, spec)
        agrees(DRAWN.normal(size=(16, 4)).astype("float32"), state, spec)


def test_what_is_remembered_cannot_be_spoilt() -> None:
    """Nothing that a call hands out is memory that a later call reads, and that can be written to."""
    x, (state, spec) = DRAWN.normal(size=(256, 128)).astype(np.float32), of(128)
    first, _, cache = batch_norm_forward(x, state, spec, training=False)
    for array in (cache.parts[0].mean, cache.parts[0].variance):
        with pytest.raises(ValueError, match="read-only"):
            array += 1.0
    expected = first.copy()
    first[...] = 0.0
    second, *_ = batch_norm_forward(x, state, spec, training=False)
    np.testing.assert_array_equal(second, expected)


def test_a_mean_far_from_0() -> None:
    x, (state, spec) = DRAWN.normal(size=(256, 128)).astype(np.float32) + np.float32(1e4), of(128)
    state.moving_mean[...] = 1e4
    agrees(x, state, spec)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38, np.inf, np.nan])
@pytest.mark.parametrize("name", ARRAYS)
def test_any_numbers_travel_without_a_warning(name: str, value: float) -> None:
    x, (state, spec) = DRAWN.normal(size=(16, 4)).astype(np.float32), of(4)
    getattr(state, name)[1] = value
    with PATHS.forced("definition"):
        expected, *_ = batch_norm_forward(x, state, spec, training=False)
    found, *_ = batch_norm_forward(x, state, spec, training=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
