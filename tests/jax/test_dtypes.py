"""Dtypes, with x64 off and on: what comes in decides what comes out, and nothing is promoted or cut on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")
import jax.numpy as jnp  # noqa: E402

from bnlayer import BatchNormSpec, BatchNormState, InputError, StateError, UnsupportedError  # noqa: E402
from bnlayer_jax import BatchNorm, batch_norm  # noqa: E402

PARTS = ("float16", "bfloat16", "float32")


@pytest.mark.parametrize(("dtype", "x64"), [(d, x64) for x64 in (False, True) for d in PARTS] + [("float64", True)])
@pytest.mark.parametrize("stored", PARTS)
def test_every_output_has_its_dtype(dtype: str, stored: str, x64: bool) -> None:
    with jax.enable_x64(x64):
        spec = BatchNormSpec(3, param_dtype=stored, stats_dtype=stored, decay="cumulative")
        layer = BatchNorm(spec)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), dtype)

        def loss(parameters: dict[str, Any], x: Any, weights: Any) -> Any:
            y, after = layer.with_parameters(parameters)(x, training=True, weights=weights)
            return jnp.sum(y.astype("float32") ** 3), (y, after)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        gradients, (y, after) = gradient(layer.parameters, x, jnp.ones(8, "float32"))
        assert y.dtype == gradients[1].dtype == dtype
        assert gradients[2].dtype == jnp.float32
        assert {g.dtype.name for g in gradients[0].values()} == {stored}
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(layer), strict=True):
            assert (new.dtype, new.weak_type, new.shape) == (old.dtype, old.weak_type, old.shape)
        assert layer.state.num_updates.dtype == (jnp.int64 if x64 else jnp.int32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_inputs_are_accumulated_in_float32(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(300.0, 8.0, (4096, 2)), dtype)
    wide = np.asarray(x).astype(np.float64)
    y, after = BatchNorm(BatchNormSpec(2, decay=0.0))(x, training=True)
    np.testing.assert_allclose(after.state.moving_variance, wide.var(0), rtol=1e-5)
    want = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), want, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)


def test_float64_without_x64_is_refused_not_cut() -> None:
    state = BatchNormState.initial(BatchNormSpec(3))
    with pytest.raises(UnsupportedError, match=r"x should be float64.*x64"):
        batch_norm(np.zeros((4, 3)), state, BatchNormSpec(3), training=True)
    with pytest.raises(UnsupportedError, match=r"param_dtype should be float64"):
        BatchNorm(BatchNormSpec(3, param_dtype="float64"))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_other_inputs_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match=dtype):
        BatchNorm(BatchNormSpec(3))(jnp.zeros((4, 3), dtype), training=True)


def test_integer_weights_beyond_int32_are_not_wrapped() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    layer = BatchNorm(BatchNormSpec(3))
    big, _ = layer(x, training=True, weights=np.array([2**40, 0, 2**41, 2**40]))
    small, _ = layer(x, training=True, weights=np.array([1, 0, 2, 1]))
    np.testing.assert_array_equal(big, small)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, 1e300])
def test_weights_that_float32_cannot_hold_are_refused(wrong: float) -> None:
    with pytest.raises(InputError, match="finite in float32"):
        BatchNorm(BatchNormSpec(3))(jnp.ones((2, 3)), training=True, weights=np.array([1.0, wrong]))


@pytest.mark.parametrize("scale", [1e-36, 1e36, 1.5e38])
def test_weights_of_any_size_give_the_same(scale: float) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    layer = BatchNorm(BatchNormSpec(3, moving_variance_estimator="unbiased"))
    weights = np.array([1.0, 0.0, 2.0, 1.5], np.float32)
    got = layer(x, training=True, weights=weights * np.float32(scale))
    want = layer(x, training=True, weights=weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_a_single_weight_of_any_size_leaves_no_variance(seed: int) -> None:
    x = np.random.default_rng([22, seed]).normal(1e3, 1.0, (4, 3)).astype(np.float32)
    weights = np.zeros(4, np.float32)
    weights[2] = np.random.default_rng([23, seed]).uniform(0.1, 1.0)
    _, after = jax.jit(lambda layer, w: layer(x, training=True, weights=w))(
        BatchNorm(BatchNormSpec(3, decay=0.0)), weights
    )
    np.testing.assert_array_equal(after.state.moving_mean, x[2])
    np.testing.assert_array_equal(after.state.moving_variance, 0.0)


def test_a_huge_value_under_a_mask_is_without_effect() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    hidden = x.copy()
    hidden[1] = np.finfo(np.float32).min  # a common filling; its square is infinite
    layer, mask = BatchNorm(BatchNormSpec(3)), np.array([True, False, True, True])
    got, want = (layer(v, training=True, weights=mask) for v in (hidden, x))
    np.testing.assert_array_equal(got[0][mask], want[0][mask])
    np.testing.assert_array_equal(got[1].state.moving_variance, want[1].state.moving_variance)


def test_a_counter_beyond_int32_is_refused_without_x64() -> None:
    state = BatchNormState.initial(BatchNormSpec(3)).replace(num_updates=2**40)
    with pytest.raises(UnsupportedError, match=f"num_updates={2**40}"):
        BatchNorm(BatchNormSpec(3), state)
    with jax.enable_x64(True):
        assert BatchNorm(BatchNormSpec(3), state).state.num_updates == 2**40


def test_a_state_that_does_not_fit_is_refused() -> None:
    x = jnp.zeros((4, 3))
    other = BatchNormState.initial(BatchNormSpec(3, scale=False))
    with pytest.raises(StateError, match=r"gamma \(3,\)"):
        batch_norm(x, other, BatchNormSpec(3), training=True)
    with pytest.raises(StateError, match="lacks gamma"):
        BatchNorm(BatchNormSpec(3), other)
    uncounted = BatchNormState.initial(BatchNormSpec(3)).replace(num_updates=None)
    with pytest.raises(StateError, match="num_updates"):
        batch_norm(x, uncounted, BatchNormSpec(3), training=True)
