"""Equinox's nameless files get names from a template, and its two modes become the right state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import checkpoint
from bnlayer.checkpoint import Checkpoint, CheckpointError, Tensor
from bnlayer.checkpoint.batch_norms import StoredBatchNorm, find

eqx = pytest.importorskip("equinox")
jax = pytest.importorskip("jax")
jnp = jax.numpy

import bnlayer_jax  # noqa: E402

DECAY = 0.8


def built(mode: str, key: Any, dtype: Any = None) -> Any:
    norm = eqx.nn.BatchNorm(4, "batch", mode=mode, momentum=DECAY, eps=1e-3, dtype=dtype)
    bare = eqx.nn.BatchNorm(4, "batch", mode=mode, channelwise_affine=False)
    return {"net": eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=key), norm, eqx.nn.Dropout(0.5), bare]), "scale": 3}


def batch(seed: int) -> Any:
    return np.random.default_rng(seed).normal(1.0, 3.0, (6, 4)).astype(np.float32)


def trained(mode: str, steps: int, dtype: Any = None) -> tuple[Any, Any]:
    """The model and its state after these batches went into both batch norms."""
    model, state = eqx.nn.make_with_state(built)(mode, jax.random.key(0), dtype)
    for seed in range(steps):
        for i in (1, 3):
            step = jax.vmap(model["net"][i], axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            _, state = step(jnp.asarray(batch(seed), dtype), state)
    return model, state


def saved(path: Path, *tree: Any) -> Path:
    eqx.tree_serialise_leaves(path, tree if len(tree) > 1 else tree[0])
    return path


def first(path: Path, like: Checkpoint, **options: Any) -> StoredBatchNorm:
    return checkpoint.open(path, template=like).batch_norms(**options)[0]


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_the_template_is_the_file_in_order(mode: str, tmp_path: Path) -> None:
    model, state = trained(mode, 2)
    path = saved(tmp_path / "x.eqx", model, state)
    like = bnlayer_jax.equinox_template(model, state)
    found = checkpoint.open(path, template=like)
    assert list(found)[:3] == ["net.layers.0.weight", "net.layers.0.bias", "net.layers.1.weight"]
    assert {"net.layers.1.inference", "net.layers.2.p", "scale"} <= set(found)
    for name in found:
        np.testing.assert_array_equal(found[name], like[name], err_msg=name, strict=True)
    assert [one.name for one in found.batch_norms()] == ["net.layers.1", "net.layers.3"]


def test_shapes_make_a_template_too(tmp_path: Path) -> None:
    model, state = trained("batch", 1)
    shapes = eqx.filter_eval_shape(eqx.nn.make_with_state(built), "batch", jax.random.key(0))
    found = checkpoint.open(saved(tmp_path / "x.eqx", model, state), template=bnlayer_jax.equinox_template(*shapes))
    assert len(found.batch_norms()) == 2


def test_other_trees(tmp_path: Path) -> None:
    model, state = trained("ema", 1)
    tree = (model, state, {"step": jnp.int32(3)})
    found = checkpoint.open(saved(tmp_path / "x.eqx", tree), template=bnlayer_jax.equinox_template(tree))
    assert found["2.step"] == 3
    assert [one.name for one in found.batch_norms()] == ["0.net.layers.1", "0.net.layers.3"]
    alone = checkpoint.open(saved(tmp_path / "y.eqx", model), template=bnlayer_jax.equinox_template(model))
    assert alone.batch_norms() == []
    unsplit = built("batch", jax.random.key(0))
    like = bnlayer_jax.equinox_template(unsplit)
    assert "net.layers.1.batch_state_index.init.0" in checkpoint.open(saved(tmp_path / "z.eqx", unsplit), template=like)
    with pytest.raises(ValueError, match="two leaves are named"):
        bnlayer_jax.equinox_template({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}})


def test_a_saved_template_serves_and_bfloat16_survives(tmp_path: Path) -> None:
    model, state = trained("batch", 2, jnp.bfloat16)
    path = saved(tmp_path / "x.eqx", model, state)
    bnlayer_jax.equinox_template(model, state).save(tmp_path / "like.npz")
    one = first(path, checkpoint.open(tmp_path / "like.npz"), decay=DECAY)
    assert (one.sources["decay"], one.sources["epsilon"]) == ("given", "assumed")
    assert one.spec.stats_dtype == one.spec.param_dtype == "bfloat16"


def test_a_template_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.eqx", *trained("batch", 1))
    with pytest.raises(CheckpointError, match="in the template"):
        checkpoint.open(path, template=bnlayer_jax.equinox_template(*trained("ema", 1)))


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_batch_mode_has_the_averages_that_equinox_evaluates_with(steps: int, tmp_path: Path) -> None:
    model, state = trained("batch", steps)
    one = first(saved(tmp_path / "x.eqx", model, state), bnlayer_jax.equinox_template(model, state))
    assert (one.spec.decay, one.spec.epsilon, one.spec.zero_debias) == (DECAY, 1e-3, "all")
    assert set(one.sources.values()) == {"file"}
    found = one.state().checked(one.spec)
    assert found.num_updates == steps
    layer = eqx.nn.inference_mode(model["net"][1])
    y = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(batch(0), state)[0]
    expected = (batch(0) - found.moving_mean) / np.sqrt(found.moving_variance + 1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    weights = np.array([DECAY ** (steps - 1 - i) for i in range(steps)])
    for of, start, hidden in ((np.mean, 0, found.hidden_mean), (np.var, 1, found.hidden_variance)):
        batches = np.array([of(batch(seed).astype(np.float64), axis=0) for seed in range(steps)])
        np.testing.assert_allclose(hidden, (1 - DECAY) * weights @ batches + start * DECAY**steps, rtol=2e-5)


def test_batch_mode_that_never_trained(tmp_path: Path) -> None:
    model, state = trained("batch", 0)
    one = first(saved(tmp_path / "x.eqx", model, state), bnlayer_jax.equinox_template(model, state))
    found, initial = one.state().checked(one.spec), type(one.state()).initial(one.spec)
    for name, array in initial.arrays().items():
        np.testing.assert_array_equal(found.arrays()[name], array, err_msg=name, strict=True)
    assert found.num_updates == 0


def test_a_variance_far_below_zero_stays_what_it_is() -> None:
    arrays = {"batch_counter": np.array(3), "batch_hidden_mean": np.zeros(2, np.float32),
              "batch_hidden_variance": np.full(2, -1.0, np.float32)}  # fmt: skip
    (one,) = find(_holding(arrays), decay=0.5).batch_norms
    variance = one.state().moving_variance
    assert variance is not None
    np.testing.assert_allclose(variance, -1 / 0.875)


def test_ema_mode(tmp_path: Path) -> None:
    model, state = trained("ema", 3)
    one = first(saved(tmp_path / "x.eqx", model, state), bnlayer_jax.equinox_template(model, state))
    assert (one.spec.zero_debias, one.sources["kind"], one.sources["decay"]) == ("none", "assumed", "file")
    found = one.state().checked(one.spec.replace(moving_variance_estimator="biased"))
    mean = np.mean(batch(0), axis=0)
    for seed in (1, 2):
        mean = DECAY * mean + (1 - DECAY) * np.mean(batch(seed), axis=0)
    np.testing.assert_allclose(found.moving_mean, mean, rtol=2e-5)
    assert one.state().num_updates is None


def test_ema_mode_that_never_trained() -> None:
    """Its arrays hold whatever was in memory."""
    odd = np.full(2, 1e30, np.float32)
    (one,) = find(_holding({"ema_first_time": np.array(True), "ema_mean": odd, "ema_variance": odd})).batch_norms
    found = one.state()
    assert (found.num_updates, found.moving_mean.tolist(), found.moving_variance.tolist()) == (0, [0, 0], [1, 1])


@pytest.mark.parametrize("lost", ["batch_counter", "batch_hidden_mean"])
def test_what_lacks_a_part_is_unclear(lost: str) -> None:
    arrays = {name: np.ones(2, np.float32) for name in ("batch_counter", "batch_hidden_mean", "batch_hidden_variance")}
    found = find(_holding({name: array for name, array in arrays.items() if name != lost}))
    assert found.batch_norms == []
    assert "lacks" in found.ambiguous[0].reason


def _holding(arrays: dict[str, Any]) -> Checkpoint:
    return Checkpoint("x", {f"bn.{n}": Tensor.of(a) for n, a in arrays.items()}, order_is_meaningful=True)
