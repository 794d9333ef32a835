"""The module's own idioms, and the backend's."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import bnlayer
from bnlayer import BatchNormSpec, BatchNormState, InputError, StateError, UnsupportedError
from bnlayer.contract import Call, Request

tf = pytest.importorskip("tensorflow")

from bnlayer_tensorflow import BatchNorm  # noqa: E402

X = np.random.default_rng(31).normal(size=(8, 3)).astype("f4")


def test_variables_are_named_and_only_parameters_learn():
    layer = BatchNorm(BatchNormSpec(3), name="norm")
    names = {v.name for v in layer.variables}
    assert names == {f"norm/{n}:0" for n in ("gamma", "beta", "moving_mean", "moving_variance", "num_updates")}
    assert {id(v) for v in layer.trainable_variables} == {id(layer.gamma), id(layer.beta)}
    bare = BatchNorm(BatchNormSpec(3, center=False, scale=False, track_moving_stats=False))
    assert bare.gamma is bare.beta is bare.moving_mean is bare.moving_variance is None
    assert bare.trainable_variables == ()


def test_frozen_statistics_survive_training():
    layer = BatchNorm(BatchNormSpec(3))
    layer(X, training=True)
    before = layer.moving_mean.numpy()
    layer.frozen_statistics = True
    np.testing.assert_allclose(layer(X, training=True), layer(X, training=False))
    np.testing.assert_array_equal(layer.moving_mean, before)
    assert layer.num_updates.numpy() == 1
    untracked = BatchNorm(BatchNormSpec(3, track_moving_stats=False))
    untracked.frozen_statistics = True
    with pytest.raises(InputError, match="frozen_statistics"):
        untracked(X, training=True)


def test_update_stats_false_leaves_the_state():
    layer = BatchNorm(BatchNormSpec(3))
    y = layer(X, training=True, update_stats=False)
    np.testing.assert_allclose(y.numpy().mean(0), 0, atol=1e-6)
    assert layer.num_updates.numpy() == 0
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))


def test_a_checkpoint_brings_the_state_back(tmp_path):
    layer, other = BatchNorm(BatchNormSpec(3)), BatchNorm(BatchNormSpec(3))
    layer(X, training=True)
    path = tf.train.Checkpoint(layer=layer).write(str(tmp_path / "state"))
    tf.train.Checkpoint(layer=other).read(path).assert_consumed()
    np.testing.assert_array_equal(other.moving_variance, layer.moving_variance)
    assert other.num_updates.numpy() == 1


def test_load_checks_the_state():
    layer = BatchNorm(BatchNormSpec(3))
    with pytest.raises(StateError, match="negative"):
        layer.load(BatchNormState.initial(layer.spec).replace(moving_variance=np.array([1, -1, 1], "f4")))
    bnlayer.load(layer, BatchNormState.initial(layer.spec).replace(num_updates=2**40))
    assert bnlayer.extract(layer)[1].num_updates == 2**40


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_state_keeps_its_dtypes(dtype):
    spec = BatchNormSpec(3, param_dtype=dtype, stats_dtype=dtype)
    layer = bnlayer.build(spec, "tensorflow")
    _, outcome = bnlayer.backend("tensorflow").step(layer, Request((Call(X, dy=X),), training=True))
    assert outcome.calls[0].y.dtype == np.float32
    arrays = [*outcome.state.arrays().values(), outcome.dgamma, outcome.dbeta]
    assert {array.dtype.name for array in arrays} == {dtype}


def test_devices():
    layer = bnlayer.build(BatchNormSpec(3), "tensorflow", device="CPU:0")
    assert layer.gamma.device.endswith("CPU:0")
    for device in ("GPU:63", "TPU", "nowhere at all"):
        with pytest.raises(UnsupportedError, match=device):
            bnlayer.build(BatchNormSpec(3), "tensorflow", device=device)


def test_outside_of_a_strategy_a_synchronized_layer_is_the_only_replica():
    x = np.random.default_rng(3).normal(size=(8, 3)).astype("f4")
    spec = BatchNormSpec(3, decay=0.0, moving_variance_estimator="unbiased", synchronized=True)
    layer = BatchNorm(spec)
    layer(tf.constant(x), training=True)
    np.testing.assert_allclose(layer.moving_variance.numpy(), x.var(0, ddof=1), rtol=1e-5)
    with pytest.raises(InputError, match="more than one value per channel"):
        layer(tf.constant(x[:1]), training=True)


def test_looking_at_the_backend_imports_no_tensorflow():
    code = (
        "import sys, bnlayer, bnlayer_tensorflow\n"
        "from bnlayer_tensorflow.backend import BACKEND\n"
        "assert BACKEND.name == 'tensorflow' and not BACKEND.owns(object())\n"
        "assert BACKEND.unsupported(bnlayer.BatchNormSpec(3)) is None\n"
        "assert 'BatchNorm' in dir(bnlayer_tensorflow)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
