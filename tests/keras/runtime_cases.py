"""The tests of one Keras runtime. `test_runtimes.py` runs this file once for each, in a process of its own."""

from __future__ import annotations

import inspect
import os

import keras
import numpy as np
import pytest

import bnlayer
from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm, SpecError, StateError, UnsupportedError
from bnlayer.contract import Call, Request
from bnlayer.state import array_dtype, array_names, numpy_dtype
from bnlayer_keras import BatchNormalization

RUNTIME = os.environ["KERAS_BACKEND"]
BACKEND = bnlayer.backend("keras")
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
RNG = np.random.default_rng(41)
X = (RNG.normal(size=(12, 5, 3)) * 2 + 1).astype("f4")
MASK = RNG.random((12, 5)) < 0.7


THEIRS = keras.layers.BatchNormalization
HAVE_RENORM = pytest.mark.skipif(
    "renorm" not in inspect.signature(THEIRS).parameters, reason="this version of Keras has no renorm"
)


def random_options(rng):
    """Fields of a spec that work together: at most one kind of average, and ghost batches with any of them."""
    average = str(rng.choice(["plain", "cumulative", "mean", "all", "renorm", "untracked"]))
    fields = {"decay": "cumulative" if average == "cumulative" else 0.7, "track_moving_stats": average != "untracked"}
    if average == "renorm":
        fields["renorm"] = Renorm(r_max=1.5, d_max=0.4, decay=0.8)
    else:
        fields["moving_variance_estimator"] = str(rng.choice(["biased", "unbiased"]))
    if average in ("mean", "all"):
        fields["zero_debias"] = average
    if rng.random() < 0.4:
        fields["virtual_batch_size"] = int(rng.integers(1, 5))
        fields["virtual_batch_layout"] = str(rng.choice(["strided", "consecutive"]))
    return fields


def random_case(seed):
    rng = np.random.default_rng([41, seed])
    rank = int(rng.integers(2, 6))
    axis = int(rng.integers(1, rank))
    shape = [int(n) for n in rng.integers(1, 5, rank)]
    shape[0] += 2
    dtype = str(rng.choice(["float64", "float32", "float16", "bfloat16"]))
    stored = "float64" if dtype == "float64" else "float32"
    spec = BatchNormSpec(
        shape[axis],
        axis=axis - (rank if rng.random() < 0.5 else 0),
        epsilon=float(rng.choice([1e-5, 1e-3])),
        center=bool(rng.random() < 0.8),
        scale=bool(rng.random() < 0.8),
        single_value="allow",
        param_dtype=stored,
        stats_dtype=stored,
        **random_options(rng),
    )
    arrays = {}
    for name in array_names(spec):
        values = rng.normal(size=spec.num_features)
        positive = name.endswith(("variance", "stddev"))
        arrays[name] = (values**2 + 0.1 if positive else values).astype(array_dtype(spec, name))
    calls = []
    for _ in range(int(rng.integers(1, 3))):
        x, dy = (rng.normal(size=(2, *shape)) * 2).astype(numpy_dtype(dtype))
        positions = [1 if i == axis else n for i, n in enumerate(shape)]
        weights = rng.uniform(0, 3, positions) * (rng.random(positions) < 0.7)
        kind = str(rng.choice(["none", "bool", "float32"]))
        adjustment = None
        if spec.virtual_batch_size is None and rng.random() < 0.3:
            adjustment = tuple(rng.normal(size=(2, shape[0], *[1] * (rank - 1))).astype("f4"))
        calls.append(Call(x, dy=dy, weights=None if kind == "none" else weights.astype(kind), adjustment=adjustment))
    request = Request(
        tuple(calls),
        training=bool(rng.random() < 0.8),
        update_stats=bool(rng.random() < 0.8),
        frozen_statistics=spec.track_moving_stats and bool(rng.random() < 0.15),
        renorm_clips={"r_max": 2.0, "d_max": None} if spec.renorm is not None and rng.random() < 0.5 else None,
    )
    return spec, BatchNormState(**arrays, num_updates=int(rng.integers(0, 5))), request


def close(name, ours, theirs, tolerance):
    assert (ours is None) == (theirs is None), name
    if theirs is not None:
        assert ours.dtype == theirs.dtype, name
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        scale = np.max(np.abs(theirs), where=np.isfinite(theirs), initial=1.0)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("seed", range(24))
def test_agrees_with_numpy_on_a_random_case(seed):
    spec, state, request = random_case(seed)
    layer, ours = BACKEND.step(BACKEND.build(spec, state), request)
    reference = bnlayer.backend("numpy")
    _, theirs = reference.step(reference.build(spec, state), request)
    tolerance = TOLERANCE[request.calls[0].x.dtype.name]
    for i, (a, b) in enumerate(zip(ours.calls, theirs.calls, strict=True)):
        for name in ("y", "dx", "dweights"):
            close(f"{name} of call {i}", getattr(a, name), getattr(b, name), tolerance)
    close("dgamma", ours.dgamma, theirs.dgamma, tolerance)
    close("dbeta", ours.dbeta, theirs.dbeta, tolerance)
    assert ours.state.arrays().keys() == theirs.state.arrays().keys()
    for name, array in theirs.state.arrays().items():
        close(name, getattr(ours.state, name), array, tolerance)
    assert ours.state.num_updates == theirs.state.num_updates
    assert BACKEND.extract(layer)[0] == spec


def test_an_empty_batch_changes_nothing():
    x = np.zeros((0, 3), "f4")
    layer = bnlayer.build(BatchNormSpec(3), "keras")
    _, outcome = BACKEND.step(layer, Request((Call(x, dy=x),), training=True))
    assert outcome.calls[0].y.shape == outcome.calls[0].dx.shape == (0, 3)
    np.testing.assert_array_equal(outcome.dgamma, np.zeros(3))
    np.testing.assert_array_equal(outcome.state.moving_variance, np.ones(3))
    assert outcome.state.num_updates == 0


RENORM = {"renorm": True, "renorm_clipping": {"rmax": 1.5, "dmax": 0.3}, "renorm_momentum": 0.8}
KERAS_OPTIONS = [{}, pytest.param(RENORM, marks=HAVE_RENORM)]


@pytest.mark.parametrize("options", KERAS_OPTIONS, ids=["plain", "renorm"])
def test_the_same_numbers_as_keras(options):
    ours, theirs = BatchNormalization(**options), THEIRS(**options)
    for i in range(3):
        y, want = ours(X + i, training=True), theirs(X + i, training=True)
    np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (y, want)), rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert int(keras.ops.convert_to_numpy(ours.num_updates)) == 3


@pytest.mark.parametrize("options", KERAS_OPTIONS, ids=["plain", "renorm"])
def test_weights_go_both_ways(options, tmp_path):
    ours, theirs = BatchNormalization(**options), THEIRS(**options)
    ours(X, training=True)
    theirs.build(X.shape)
    theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(theirs(X)), keras.ops.convert_to_numpy(ours(X)), rtol=1e-5, atol=1e-6
    )
    ours.set_weights([w + 1 for w in theirs.get_weights()])
    np.testing.assert_array_equal(ours.get_weights()[2], theirs.get_weights()[2] + 1)
    names = [w.path.rpartition("/")[2] for w in ours.weights]
    assert names == [w.path.rpartition("/")[2] for w in theirs.weights]
    keras.Sequential([keras.Input((5, 3)), theirs]).save_weights(tmp_path / "theirs.weights.h5")
    keras.Sequential([keras.Input((5, 3)), ours]).load_weights(tmp_path / "theirs.weights.h5")
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_configs_go_both_ways():
    theirs = keras.layers.BatchNormalization(
        axis=1, momentum=0.8, epsilon=1e-4, center=False, gamma_initializer="zeros", gamma_regularizer="l2", name="bn"
    )
    ours = BatchNormalization.from_config(theirs.get_config())
    assert (ours.axis, ours.momentum, ours.epsilon, ours.center, ours.name) == (1, 0.8, 1e-4, False, "bn")
    config = theirs.get_config()
    assert ours.get_config().items() <= config.items()
    again = keras.layers.BatchNormalization.from_config(ours.get_config())
    assert again.get_config() == config


@HAVE_RENORM
@pytest.mark.parametrize("clipping", [None, {"rmax": 3.0, "rmin": 0.5}])
def test_renorm_configs_go_both_ways(clipping):
    theirs = THEIRS(renorm=True, renorm_clipping=clipping, renorm_momentum=0.8)
    ours = BatchNormalization.from_config(theirs.get_config())
    ours.build((None, 3))
    assert ours.spec.renorm == Renorm(r_max=3.0 if clipping else None, r_min=0.5 if clipping else None, decay=0.8)
    assert THEIRS.from_config(ours.get_config()).get_config() == theirs.get_config()


def test_a_config_keeps_what_keras_lacks():
    extras = {
        "virtual_batch_size": 4,
        "virtual_batch_layout": "consecutive",
        "cumulative": True,
        "moving_variance_estimator": "unbiased",
        "single_value": "raise",
        "frozen_statistics": True,
        "param_dtype": "float32",
        "stats_dtype": "float16",
    }
    layer = BatchNormalization(**extras)
    layer.build((None, 3))
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again.spec == layer.spec
    assert again.frozen_statistics
    assert extras.items() <= layer.get_config().items()


def model(**options):
    inputs = keras.Input((5, 3))
    outputs = keras.layers.Dense(1)(BatchNormalization(name="bn", **options)(keras.layers.Dense(3)(inputs)))
    made = keras.Model(inputs, outputs)
    made.compile("sgd", "mse")
    return made


@pytest.mark.parametrize(
    ("options", "weights", "counts"),
    [
        ({}, 4, False),
        ({"cumulative": True}, 5, True),
        ({"zero_debias": "all"}, 7, True),
        (RENORM, 7, False),
        ({"virtual_batch_size": 3, "virtual_batch_layout": "consecutive"}, 4, False),
    ],
    ids=["plain", "cumulative", "zero_debias", "renorm", "ghosts"],
)
def test_fit_moves_statistics_and_counts(options, weights, counts, tmp_path):
    trained = model(**options)
    bn = trained.get_layer("bn")
    before = [w.copy() for w in bn.get_weights()]
    trained.fit(X, X[..., :1], batch_size=5, epochs=2, verbose=0)  # of 5, 5 and 2 rows
    assert int(keras.ops.convert_to_numpy(bn.num_updates)) == 6
    for old, new in zip(before, bn.get_weights(), strict=True):
        assert not np.array_equal(old, new)
    trained.evaluate(X, X[..., :1], verbose=0)
    want = trained.predict(X, verbose=0)
    assert int(keras.ops.convert_to_numpy(bn.num_updates)) == 6
    assert len(bn.weights) == weights
    trained.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), want, rtol=1e-5, atol=1e-6)
    if counts:
        assert int(keras.ops.convert_to_numpy(loaded.get_layer("bn").num_updates)) == 6


def test_fit_leaves_a_layer_that_is_not_trainable():
    trained = model()
    bn = trained.get_layer("bn")
    bn.trainable = False
    trained.compile("sgd", "mse")
    before = bn.get_weights()
    trained.fit(X, X[..., :1], batch_size=4, verbose=0)
    for old, new in zip(before, bn.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(keras.ops.convert_to_numpy(bn.num_updates)) == 0
    np.testing.assert_allclose(*(keras.ops.convert_to_numpy(bn(X, training=t)) for t in (True, False)))


def test_frozen_statistics_still_learn_the_parameters():
    trained = model(frozen_statistics=True)
    bn = trained.get_layer("bn")
    before = [w.copy() for w in bn.get_weights()]
    trained.fit(X, X[..., :1], batch_size=4, verbose=0)
    moved = [not np.array_equal(old, new) for old, new in zip(before, bn.get_weights(), strict=True)]
    assert moved == [True, True, False, False]


def test_masks_and_weights():
    plain, masked, both = (BatchNormalization(momentum=0.0) for _ in range(3))
    plain(X[MASK], training=True)
    masked(X, training=True, mask=MASK)
    weights = RNG.uniform(0.5, 2, 12).astype("f4")
    both(X, training=True, mask=MASK, weights=weights)
    for a, b in zip(plain.get_weights(), masked.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    spread = np.broadcast_to(weights[:, None], MASK.shape)[MASK]
    np.testing.assert_allclose(both.get_weights()[2], np.average(X[MASK], axis=0, weights=spread), rtol=1e-5)
    with pytest.raises(InputError, match="rank"):
        both(X, training=True, mask=MASK[:, 0], weights=np.ones((12, 5), "f4"))
    with pytest.raises(InputError, match=r"weights must be .*negative"):
        both(X, training=True, weights=-weights)


def test_keras_passes_its_masks_on():
    padded = X.copy()
    padded[3:, 2:] = 0
    sequence = keras.Sequential([keras.layers.Masking(), BatchNormalization(momentum=0.0)])
    sequence(padded, training=True)
    here = (padded != 0).any(-1)
    np.testing.assert_allclose(sequence.layers[1].get_weights()[2], padded[here].mean(0), rtol=1e-5)


def test_eval_and_train_before_one_backward_pass():
    """The moving statistics that the first call used may not change under it."""
    layer = bnlayer.build(BatchNormSpec(3), "keras")
    x = X[:, 0]
    if RUNTIME != "torch":
        pytest.skip("only torch keeps what it needs for the backward pass in place")
    tensor = keras.ops.convert_to_tensor(x).requires_grad_()
    first = layer(tensor, training=False)
    (first + layer(tensor, training=True)).sum().backward()
    np.testing.assert_allclose(tensor.grad.numpy(), np.full_like(x, 1 / np.sqrt(1 + 1e-5)), atol=1e-5)


@pytest.mark.skipif(RUNTIME != "torch", reason="elsewhere there is one way")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((40, 3), {}),
        ((40, 3), {"moving_variance_estimator": "unbiased", "momentum": 0.25, "epsilon": 0.5}),
        ((4, 8, 8, 3), {"center": False}),
        ((4, 3, 8, 8), {"axis": 1, "scale": False}),
        ((512, 3), {}),
        ((2, 1, 3, 1), {"axis": 2}),
    ],
)
def test_plain_calls_on_torch_do_without_a_spec(shape, options, training, monkeypatch):
    from bnlayer_keras import on_torch

    rng, results, plain, came = np.random.default_rng(5), [], on_torch.plain, []
    x, dy = (keras.ops.convert_to_tensor(rng.normal(size=shape).astype("f4") + 1) for _ in range(2))
    for way in (lambda *given: came.append(plain(*given)) or came[-1], lambda *_: None):
        monkeypatch.setattr(on_torch, "plain", way)
        layer = BatchNormalization(moving_mean_initializer="ones", **options)
        layer.build(shape)
        leaf = x.clone().requires_grad_()
        y = layer(leaf, training=training)
        y.backward(dy)
        parts = [y, leaf.grad, *(v.value.grad for v in layer.trainable_variables)]
        parts += [v.value for v in (*layer.non_trainable_variables, layer.num_updates)]
        results.append([keras.ops.convert_to_numpy(part) for part in parts])
    assert len(came) == 1
    assert came[0] is not None
    for got, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_policies(policy):
    layer, theirs = BatchNormalization(dtype=policy), keras.layers.BatchNormalization(dtype=policy)
    y, want = layer(X, training=True), theirs(X, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == keras.backend.standardize_dtype(want.dtype)
    assert [w.dtype for w in layer.weights] == [w.dtype for w in theirs.weights]


def test_without_autocast_y_has_the_dtype_of_x():
    layer = bnlayer.build(BatchNormSpec(3), "keras")
    y = layer(keras.ops.cast(X, "float16"), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert layer(keras.Input((3,), dtype="float16")).dtype == "float16"


def test_an_adjustment_of_the_layer():
    shapes = []

    def adjustment(shape):
        shapes.append(tuple(int(length) for length in shape))
        return 2.0, np.arange(3, dtype="f4")

    layer, plain = BatchNormalization(adjustment=adjustment), BatchNormalization()
    numbers = keras.ops.convert_to_numpy
    for frozen in (False, True):
        layer.frozen_statistics = plain.frozen_statistics = frozen
        for training in (False, True):
            y, want = (numbers(each(X, training=training)) for each in (layer, plain))
            adjusts = training and not frozen
            np.testing.assert_allclose(y, 2 * want + np.arange(3) if adjusts else want, rtol=1e-5, atol=1e-5)
    assert shapes == [X.shape]
    layer.frozen_statistics = False
    y = numbers(layer(X, training=True, adjustment=(np.ones((12, 1, 1), "f4"), np.zeros(3, "f4"))))
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-5)
    assert len(shapes) == 1
    for a, b in zip(layer.get_weights(), plain.get_weights(), strict=True):
        assert a.shape == b.shape
    with pytest.raises(UnsupportedError, match="adjustment"):
        layer.get_config()


def test_fit_with_an_adjustment():
    """In a graph of TensorFlow the batch's length is a tensor."""
    trained = model(adjustment=lambda shape: (1.1 * keras.ops.ones((shape[0], 1, 1)), 0.1))
    before = trained.get_layer("bn").get_weights()
    trained.fit(X, X[..., :1], batch_size=5, verbose=0)
    for old, new in zip(before, trained.get_layer("bn").get_weights(), strict=True):
        assert not np.array_equal(old, new)


def test_symbolic_inputs_are_checked():
    layer = BatchNormalization(axis=1)
    layer(keras.Input((3, 4)))
    with pytest.raises(InputError, match="3 channels"):
        layer(keras.Input((4, 4)))
    with pytest.raises(InputError, match="broadcast"):
        BatchNormalization()(keras.Input((5, 3)), adjustment=(np.ones((2, 3), "f4"), np.zeros(3, "f4")))
    with pytest.raises(InputError, match="axis 2"):
        BatchNormalization(axis=2)(keras.Input((3,)))


def test_refuses_by_name():
    with pytest.raises(SpecError, match="invalid keys"):
        BatchNormalization(renorm=True, renorm_clipping={"r_max": 3.0})
    with pytest.raises(SpecError, match="adjustment and virtual_batch_size"):
        BatchNormalization(adjustment=lambda shape: (1.0, 0.0), virtual_batch_size=4)
    with pytest.raises(InputError, match="renorm_clips need a layer with renorm"):
        BatchNormalization()(X, training=True, renorm_clips={"r_max": 3.0})
    synchronized = bnlayer.build(BatchNormSpec(3, synchronized=True), "keras")
    with pytest.raises(UnsupportedError, match="shards"):
        BACKEND.step(synchronized, Request((Call(X[:, 0]),), training=True, shards=(8, 4)))
    with pytest.raises(bnlayer.SpecError, match="epsilon"):
        BatchNormalization(epsilon=-1.0)
    with pytest.raises(InputError, match="build"):
        _ = BatchNormalization().spec
    with pytest.raises(InputError, match="more than one value"):
        BatchNormalization(single_value="raise")(X[:1, 0], training=True)
    layer = bnlayer.build(BatchNormSpec(3), "keras")
    negative = BatchNormState.initial(layer.spec).replace(moving_variance=np.array([1, -1, 1], "f4"))
    with pytest.raises(StateError, match="negative"):
        bnlayer.load(layer, negative)
    with pytest.raises(UnsupportedError, match="gpu:63"):
        bnlayer.build(BatchNormSpec(3), "keras", device="gpu:63")
    assert bnlayer.build(BatchNormSpec(3), "keras", device="cpu:0").spec == BatchNormSpec(3)


def test_a_counter_of_any_size():
    layer = bnlayer.build(BatchNormSpec(3), "keras")
    state = BatchNormState.initial(layer.spec).replace(num_updates=2**40)
    if RUNTIME == "jax":
        with pytest.raises(StateError, match="without x64"):
            bnlayer.load(layer, state)
    else:
        bnlayer.load(layer, state)
        assert bnlayer.extract(layer)[1].num_updates == 2**40


def test_float64_is_float64_or_refused():
    layer = BatchNormalization(dtype="float64")
    if RUNTIME == "jax":
        with pytest.raises(UnsupportedError, match="x64"):
            layer.build((None, 3))
    else:
        assert keras.backend.standardize_dtype(layer(X.astype("f8"), training=True).dtype) == "float64"


def test_the_version_names_the_runtime():
    assert BACKEND.version() == f"{keras.__version__} ({RUNTIME})"
    assert BACKEND.owns(BatchNormalization())
    assert not BACKEND.owns(keras.layers.BatchNormalization())
