"""`bnlayer_jax.equinox.BatchNorm` in the place of `equinox.nn.BatchNorm`."""

from __future__ import annotations

import inspect
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("equinox", reason="equinox is not installed")

import equinox as eqx

import bnlayer_jax
from bnlayer import BatchNormSpec, InputError, SpecError, StateError
from bnlayer_jax.equinox import BatchNorm, without_start

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
pytestmark = pytest.mark.filterwarnings("ignore:When `eqx.nn.BatchNorm")


def data(seed: int = 0, shape: tuple[int, ...] = (8, 3, 5)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape), jnp.float32)


def make(kind: Any, *arguments: Any, **words: Any) -> Any:
    return eqx.nn.make_with_state(kind)(3, *(arguments or ("batch",)), **words)


@eqx.filter_jit
def call(layer: Any, x: jax.Array, state: Any, **words: Any) -> Any:
    """y of a batch, and the state after, which no example has for itself."""
    run = jax.vmap(lambda x, state: layer(x, state, **words), in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    return run(x, state)


def both(**words: Any) -> Any:
    """Ours and Equinox's, each with its state."""
    return make(BatchNorm, **words), make(eqx.nn.BatchNorm, **words)


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)


@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_the_signature_is_equinoxs_and_what_is_ours_comes_by_keyword(method: str) -> None:
    theirs = inspect.signature(getattr(eqx.nn.BatchNorm, method)).parameters
    ours = inspect.signature(getattr(BatchNorm, method)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in set(ours) - set(theirs))


@pytest.mark.parametrize("mode", ["batch", "ema", "legacy"])
@pytest.mark.parametrize("affine", [True, False])
def test_the_leaves_are_equinoxs(mode: str, affine: bool) -> None:
    words = {"mode": mode, "channelwise_affine": affine}
    (ours, state), (theirs, their_state) = both(**words)
    assert jax.tree.structure(state) == jax.tree.structure(their_state)

    def described(model: Any) -> list[Any]:
        leaves = [leaf for leaf in jax.tree.leaves(model) if not isinstance(leaf, str)]
        return [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    assert described((ours, state)) == described((theirs, their_state))
    assert isinstance(ours, eqx.nn.BatchNorm)


def test_mode_batch_trains_as_equinox_and_evaluates_right() -> None:
    (ours, state), (theirs, their_state) = (
        make(kind, mode="batch", momentum=0.9) for kind in (BatchNorm, eqx.nn.BatchNorm)
    )
    reference = bnlayer_jax.BatchNorm(BatchNormSpec(3, axis=1, decay=0.9, zero_debias="all"))
    for seed in range(3):
        y, state = call(ours, data(seed), state)
        expected, their_state = call(theirs, data(seed), their_state)
        np.testing.assert_allclose(y, expected, **CLOSE)
        _, reference = reference(data(seed), training=True)
    right, _ = reference(data(), training=False)
    np.testing.assert_allclose(call(eqx.nn.inference_mode(ours), data(), state)[0], right, **CLOSE)
    held = ours.held(state)
    for name, array in reference.state.arrays().items():
        np.testing.assert_allclose(getattr(held, name), array, **CLOSE)
    assert int(held.num_updates) == 3
    # What Equinox trained has the start in it, which evaluates as there, until it is taken out.
    wrong, _ = call(theirs, data(), their_state, inference=True)
    same, _ = call(ours, data(), their_state, inference=True)
    np.testing.assert_allclose(same, wrong, **CLOSE)
    assert float(jnp.abs(wrong - right).max()) > 0.1
    assert_same(without_start(ours, their_state), state)
    with pytest.raises(StateError, match="it started at 0"):
        without_start(ours, make(BatchNorm, mode="batch")[1].set(ours.batch_counter, jnp.array(3)).set(
            ours.batch_state_index, (jnp.zeros(3), jnp.zeros(3))))  # fmt: skip


def test_equinox_evaluates_what_we_trained_right() -> None:
    (ours, state), (theirs, _) = make(BatchNorm, mode="batch"), make(eqx.nn.BatchNorm, mode="batch")
    _, state = call(ours, data(), state)
    expected, _ = call(ours, data(), state, inference=True)
    np.testing.assert_allclose(call(theirs, data(), state, inference=True)[0], expected, **CLOSE)


def test_mode_ema_normalizes_with_the_batch_and_averages_as_equinox() -> None:
    (ours, state), (theirs, their_state) = (
        make(kind, mode="ema", momentum=0.9) for kind in (BatchNorm, eqx.nn.BatchNorm)
    )
    assert ours.held(state).num_updates is None
    for seed in range(3):
        y, state = call(ours, data(seed) + seed, state)
        their_y, their_state = call(theirs, data(seed) + seed, their_state)
        np.testing.assert_allclose(y.mean((0, 2)), 0, atol=1e-5)
    assert float(jnp.abs(their_y.mean((0, 2))).max()) > 0.1
    assert_same(state, their_state)
    np.testing.assert_allclose(
        call(ours, data(), state, inference=True)[0], call(theirs, data(), their_state, inference=True)[0], **CLOSE
    )
    gradient = jax.grad(lambda x: (call(ours, x, state)[0] ** 3).sum())(data())
    np.testing.assert_allclose(gradient.sum((0, 2)), 0, atol=1e-3)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_before_the_first_update_eval_has_mean_0_and_variance_1(mode: str) -> None:
    layer, state = make(BatchNorm, mode=mode)
    y, _ = call(layer, data(), state, inference=True)
    np.testing.assert_allclose(y, data() / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("kinds", [(eqx.nn.BatchNorm, BatchNorm), (BatchNorm, eqx.nn.BatchNorm)], ids=["from", "to"])
def test_files_of_equinox_load_and_back(mode: str, kinds: tuple[Any, Any]) -> None:
    saved, state = make(kinds[0], mode=mode)
    _, state = call(saved, data(), state)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (saved, state))
    file.seek(0)
    loaded, loaded_state = eqx.tree_deserialise_leaves(file, make(kinds[1], mode=mode))
    assert_same(loaded_state, state)
    evaluated = [call(layer, data(), s, inference=True)[0] for layer, s in ((saved, state), (loaded, loaded_state))]
    np.testing.assert_allclose(*evaluated, **CLOSE)


@pytest.mark.parametrize("x_dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("words", "inference"),
    [
        ({}, False),
        ({}, True),
        ({"channelwise_affine": False}, False),
        ({"channelwise_affine": False}, True),
        # In training Equinox refuses bfloat16 leaves: its state would change dtype.
        ({"dtype": jnp.bfloat16}, True),
    ],
    ids=str,
)
def test_y_has_equinoxs_dtype(x_dtype: str, words: dict[str, Any], inference: bool) -> None:
    dtypes = []
    for kind in (BatchNorm, eqx.nn.BatchNorm):
        layer, state = make(kind, mode="batch", **words)
        y, _ = eqx.filter_eval_shape(call, layer, data().astype(x_dtype), state, inference=inference)
        dtypes.append(y.dtype)
    assert dtypes[0] == dtypes[1]


def test_bfloat16_leaves_train_and_stay() -> None:
    layer, state = make(BatchNorm, mode="batch", dtype=jnp.bfloat16)
    _, after = call(layer, data(), state)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


def test_half_input_has_statistics_in_float32() -> None:
    layer, state = make(BatchNorm, mode="batch", momentum=0.0)
    x = (data() * 300).astype(jnp.float16)  # their squares are beyond float16
    y, state = call(layer, x, state)
    np.testing.assert_allclose(layer.held(state).moving_variance, np.asarray(x, np.float64).var((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(y.std((0, 2)), 1, atol=1e-3)


def test_weights_and_update_stats() -> None:
    layer, state = make(BatchNorm, mode="ema")
    weights = jnp.asarray([0, 1, 2, 0.5, 0, 0, 3, 1], jnp.float32)

    @jax.jit
    def weighted(x: jax.Array, weights: jax.Array, state: Any) -> Any:
        run = lambda x, w: layer(x, state, weights=w)  # noqa: E731
        return jax.vmap(run, out_axes=(0, None), axis_name="batch")(x, weights)

    _, after = weighted(data(), weights, state)
    np.testing.assert_allclose(layer.held(after).moving_mean, np.average(data().mean(2), 0, weights), rtol=1e-5)
    y, untouched = weighted(data(), jnp.zeros(8), after)
    assert_same(untouched, after)
    np.testing.assert_allclose(y, call(layer, data(), after, inference=True)[0], **CLOSE)
    _, unchanged = call(layer, data(1), after, update_stats=False)
    assert_same(unchanged, after)


def test_several_mapped_axes() -> None:
    layer, state = make(BatchNorm, ["replicas", "batch"], mode="batch")

    @jax.jit
    def nested(x: jax.Array, state: Any) -> Any:
        inner = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return jax.vmap(inner, in_axes=(0, None), out_axes=(0, None), axis_name="replicas")(x, state)

    y, after = nested(data().reshape(2, 4, 3, 5), state)
    expected, whole = call(make(BatchNorm, mode="batch")[0], data(), state)
    np.testing.assert_allclose(y.reshape(8, 3, 5), expected, **CLOSE)
    assert_same(after, whole)


def test_options() -> None:
    layer, state = make(BatchNorm, mode="ema", moving_variance_estimator="unbiased", nonfinite="keep")
    assert layer.spec == BatchNormSpec(3, axis=1, decay=0.99, moving_variance_estimator="unbiased", nonfinite="keep",
                                       synchronized=True, single_value="allow")  # fmt: skip
    _, state = call(layer, data(), state)
    np.testing.assert_allclose(layer.held(state).moving_variance, data().var((0, 2), ddof=1), rtol=1e-5)
    _, after = call(layer, data(1).at[0, 1].set(jnp.inf), state)
    before, held = layer.held(state), layer.held(after)
    assert float(held.moving_mean[1]) == float(before.moving_mean[1])
    assert float(held.moving_mean[0]) != float(before.moving_mean[0])


def test_frozen_parts() -> None:
    layer, state = make(BatchNorm, mode="batch", frozen_statistics=True, frozen_parameters=True)
    y, after = call(layer, data(), state)
    np.testing.assert_allclose(y, data() / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert_same(after, state)
    gradient = eqx.filter_grad(lambda layer: (call(layer, data(), state)[0] ** 3).sum())(layer)
    np.testing.assert_array_equal(gradient.weight, 0)
    np.testing.assert_array_equal(gradient.bias, 0)


def test_what_is_refused_is_named() -> None:
    layer, state = make(BatchNorm, mode="batch")
    with pytest.raises(InputError, match="'batch' is no mapped axis"):
        layer(data()[0], state)
    assert layer(data()[0], state, inference=True)[0].shape == (3, 5)
    with pytest.raises(SpecError, match="nonfinite"):
        BatchNorm(3, "batch", mode="batch", nonfinite="keep")
    with pytest.raises(ValueError, match="mode"):
        BatchNorm(3, "batch", mode="other")  # type: ignore[arg-type]
    strict, state = make(BatchNorm, mode="batch", single_value="raise")
    with pytest.raises(InputError, match="more than one value per channel"):
        call(strict, data(shape=(1, 3, 1)), state)
    with pytest.raises(StateError, match='"ema"'):
        without_start(*make(BatchNorm, mode="ema"))


class Block(eqx.Module):
    """A residual block."""

    conv: eqx.nn.Conv1d
    norm: Any

    def __init__(self, norm: Any) -> None:
        self.conv = eqx.nn.Conv1d(3, 3, 3, padding=1, key=jax.random.key(0))
        self.norm = norm(3, "batch", mode="batch")

    def __call__(self, x: jax.Array, state: Any) -> Any:
        y, state = self.norm(self.conv(x), state)
        return x + jax.nn.relu(y), state


def test_training_a_model_with_grad_remat_and_scan() -> None:
    results = []
    for norm in (BatchNorm, eqx.nn.BatchNorm):
        model, state = eqx.nn.make_with_state(Block)(norm)
        arrays, static = eqx.partition(model, eqx.is_inexact_array)

        @jax.checkpoint
        def loss(arrays: Any, state: Any, x: jax.Array, static: Any = static) -> Any:
            y, state = call(eqx.combine(arrays, static), x, state)
            return jnp.mean(y**2), state

        @jax.jit
        def train(arrays: Any, state: Any, batches: jax.Array, loss: Any = loss) -> Any:
            def step(carry: Any, x: jax.Array) -> Any:
                arrays, state = carry
                gradients, state = jax.grad(loss, has_aux=True)(arrays, state, x)
                return (jax.tree.map(lambda a, g: a - 0.1 * g, arrays, gradients), state), None

            return jax.lax.scan(step, (arrays, state), batches)[0]

        trained, state = train(arrays, state, jnp.stack([data(seed) for seed in range(3)]))
        results.append((jax.tree.leaves(trained), int(state.get(model.norm.batch_counter))))
    assert_same(*results)
