"""Batch norms inside of Keras models: listed, converted in place and back, frozen."""

from __future__ import annotations

import os

import keras
import numpy as np
import pytest

from bnlayer import UnsupportedError, models
from bnlayer_keras import BatchNormalization

RUNTIME = os.environ["KERAS_BACKEND"]
THEIRS = keras.layers.BatchNormalization
layers = keras.layers
RNG = np.random.default_rng(44)
X = RNG.normal(size=(8, 6, 6, 3)).astype("f4")
Y = RNG.normal(size=(8, 2)).astype("f4")


def numbers(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def functional():
    """A shared layer, a sequential model inside, the channels on another axis, a wrapper."""
    shared = THEIRS(name="shared", gamma_regularizer="l2")
    stem = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(3, 3), THEIRS(name="bn", scale=False)], name="stem")
    inputs = keras.Input((6, 6, 3))
    h = THEIRS(name="bn", axis=1)(stem(shared(inputs)))
    h = layers.Add()([h, shared(layers.Conv2D(3, 1)(h))])
    h = layers.TimeDistributed(THEIRS(name="inner", momentum=0.5), name="each")(h)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(h)), name="functional")


class Subclassed(keras.Model):
    """Attributes, lists, dicts, tuples, two names of one layer, and a functional model inside."""

    def __init__(self):
        super().__init__()
        self.first = THEIRS(name="first")
        self.blocks = [THEIRS(name="block"), layers.Dense(3)]
        self.named = {"norm": THEIRS(name="block", epsilon=0.1)}
        self.pair = (layers.Dense(2), THEIRS(name="last"))
        self.inside = functional()
        self.again = self.first

    def call(self, inputs, training=None):
        h = self.blocks[0](self.again(inputs, training=training), training=training)
        h = self.inside(self.named["norm"](self.blocks[1](h), training=training), training=training)
        return self.pair[1](self.pair[0](h), training=training)


NAMES = {
    functional: ["shared", "stem/bn", "bn", "each/inner"],
    Subclassed: [
        "first",
        "block",
        "block#2",
        "last",
        *(f"functional/{name}" for name in ("shared", "stem/bn", "bn", "each/inner")),
    ],
}


def trained(make):
    model = make()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(X, Y, batch_size=4, verbose=0)
    return model


def kinds(model):
    return {record.kind for record in models.batch_norms(model)}


def moved(before, after):
    return [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize("make", NAMES, ids=["functional", "subclassed"])
def test_there_and_back(make, tmp_path):
    model = trained(make)
    held, paths = list(model.variables), [v.path for v in model.weights]
    want, predicted = numbers(model(X)), model.predict(X, verbose=0)
    assert [r.name for r in models.batch_norms(model)] == NAMES[make]

    conversion = models.convert(model)
    assert conversion.model is model and len(conversion.replaced) == len(NAMES[make]) and not conversion.refused
    assert [r.name for r in models.batch_norms(model)] == NAMES[make] and kinds(model) == {"bnlayer"}
    assert [v.path for v in model.weights] == paths
    assert all(any(v is w for w in model.variables) for v in held if "seed" not in v.path)
    np.testing.assert_allclose(numbers(model(X)), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.predict(X, verbose=0), predicted, rtol=1e-4, atol=1e-5)

    slots = [numbers(v).copy() for v in model.optimizer.variables]
    model.fit(X, Y, batch_size=4, verbose=0)  # with the optimizer that it had
    assert any(moved(slots, map(numbers, model.optimizer.variables)))
    counts = {r.name.rpartition("/")[2]: int(numbers(r.layer.num_updates)) for r in models.batch_norms(model)}
    assert counts["bn"] == 2 and counts["shared"] == 4 and counts["inner"] == 8  # called once, twice and four times
    if make is functional:
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(numbers(loaded(X)), numbers(model(X)), rtol=1e-6, atol=1e-6)
        assert kinds(loaded) == kinds(keras.models.clone_model(model)) == {"bnlayer"}
        part = keras.Model(model.input, model.get_layer("bn").output)  # the graph can be cut where the new layers are
        assert part(X).shape == (8, 4, 4, 3)

    want = numbers(model(X))
    assert models.convert(model, "native").model is model
    assert kinds(model) == {"native"} and [v.path for v in model.weights] == paths
    np.testing.assert_allclose(numbers(model(X)), want, rtol=1e-4, atol=1e-5)
    model.fit(X, Y, batch_size=4, verbose=0)


def test_freezing_the_one_and_the_other():
    model = trained(functional)
    with pytest.raises(UnsupportedError, match="convert the model"):
        models.freeze(model)
    models.convert(model)

    def after_training():
        if RUNTIME == "jax":
            model.compile("sgd", "mse")  # as Keras has it on JAX after a change of what is trainable
        before = [r.state for r in models.batch_norms(model)]
        model.fit(X, Y, batch_size=4, verbose=0)
        after = [r.state for r in models.batch_norms(model)]
        pairs = list(zip(before, after, strict=True))
        return (
            [not np.array_equal(a.moving_mean, b.moving_mean) for a, b in pairs],
            [not np.array_equal(a.beta, b.beta) for a, b in pairs],
        )

    models.freeze(model, "*bn", parameters=False)
    assert after_training() == ([True, False, False, True], [True] * 4)
    models.unfreeze(model)
    models.freeze(model, ["shared", "bn"], statistics=False)
    assert after_training() == ([True] * 4, [False, True, False, True])
    paths = [v.path for v in model.weights]
    assert len(model.trainable_weights) == len(trained(functional).trainable_weights) - 4
    models.convert(model, "native")
    assert [v.path for v in model.weights] == paths  # the flags stay, and do not change the order
    models.unfreeze(model, statistics=False)
    assert after_training() == ([True] * 4, [True] * 4)


def test_keras_own_flag_is_respected():
    model = trained(functional)
    model.get_layer("bn").trainable = False
    models.convert(model)
    layer = model.get_layer("bn")
    assert type(layer) is BatchNormalization and not layer.trainable
    with pytest.raises(UnsupportedError, match=r"layer\.trainable"):
        models.unfreeze(model, "bn", statistics=False)
    before = layer.get_weights()
    layer(np.ones((2, 4, 4, 3), "f4"), training=True)
    assert not any(moved(before, layer.get_weights()))


def test_what_cannot_be_converted_is_told():
    class Own(THEIRS):
        pass

    model = keras.Sequential([keras.Input((3,)), Own(name="own"), THEIRS(momentum=1.5, name="odd"), THEIRS(name="bn")])
    with pytest.raises(UnsupportedError, match="nothing was") as raised:
        models.convert(model)
    assert "a subclass, Own" in str(raised.value) and "decay must be" in str(raised.value)
    partly = models.convert(model, allow_partial=True)
    assert [r.name for r in partly.replaced] == ["bn"] and [r.name for r in partly.refused] == ["own", "odd"]
    unbuilt = keras.Sequential([THEIRS(name="bn")])
    with pytest.raises(UnsupportedError, match="call the model first"):
        models.convert(unbuilt)


def test_nothing_is_lost_on_the_way_back():
    inputs, weights = keras.Input((3,)), keras.Input(())
    ghosts = BatchNormalization(virtual_batch_size=4, name="ghosts")(inputs)
    frozen = BatchNormalization(frozen_statistics=True, name="frozen")(ghosts)
    weighted = BatchNormalization(name="weighted")(frozen, weights=weights)
    model = keras.Model([inputs, weights], BatchNormalization(name="plain")(weighted))
    refused = models.convert(model, "native", allow_partial=True).refused
    assert {r.name: r.reason.rpartition("would lose ")[2] for r in refused} == {
        "ghosts": "virtual_batch_size.",
        "frozen": "frozen_statistics.",
        "weighted": "weights.",
    }
    assert kinds(model) == {"bnlayer", "native"}


def test_a_batch_norm_is_a_model_too():
    layer = THEIRS(name="bn")
    layer(X, training=True)
    ours = models.convert(layer).model
    assert type(ours) is BatchNormalization and ours.gamma is layer.gamma
    np.testing.assert_allclose(numbers(ours(X)), numbers(layer(X)), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(RUNTIME != "tensorflow", reason="checkpoints and SavedModels are TensorFlow's")
def test_a_converted_model_can_be_exported(tmp_path):
    import tensorflow as tf

    model = trained(functional)
    models.convert(model)
    saved = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    want = numbers(model(X))
    model.fit(X, Y, batch_size=4, verbose=0)
    tf.train.Checkpoint(model=model).restore(saved).assert_existing_objects_matched()
    np.testing.assert_array_equal(numbers(model(X)), want)
    model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(loaded.serve(X), want, rtol=1e-5, atol=1e-5)
