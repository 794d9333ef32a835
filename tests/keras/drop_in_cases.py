"""A changed import in a Keras model that exists: everything that works with Keras's layer works with ours."""

from __future__ import annotations

import os
import zipfile

import keras
import numpy as np
import pytest

from bnlayer import InputError, SpecError, UnsupportedError
from bnlayer_keras import BatchNormalization

RUNTIME = os.environ["KERAS_BACKEND"]
THEIRS = keras.layers.BatchNormalization
RNG = np.random.default_rng(43)
X = (RNG.normal(size=(12, 5, 3)) * 2 + 1).astype("f4")


def numbers(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def count(layer):
    return int(numbers(layer.num_updates))


def network(layer):
    inputs = keras.Input((5, 3))
    return keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))


def agree(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_code_that_looks_for_batch_norms_finds_it():
    assert isinstance(BatchNormalization(), THEIRS)
    assert BatchNormalization().get_config().keys() == THEIRS().get_config().keys()


def test_arguments_as_keras_takes_them():
    assert BatchNormalization(axis=np.int64(1), momentum=np.float32(0.5)).get_config()["axis"] == 1
    assert BatchNormalization(axis=[3]).axis == 3  # as Keras 2 wrote it
    layer = BatchNormalization(
        gamma_initializer="ones",
        beta_initializer=keras.initializers.Constant(0.5),
        moving_mean_initializer=lambda shape, dtype=None: keras.ops.full(shape, 2.0, dtype=dtype),
    )
    layer.build((None, 3))
    for values, want in zip(layer.get_weights(), (1, 0.5, 2, 1), strict=True):
        np.testing.assert_array_equal(values, np.full(3, want))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": 0}, "batch axis"),
        ({"axis": [1, 2]}, "axis must be"),
        ({"axis": 1.5}, "axis must be"),
        ({"momentum": 1.5}, "decay must be"),
        ({"epsilon": -1.0}, "epsilon must be"),
        ({"renorm": True, "renorm_clipping": {"rmax": 0.0, "rmin": 1.0}}, "rmax should be"),
        ({"renorm": True, "renorm_clipping": {"dmax": -1.0}}, "dmax should be"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, message):
    with pytest.raises(SpecError, match=message):
        BatchNormalization(**arguments)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="batch axis and a channel axis"):
        BatchNormalization()(X[0, 0])
    with pytest.raises(ValueError, match="out of bounds"):
        BatchNormalization(axis=3).compute_output_shape((None, 5, 3))
    assert BatchNormalization().compute_output_shape((None, None, 3)) == (None, None, 3)
    assert BatchNormalization()(keras.Input((None, 3))).shape == (None, None, 3)


def test_integers_are_cast_as_in_keras():
    whole = np.arange(12).reshape(4, 3)
    ours, theirs = (kind()(whole, training=True) for kind in (BatchNormalization, THEIRS))
    assert dtype_of(ours) == dtype_of(theirs) == "float32"
    np.testing.assert_allclose(numbers(ours), numbers(theirs), atol=1e-5)
    assert BatchNormalization()(keras.Input((3,), dtype="uint8")).dtype == "float32"
    with pytest.raises(InputError, match="int"):
        BatchNormalization(autocast=False)(whole)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"])
def test_policies_give_keras_numbers(policy):
    if policy == "float64" and RUNTIME == "jax":
        pytest.skip("JAX has float64 under x64 only, which would hold for every other case too")
    ours, theirs = BatchNormalization(dtype=policy), THEIRS(dtype=policy)
    y, want = ours(X, training=True), theirs(X, training=True)
    assert dtype_of(y) == dtype_of(want)
    assert [w.dtype for w in ours.weights] == [w.dtype for w in theirs.weights]
    tolerance = {"float64": 2e-6, "mixed_float16": 2e-3, "float16": 2e-3}.get(policy, 2e-2)  # PyTorch: float32 inside
    np.testing.assert_allclose(numbers(y).astype("f8"), numbers(want).astype("f8"), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        numbers(ours(X)).astype("f8"), numbers(theirs(X)).astype("f8"), rtol=tolerance, atol=tolerance
    )


def test_regularizers_and_constraints_train_as_in_keras():
    arguments = {
        "gamma_regularizer": "l2",
        "beta_regularizer": keras.regularizers.L1(0.1),
        "beta_constraint": "non_neg",
        "gamma_constraint": keras.constraints.MaxNorm(0.9),
        "name": "bn",
    }
    models = []
    for kind in (BatchNormalization, THEIRS):
        keras.utils.set_random_seed(0)
        model = network(kind(**arguments))
        model.compile(keras.optimizers.SGD(0.5), "mse")
        model.fit(X, X[..., :1], batch_size=6, shuffle=False, verbose=0)
        models.append(model)
    assert len(models[0].losses) == 2
    agree(*models, tolerance=1e-4)
    gamma, beta = models[0].get_layer("bn").get_weights()[:2]
    assert np.linalg.norm(gamma) < 0.91 and beta.min() >= 0


def test_keras_files_carry_the_counter_and_exchange_with_keras(tmp_path):
    model = network(BatchNormalization(name="bn"))
    for _ in range(3):
        model(X, training=True)
    model.save(tmp_path / "ours.keras")
    want = numbers(model(X))
    again = keras.saving.load_model(tmp_path / "ours.keras")
    assert count(again.get_layer("bn")) == 3
    np.testing.assert_array_equal(numbers(again(X)), want)
    theirs = network(THEIRS(name="bn"))
    theirs.load_weights(tmp_path / "ours.keras")
    np.testing.assert_allclose(numbers(theirs(X)), want, rtol=1e-5, atol=1e-5)
    theirs.save(tmp_path / "theirs.keras")
    # Keras looks up its own classes by itself, whatever custom_objects says: the class is changed after loading.
    swapped = keras.models.clone_model(
        keras.saving.load_model(tmp_path / "theirs.keras"),
        clone_function=lambda layer: (BatchNormalization if type(layer) is THEIRS else type(layer)).from_config(
            layer.get_config()
        ),
    )
    assert type(swapped.get_layer("bn")) is BatchNormalization
    swapped.load_weights(tmp_path / "theirs.keras")
    np.testing.assert_array_equal(numbers(swapped(X)), want)
    model.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    swapped.load_weights(tmp_path / "theirs.weights.h5")
    np.testing.assert_array_equal(numbers(swapped(X)), want)


@pytest.mark.parametrize("text", [b"-1", b"9" * 30, b"\xff", b""])
def test_a_damaged_counter_is_refused(tmp_path, text):
    model = network(BatchNormalization(name="bn"))
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive, zipfile.ZipFile(tmp_path / "bad.keras", "w") as bad:
        for name in archive.namelist():
            bad.writestr(name, text if name.endswith("num_updates.txt") else archive.read(name))
    with pytest.raises(ValueError, match="must be a count"):  # Keras collects what layers raise
        keras.saving.load_model(tmp_path / "bad.keras")


def test_old_h5_files_take_the_class_by_name(tmp_path):
    keras.Sequential([keras.Input((3,)), THEIRS(name="bn")]).save(tmp_path / "theirs.h5")
    model = keras.saving.load_model(
        tmp_path / "theirs.h5", custom_objects={"BatchNormalization": BatchNormalization}, compile=False
    )
    assert type(model.get_layer("bn")) is BatchNormalization


def test_clones_and_other_kinds_of_models():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = BatchNormalization(name="bn")
            self.out = keras.layers.Dense(1)

        def call(self, inputs, training=None):
            return self.out(self.norm(inputs, training=training))

    for model in (Subclassed(), keras.models.clone_model(network(BatchNormalization(name="bn")))):
        model.compile("sgd", "mse")
        model.fit(X, X[..., :1], batch_size=4, verbose=0)
        layer = next(each for each in model.layers if each.name == "bn")
        assert count(layer) == 3
        model.predict(X, verbose=0)
        assert count(layer) == 3


def test_frozen_as_in_keras_also_after_compile():
    for trainable in (True, False):
        model = network(BatchNormalization(name="bn"))
        model.compile("sgd", "mse")
        model.get_layer("bn").trainable = trainable
        if not trainable:
            model.compile("sgd", "mse")
        model.fit(X, X[..., :1], batch_size=4, verbose=0)
        assert count(model.get_layer("bn")) == (3 if trainable else 0)


def test_fit_with_tf_data_and_class_weights():
    tf = pytest.importorskip("tensorflow") if RUNTIME == "tensorflow" else None
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(name="bn"), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, labels = X[:, 0], (X[:, 0, 0] > 1).astype("i4")
    # XLA has no kernel for some operations of TensorFlow, and refuses what it cannot compile whole.
    model.compile("sgd", loss, metrics=["accuracy"], jit_compile=RUNTIME != "torch")
    if tf is None:
        model.fit(x, labels, batch_size=5, sample_weight=np.linspace(0, 1, 12), verbose=0)
    else:
        data = tf.data.Dataset.from_tensor_slices((x, labels)).batch(5)
        model.fit(data, class_weight={0: 1.0, 1: 3.0}, verbose=0)
        assert model.jit_compile
    assert count(model.get_layer("bn")) == 3
    assert np.isfinite(model.evaluate(x, labels, verbose=0)).all()


# Masks


def masked_statistics(x, mask, axis):
    """Mean and variance of each channel over what the mask, of x's shape, leaves."""
    channels = [(np.take(x, c, axis)[np.take(mask, c, axis)]) for c in range(x.shape[axis])]
    return np.array([c.mean() for c in channels]), np.array([c.var() for c in channels])


def check_masked(layer, x, where, axis, mask):
    layer(x, training=True, mask=mask)
    mean, variance = masked_statistics(x, np.broadcast_to(where, x.shape), axis)
    np.testing.assert_allclose(numbers(layer.moving_mean), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numbers(layer.moving_variance), variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [5, 3], ids=["T-5", "T-equals-C"])
@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_a_mask_without_the_channel_axis(length, dtype):
    x = RNG.normal(size=(6, length, 3)).astype("f4")
    mask = RNG.random((6, length)) < 0.6
    check_masked(BatchNormalization(momentum=0.0), x, mask[..., None], -1, mask=mask.astype(dtype))
    first = np.ascontiguousarray(x.swapaxes(1, 2))
    check_masked(BatchNormalization(momentum=0.0, axis=1), first, mask[:, None], 1, mask=mask.astype(dtype))


def test_one_channel_under_a_mask():
    mask = RNG.random((12, 5)) < 0.6
    check_masked(BatchNormalization(momentum=0.0), X[..., :1], mask[..., None], -1, mask=mask)


@pytest.mark.parametrize("length", [5, 3], ids=["T-5", "T-equals-F"])
def test_a_mask_that_keras_hands_on_lacks_the_last_axis(length):
    """Also where the channel axis is another, so that each channel has its own positions."""
    x = RNG.normal(size=(6, length, 3)).astype("f4")
    here = RNG.random((6, length)) < 0.7
    here[0] = True
    x[~here] = 0
    model = keras.Sequential([keras.layers.Masking(), BatchNormalization(axis=1, momentum=0.0)])
    model(x, training=True)
    mean, variance = masked_statistics(x, np.broadcast_to(here[..., None], x.shape), 1)
    layer = model.layers[1]
    np.testing.assert_allclose(numbers(layer.moving_mean), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numbers(layer.moving_variance), variance, rtol=1e-4, atol=1e-5)
    assert count(layer) == 1
    y = numbers(model(x, training=True))
    for c in range(length):
        np.testing.assert_allclose(y[here[:, c], c].mean(), 0, atol=1e-5)


def test_an_embedding_s_mask_reaches_it():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    model = keras.Sequential([keras.layers.Embedding(4, 3, mask_zero=True), BatchNormalization(momentum=0.0)])
    model(tokens, training=True)
    rows = numbers(model.layers[0](tokens))[tokens != 0]
    np.testing.assert_allclose(numbers(model.layers[1].moving_mean), rows.mean(0), rtol=1e-4, atol=1e-6)


def test_what_does_not_go_with_masks_by_channel():
    mask = np.ones((12, 5), bool)
    with pytest.raises(InputError, match="differs by channel"):
        BatchNormalization(axis=1, cumulative=True)(X, training=True, mask=mask)
    with pytest.raises(InputError, match="differs by channel"):
        BatchNormalization(axis=1)(X, training=True, mask=mask, weights=np.ones(12, "f4"))
    with pytest.raises(InputError, match="weights must have shape"):
        BatchNormalization()(X, training=True, mask=np.ones((12, 4), bool))


# What one framework has


@pytest.mark.skipif(RUNTIME != "tensorflow", reason="SavedModels are TensorFlow's")
def test_exported_models_compute_the_same(tmp_path):
    import tensorflow as tf

    model = network(BatchNormalization())
    model(X, training=True)
    model.export(tmp_path / "inference", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "inference")
    np.testing.assert_allclose(loaded.serve(tf.constant(X)), numbers(model(X)), rtol=1e-6, atol=1e-6)
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("train", lambda x: model(x, training=True), [tf.TensorSpec((None, 5, 3))])
    archive.write_out(tmp_path / "training", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "training")
    np.testing.assert_allclose(loaded.train(X), numbers(model(X, training=True)), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(RUNTIME != "jax", reason="only JAX's training is stateless")
def test_stateless_calls():
    import jax

    layer = BatchNormalization()
    layer.build(X.shape)
    learned, rest = layer.trainable_variables, layer.non_trainable_variables

    @jax.jit
    def step(learned, rest, x):
        return layer.stateless_call(learned, rest, x, training=True)

    y, after = step([v.value for v in learned], [v.value for v in rest], X)
    np.testing.assert_allclose(y, numbers(layer(X, training=True)), rtol=1e-5, atol=1e-5)
    for value, variable in zip(after, rest, strict=True):
        np.testing.assert_allclose(value, numbers(variable), rtol=1e-6)


@pytest.mark.skipif(RUNTIME != "torch", reason="a torch training loop")
def test_in_a_torch_training_loop():
    import torch

    torch.manual_seed(0)
    layer, theirs = BatchNormalization(name="bn"), THEIRS(name="bn")
    both = []
    for each in (layer, theirs):
        each.build((None, 3))
        model = torch.nn.Sequential(each)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (each(torch.tensor(X[:, 0]), training=True) ** 3).sum().backward()
            optimizer.step()
        both.append(model)
    agree(layer, theirs, tolerance=1e-3)
    assert count(layer) == 3
    ours = both[0].state_dict()
    assert ours.keys() == both[1].state_dict().keys()
    both[1].load_state_dict(ours)
    agree(layer, theirs, tolerance=0)
    both[0].load_state_dict(both[1].state_dict())


def test_second_order_through_the_layer():
    """The derivative of dx along a direction, by central differences of dx."""
    layer = BatchNormalization(dtype="float64" if RUNTIME != "jax" else "float32")
    x = X[:, 0].astype(layer.dtype)
    direction = np.linspace(-1, 1, x.size).reshape(x.shape).astype(x.dtype)

    def loss(y):
        return keras.ops.sum(y**3)

    if RUNTIME == "tensorflow":
        import tensorflow as tf

        def slope(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(layer(x, training=True))
            return tape.gradient(value, x)

        with tf.GradientTape() as outer:
            point = tf.constant(x)
            outer.watch(point)
            along = tf.reduce_sum(slope(point) * direction)
        hvp = outer.gradient(along, point)
        slope_of = lambda x: slope(tf.constant(x))  # noqa: E731
    elif RUNTIME == "torch":
        import torch

        def slope(x):
            return torch.autograd.grad(loss(layer(x, training=True)), x, create_graph=True)[0]

        point = torch.tensor(x, requires_grad=True)
        hvp = torch.autograd.grad((slope(point) * torch.tensor(direction)).sum(), point)[0]
        slope_of = lambda x: slope(torch.tensor(x, requires_grad=True)).detach()  # noqa: E731
    else:
        import jax

        layer.build(x.shape)
        values = [[v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)]
        slope_of = jax.grad(lambda x: loss(layer.stateless_call(*values, x, training=True)[0]))
        hvp = jax.jvp(slope_of, (x,), (direction,))[1]
    step = 1e-5 if x.dtype == np.float64 else 1e-2
    want = (numbers(slope_of(x + step * direction)) - numbers(slope_of(x - step * direction))) / (2 * step)
    tolerance = 1e-6 if x.dtype == np.float64 else 2e-2
    np.testing.assert_allclose(numbers(hvp), want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.skipif(RUNTIME == "tensorflow", reason="test_synchronized runs it on replicas")
def test_synchronized_without_replicas_is_one_replica():
    layer, plain = BatchNormalization(synchronized=True), BatchNormalization()
    np.testing.assert_allclose(numbers(layer(X, training=True)), numbers(plain(X, training=True)), rtol=1e-5, atol=1e-5)
    agree(layer, plain)
    with pytest.raises((ValueError, UnsupportedError)):
        THEIRS(synchronized=True)
