"""Whole Keras models: read as checkpoints, written, configured, and run with their batch norms training alone."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from bnlayer import UnsupportedError, checkpoint
from bnlayer.errors import CheckpointError
from bnlayer_keras import BatchNormalization
from bnlayer_keras.model import ADAPTER

THEIRS = keras.layers.BatchNormalization
layers = keras.layers
X = np.random.default_rng(44).normal(size=(8, 6, 6, 3)).astype("f4")


def numbers(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def records(model) -> list[Any]:
    return list(ADAPTER.batch_norms(model))


def functional(**options):
    """Every kind of layer that has a kind, a shared one, a nested model, and a class that has none."""
    stem = keras.Sequential(
        [keras.Input((6, 6, 3)), layers.Conv2D(4, 3, use_bias=False), THEIRS(name="bn", epsilon=0.01)], name="stem"
    )
    shared = BatchNormalization(name="shared", cumulative=True)
    inputs = keras.Input((6, 6, 3))
    h = shared(stem(inputs))
    h = shared(layers.Conv2D(4, 1, groups=2, name="grouped")(h))
    h = layers.SeparableConv2D(6, 2, depth_multiplier=2, name="separable")(h)
    h = layers.DepthwiseConv2D(2, name="depthwise")(h)
    h = layers.Conv2DTranspose(5, 2, name="up")(h)
    h = layers.GroupNormalization(5, name="group")(h)
    h = layers.Dropout(0.5)(layers.Flatten()(h))
    h = layers.Dense(4, name="dense")(h)
    h = layers.LayerNormalization(name="norm", center=False)(h)
    h = layers.EinsumDense("bi,ij->bj", 4, name="einsum")(h)
    h = THEIRS(name="last", momentum=0.5, scale=False)(h)
    return keras.Model(inputs, {"features": h, "logits": layers.Dense(2, name="head")(h)}, name="functional", **options)


def sequential():
    return keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(3, 2), THEIRS(), layers.Flatten(), layers.Dense(2)])


class Subclassed(keras.Model):
    """Attributes out of order, lists, dicts, two names of one layer, and models inside."""

    def __init__(self):
        super().__init__()
        self.stem = layers.Conv2D(3, 1)
        self.first = THEIRS(name="first")
        self.blocks = [THEIRS(name="block"), layers.Dense(3), [layers.Dense(3)]]
        self.another = {"norm": THEIRS(name="block", epsilon=0.1)}
        self.inside = sequential()
        self.again = self.first

    def call(self, inputs):
        h = self.blocks[1](self.blocks[0](self.again(self.stem(inputs))))
        return self.inside(self.another["norm"](self.blocks[2][0](h)))


def nested():
    inputs = keras.Input((6, 6, 3))
    each = layers.TimeDistributed(THEIRS(name="inner"), name="each")
    recurrent = layers.Bidirectional(layers.LSTM(2), name="both")
    h = recurrent(layers.Reshape((6, 18))(each(inputs)))
    return keras.Model(inputs, [sequential()(inputs), h])


def built(make, seed=0):
    model = make()
    model(X[:2])
    draw = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" in str(variable.dtype):
            variable.assign(draw.uniform(0.5, 1.5, variable.shape))
    return model


MAKES = [functional, sequential, Subclassed, nested]


@pytest.mark.parametrize("make", MAKES)
def test_read_is_what_keras_saves_and_loads(make, tmp_path):
    model, other = built(make), built(make, 1)
    found = ADAPTER.read(model)
    model.save_weights(tmp_path / "theirs.weights.h5")
    theirs = checkpoint.open(tmp_path / "theirs.weights.h5")
    assert set(found) == set(theirs) and found.format == theirs.format
    assert found.metadata["layer_names"] == theirs.metadata["layer_names"]
    for name in theirs:
        np.testing.assert_array_equal(found[name], theirs[name], err_msg=name, strict=True)
    found.save(tmp_path / "ours.weights.h5")
    other.load_weights(tmp_path / "ours.weights.h5")
    for ours, loaded in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(numbers(ours), numbers(loaded))
    third = built(make, 2)
    assert ADAPTER.write(third, found) is third
    for ours, written in zip(model.weights, third.weights, strict=True):
        np.testing.assert_array_equal(numbers(ours), numbers(written))


def test_what_training_adds_to_the_file_is_read_and_written_too(tmp_path):
    model, other = built(sequential), built(sequential, 1)
    for each in (model, other):
        each.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
        each.fit(X, np.ones((8, 2), "f4"), batch_size=4, verbose=0)
    model.save_weights(tmp_path / "theirs.weights.h5")
    theirs, found = checkpoint.open(tmp_path / "theirs.weights.h5"), ADAPTER.read(model)
    assert set(found) == set(theirs) and any(name.startswith("optimizer") for name in found)
    ADAPTER.write(other, found)
    for ours, written in zip(model.optimizer.variables, other.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numbers(ours), numbers(written))


def test_read_says_what_every_layer_is():
    found = ADAPTER.read(built(functional))
    assert [(layer.name, layer.kind, tuple(layer.tensors)) for layer in found.layers] == [
        ("stem/" + found.layers[0].name.split("/")[1], "conv", ("kernel",)),
        ("stem/bn", "BatchNormalization", ("gamma", "beta", "moving_mean", "moving_variance")),
        ("shared", "BatchNormalization", ("gamma", "beta", "moving_mean", "moving_variance", "num_updates")),
        ("grouped", "conv", ("kernel", "bias")),
        ("separable/depthwise", "depthwise", ("kernel",)),
        ("separable/pointwise", "conv", ("kernel", "bias")),
        ("depthwise", "depthwise", ("kernel", "bias")),
        ("up", "conv transpose", ("kernel", "bias")),
        ("group", "norm", ("gamma", "beta")),
        ("dense", "dense", ("kernel", "bias")),
        ("norm", "norm", ("gamma",)),
        ("einsum", "EinsumDense", ("0",)),
        ("last", "BatchNormalization", ("beta", "moving_mean", "moving_variance")),
        ("head", "dense", ("kernel", "bias")),
    ]
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["grouped"].settings == {"dialect": "keras", "groups": 2}
    assert by_name["dense"].settings == {"dialect": "keras", "flatten": [5, 3, 3]}
    assert by_name["head"].settings == {"dialect": "keras"}
    assert found[by_name["separable/depthwise"].tensors["kernel"]].shape == (2, 2, 4, 2)
    held = [name for layer in found.layers for name in layer.tensors.values()]
    assert list(found)[: len(held)] == held and found.order_is_meaningful


@pytest.mark.parametrize("make", [functional, nested])
def test_batch_norms_are_read_with_their_true_spec(make):
    model = built(make)
    found = {stored.name: stored for stored in ADAPTER.read(model).batch_norms()}
    for record in records(model):
        stored = found[record.name]
        assert stored.spec == record.spec and not stored.missing and set(stored.sources.values()) == {"file"}
        for name, array in record.state.arrays().items():
            np.testing.assert_array_equal(getattr(stored.state(), name), array)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays(dtype):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, dtype=dtype), THEIRS(dtype="mixed_" + dtype)])
    found = ADAPTER.read(model)
    assert [tensor.dtype.name for tensor in found.tensors.values()] == [dtype] * 2 + ["float32"] * 4
    changed = found.replace({name: found[name].astype("f8") + 0.1 for name in found})
    ADAPTER.write(model, changed)
    after = ADAPTER.read(model)
    for name in found:
        assert after.tensors[name].dtype == found.tensors[name].dtype
        np.testing.assert_array_equal(after[name], changed[name].astype(found.tensors[name].dtype))


def test_write_refuses_and_changes_nothing():
    model = built(sequential)
    before = ADAPTER.read(model)
    kernel, bias, *_ = before
    cases = [
        (before.replace({kernel: before[kernel] + 1, bias: np.zeros(5, "f4")}), r"has shape \(5,\)"),
        (before.replace({kernel: before[kernel].astype("c8")}), "is complex64"),
        (ADAPTER.read(built(Subclassed)), "lacks .* and has, and the model has not"),
    ]
    for wrong, message in cases:
        with pytest.raises(CheckpointError, match=message):
            ADAPTER.write(model, wrong)
        after = ADAPTER.read(model)
        assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError, match="not built"):
        ADAPTER.read(Subclassed())


def test_what_a_layer_derives_from_its_variables_is_derived_anew():
    model = keras.Sequential([keras.Input((3,)), layers.Normalization()])
    model.layers[0].adapt(X[0, 0])
    other = keras.Sequential([keras.Input((3,)), layers.Normalization()])
    other.layers[0].adapt(X[1, 1] * 3)
    found = ADAPTER.read(model)
    assert found.layers[0].kind == "Normalization"
    ADAPTER.write(other, found)
    np.testing.assert_array_equal(numbers(other(X[0, 0])), numbers(model(X[0, 0])))


def test_configure_is_seen_by_call_and_predict():
    model = built(sequential)
    model.predict(X, verbose=0)
    (record,) = records(model)
    wanted = record.spec.replace(epsilon=3.0, decay=0.75)
    assert ADAPTER.configure(model, {record.name: wanted}) is model
    assert records(model)[0].spec == wanted
    got = ADAPTER.run(model, X, training=False, capture=True)
    x, y = got.layers[record.name]
    state = record.state
    want = (x - state.moving_mean) / np.sqrt(state.moving_variance + 3.0) * state.gamma + state.beta
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.predict(X, verbose=0), got.output, rtol=1e-4, atol=1e-4)

    model = built(functional)
    before = {record.name: record.spec for record in records(model)}
    with pytest.raises(UnsupportedError, match=r"stem/bn.*cumulative"):
        ADAPTER.configure(model, {name: spec.replace(decay="cumulative") for name, spec in before.items()})
    assert {record.name: record.spec for record in records(model)} == before
    wanted = before["shared"].replace(decay=0.875)
    ADAPTER.configure(model, {"shared": wanted})
    assert records(model)[1].spec == wanted


@pytest.mark.parametrize("make", [functional, Subclassed])
def test_run_in_eval_changes_nothing(make):
    model = built(make)
    before = ADAPTER.read(model)
    got = ADAPTER.run(model, X, training=False)
    assert got.model is model and not got.layers and not got.calls and got.output.dtype == np.float32
    outputs = model(X, training=False)
    first = outputs["logits"] if isinstance(outputs, dict) else keras.tree.flatten(outputs)[0]
    np.testing.assert_array_equal(got.output, numbers(first))
    assert all(np.array_equal(before[name], array) for name, array in ADAPTER.read(model).items())
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


@pytest.mark.parametrize("make", MAKES)
def test_run_in_training_moves_statistics_as_keras_does(make):
    model, own = built(make), built(make)
    for each in own._flatten_layers():
        if isinstance(each, layers.Dropout):
            each.rate = 0.0
    own(X, training=True)
    ADAPTER.run(model, X, training=True)
    want, got = ADAPTER.read(own), ADAPTER.read(model)
    moved = 0
    before = ADAPTER.read(built(make))
    for name, array in got.items():
        np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6, err_msg=name)
        moved += not np.array_equal(array, before[name])
    assert moved >= 2 * len(records(model))


def test_frozen_batch_norms_stay():
    model = built(functional)
    frozen = {record.name: record.layer for record in records(model)}
    frozen["stem/bn"].trainable = False
    frozen["shared"].frozen_statistics = True
    before = ADAPTER.read(model)
    ADAPTER.run(model, X, training=True)
    for stored in ADAPTER.read(model).batch_norms():
        same = np.array_equal(stored.checkpoint[name := stored.parts["moving_mean"]], before[name])
        assert same == (stored.name in ("stem/bn", "shared")), stored.name
    assert not frozen["stem/bn"].trainable and frozen["shared"].frozen_statistics


@pytest.mark.parametrize("make", [functional, nested])
def test_capture_has_the_batch_norms_and_the_order_of_calls(make):
    model = built(make)
    got = ADAPTER.run(model, X, training=False, capture=True)
    assert set(got.layers) == {record.name for record in records(model)}
    uncalled = {layer.name for layer in ADAPTER.read(model).layers} - set(got.calls)
    assert all("lstm_cell" in name for name in uncalled)  # PyTorch's kernel computes in place of the cells
    assert len(got.calls) == len(set(got.calls)) > len(got.layers)
    assert [name for name in got.calls if name in got.layers] == list(got.layers)
    if make is functional:
        assert list(got.calls) == [layer.name for layer in ADAPTER.read(model).layers]


def test_everything_comes_back_after_an_error():
    model = built(sequential)
    with pytest.raises(Exception):  # noqa: B017, PT011 each framework has its own
        ADAPTER.run(model, X[:, :2, :2, :2], training=True, capture=True)
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


def test_channels_first_goes_in_and_comes_back():
    if keras.config.backend() == "tensorflow":
        pytest.skip("TensorFlow has no convolution with the channels first on a CPU")
    model = keras.Sequential(
        [keras.Input((3, 6, 6)), layers.Conv2D(5, 2, data_format="channels_first"), THEIRS(axis=1)]
    )
    got = ADAPTER.run(model, X, training=False, capture=True)
    assert got.output.shape == (8, 5, 5, 5)
    np.testing.assert_array_equal(got.output, np.moveaxis(numbers(model(np.moveaxis(X, -1, 1))), 1, -1))


def test_no_gradients_are_recorded():
    model = built(sequential)
    if keras.config.backend() == "torch":
        seen = []
        model.layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
        ADAPTER.run(model, X, training=True)
        assert seen == [False]


def test_what_may_compute_something_else_is_not_guessed_to_be_a_batch_norm():
    class BatchNormalization(THEIRS):
        pass

    found = ADAPTER.read(keras.Sequential([keras.Input((3,)), BatchNormalization()]))
    assert found.layers[0].kind == "BatchNormalization that is no plain batch norm" and found.batch_norms() == []
