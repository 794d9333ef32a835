"""The pytree layer: immutable, static spec, frozen statistics, parameters out and in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")
import jax.numpy as jnp  # noqa: E402

from bnlayer import BatchNormSpec, BatchNormState, InputError, StateError  # noqa: E402
from bnlayer_jax import BatchNorm  # noqa: E402

X = np.random.default_rng(0).normal(1.0, 2.0, (6, 3)).astype(np.float32)


def test_a_call_returns_the_layer_after_and_leaves_this_one() -> None:
    layer = BatchNorm(BatchNormSpec(3, decay=0.5))
    y, after = layer(X, training=True)
    np.testing.assert_allclose(after.state.moving_mean, 0.5 * X.mean(0), rtol=1e-5)
    assert (int(layer.state.num_updates), int(after.state.num_updates)) == (0, 1)
    assert not layer.state.moving_mean.any()
    np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-6)


def test_it_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError, match=r"immutable.*replace"):
        BatchNorm(BatchNormSpec(3)).frozen_statistics = True


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_it_can_be_copied_and_pickled(way: Callable[[BatchNorm], BatchNorm]) -> None:
    _, layer = BatchNorm(BatchNormSpec(3), frozen_statistics=False)(X, training=True)
    twin = way(layer)
    assert jax.tree.structure(twin) == jax.tree.structure(layer)
    for a, b in zip(jax.tree.leaves(twin), jax.tree.leaves(layer), strict=True):
        np.testing.assert_array_equal(a, b)


def test_leaves_are_the_state_and_the_rest_is_static() -> None:
    layer = BatchNorm(BatchNormSpec(3))
    leaves, structure = jax.tree.flatten(layer)
    assert len(leaves) == 5
    assert structure != jax.tree.structure(BatchNorm(BatchNormSpec(3), frozen_statistics=True))
    assert structure != jax.tree.structure(BatchNorm(BatchNormSpec(3, epsilon=0.1)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(layer)[0]]
    assert paths[:2] == [".state.gamma", ".state.beta"]
    assert ".state.num_updates" in paths


def test_frozen_statistics_normalize_and_stay() -> None:
    state = BatchNormState.initial(BatchNormSpec(3)).replace(moving_mean=np.full(3, 2.0, np.float32))
    frozen = BatchNorm(BatchNormSpec(3), state, frozen_statistics=True)
    y, after = frozen(X, training=True)
    np.testing.assert_allclose(y, X - 2.0, atol=1e-4)
    assert after.frozen_statistics
    assert after.state.num_updates == 0
    thawed = after.replace(frozen_statistics=False)
    assert thawed(X, training=True)[1].state.num_updates == 1


def test_frozen_without_tracking_is_refused() -> None:
    layer = BatchNorm(BatchNormSpec(3, track_moving_stats=False), frozen_statistics=True)
    with pytest.raises(InputError, match="track_moving_stats"):
        layer(X, training=True)


def test_a_few_steps_of_training_as_the_docstring_shows() -> None:
    @jax.jit
    def step(layer: BatchNorm, x: jax.Array) -> tuple[jax.Array, BatchNorm]:
        def loss(parameters: dict[str, jax.Array], layer: BatchNorm) -> tuple[jax.Array, BatchNorm]:
            y, layer = layer.with_parameters(parameters)(x, training=True)
            return jnp.mean((y - 3.0) ** 2), layer

        (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(layer.parameters, layer)
        return value, after.with_parameters(jax.tree.map(lambda p, g: p - 0.2 * g, after.parameters, gradients))

    layer, values = BatchNorm(BatchNormSpec(3)), []
    for _ in range(20):
        value, layer = step(layer, X)
        values.append(float(value))
    assert values[-1] < 0.01 * values[0]
    assert layer.state.num_updates == 20


def test_parameters_follow_the_spec() -> None:
    layer = BatchNorm(BatchNormSpec(3, scale=False))
    assert list(layer.parameters) == ["beta"]
    with pytest.raises(StateError, match="are beta; got gamma"):
        layer.with_parameters({"gamma": jnp.ones(3)})


def test_it_shares_no_memory_with_the_state_it_came_from() -> None:
    state = BatchNormState.initial(BatchNormSpec(3))
    layer = BatchNorm(BatchNormSpec(3), state)
    assert state.gamma is not None
    state.gamma[:] = 7.0
    np.testing.assert_array_equal(layer.state.gamma, 1.0)
