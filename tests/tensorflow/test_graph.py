"""In a `tf.function`: unknown lengths, decisions left to the running graph, XLA."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import BatchNormSpec, BatchNormState, InputError

tf = pytest.importorskip("tensorflow")

from bnlayer_tensorflow import BatchNorm, batch_norm  # noqa: E402

RNG = np.random.default_rng(21)
X = RNG.normal(size=(6, 4, 3)).astype("f4")
DY = RNG.normal(size=X.shape).astype("f4")
WEIGHTS = RNG.uniform(0, 2, 6).astype("f4")


def traced(spec, *, weighted, training=True, unknown=True, jit_compile=None):
    """One function: forward and backward; x's batch and time lengths are unknown to it."""
    initial = BatchNormState.initial(spec)

    def run(x, dy, w, mean, variance, counter):
        state = initial.replace(moving_mean=mean, moving_variance=variance, num_updates=counter)
        gamma = tf.ones(3)
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, w])
            y, after = batch_norm(
                x, state.replace(gamma=gamma), spec, training=training, weights=w if weighted else None
            )
        gradients = tape.gradient(y, [x, gamma, w], dy, unconnected_gradients="zero")
        return y, after.moving_mean, after.moving_variance, after.num_updates, *gradients

    length = None if unknown else X.shape[0]
    positions = [length, None if unknown else X.shape[1], 3]
    signature = [tf.TensorSpec(positions), tf.TensorSpec(positions), tf.TensorSpec([length]), tf.TensorSpec([3]),
                 tf.TensorSpec([3]), tf.TensorSpec([], tf.int64)]  # fmt: skip
    graph = tf.function(run, input_signature=signature, jit_compile=jit_compile)

    def on(function, x=X, dy=DY, w=WEIGHTS):
        start = (np.zeros(3, "f4"), np.ones(3, "f4"), np.int64(2))
        return [t.numpy() for t in function(*[tf.constant(a) for a in (x, dy, w, *start)])]

    return on, graph, run


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unknown", [False, True])
def test_a_graph_computes_what_eager_does(weighted, jit_compile, unknown):
    spec = BatchNormSpec(3, moving_variance_estimator="unbiased", decay="cumulative")
    on, graph, eager = traced(spec, weighted=weighted, jit_compile=jit_compile, unknown=unknown)
    for ours, want in zip(on(graph), on(eager), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_empty_batch_at_run_time(weighted, jit_compile):
    on, graph, _ = traced(BatchNormSpec(3), weighted=weighted, jit_compile=jit_compile)
    y, mean, variance, counter, dx, dgamma, dweights = on(graph, X[:0], DY[:0], WEIGHTS[:0])
    assert y.shape == dx.shape == (0, 4, 3)
    assert dweights.shape == (0,)
    np.testing.assert_array_equal(mean, np.zeros(3))
    np.testing.assert_array_equal(variance, np.ones(3))
    np.testing.assert_array_equal(dgamma, np.zeros(3))
    assert counter == 2


def test_one_value_at_run_time():
    one = X[:1, :1], DY[:1, :1], WEIGHTS[:1]
    on, graph, _ = traced(BatchNormSpec(3), weighted=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than one value per channel"):
        on(graph, *one)
    on(graph)  # the same function, with more than one
    spec = BatchNormSpec(3, single_value="allow", moving_variance_estimator="unbiased", decay=0.5)
    on, graph, _ = traced(spec, weighted=False)
    y, mean, variance, counter, dx, *_ = on(graph, *one)
    np.testing.assert_array_equal(y, np.zeros((1, 1, 3)))
    np.testing.assert_array_equal(dx, np.zeros((1, 1, 3)))
    np.testing.assert_allclose(mean, X[0, 0] / 2, rtol=1e-6)
    np.testing.assert_array_equal(variance, np.full(3, 0.5))
    assert counter == 3


def test_eval_takes_one_value():
    on, graph, _ = traced(BatchNormSpec(3), weighted=False, training=False)
    assert on(graph, X[:1, :1], DY[:1, :1])[3] == 2


@pytest.mark.parametrize("jit_compile", [False, True])
def test_all_zero_weights_at_run_time(jit_compile):
    on, graph, _ = traced(BatchNormSpec(3, epsilon=1e-3), weighted=True, jit_compile=jit_compile)
    y, mean, variance, counter, dx, _, dweights = on(graph, w=np.zeros(6, "f4"))
    np.testing.assert_allclose(y, X / np.sqrt(1.001), rtol=1e-6)
    np.testing.assert_allclose(dx, DY / np.sqrt(1.001), rtol=1e-6)
    np.testing.assert_array_equal(mean, np.zeros(3))
    np.testing.assert_array_equal(variance, np.ones(3))
    np.testing.assert_array_equal(dweights, np.zeros(6))
    assert counter == 2


@pytest.mark.parametrize("jit_compile", [False, True])
def test_nan_under_a_mask_at_run_time(jit_compile):
    on, graph, _ = traced(BatchNormSpec(3), weighted=True, jit_compile=jit_compile)
    x, dy, w = X.copy(), DY.copy(), np.array([1, 0, 1, 1, 0, 1], "f4")
    x[1], dy[1] = np.nan, 0
    y, *rest = on(graph, x, dy, w)
    assert np.isnan(y[1]).all()
    assert np.isfinite(np.delete(y, 1, 0)).all()
    assert all(np.isfinite(values).all() for values in rest)


def test_bad_weights_at_run_time():
    on, graph, _ = traced(BatchNormSpec(3), weighted=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="finite and not negative"):
        on(graph, w=np.array([1, -1, 1, 1, 1, 1], "f4"))


def test_a_layer_moves_its_variables_inside_a_graph():
    layer, eager = BatchNorm(BatchNormSpec(3)), BatchNorm(BatchNormSpec(3))
    step = tf.function(lambda x: layer(x, training=True))
    for x in (X, 2 * X, X + 1):
        np.testing.assert_allclose(step(x), eager(x, training=True), rtol=1e-5, atol=1e-6)
    assert layer.num_updates.numpy() == 3
    np.testing.assert_allclose(layer.moving_variance, eager.moving_variance, rtol=1e-6)


def test_an_unknown_rank_is_refused():
    layer = BatchNorm(BatchNormSpec(3))
    graph = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec(None)], autograph=False)
    with pytest.raises(InputError, match="known rank"):
        graph(tf.constant(X))


def test_checks_run_in_a_graph_of_tensorflow_1() -> None:
    """A session runs only what is fetched: an assertion that nothing depends on would never be asked."""
    spec = BatchNormSpec(3)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [None, 3])
        w = tf.compat.v1.placeholder(tf.float32, [None])
        arrays = {name: tf.constant(array) for name, array in BatchNormState.initial(spec).arrays().items()}
        state = BatchNormState(**arrays, num_updates=tf.constant(0, tf.int64))
        plain, _ = batch_norm(x, state, spec, training=True)
        weighted, _ = batch_norm(x, state, spec, training=True, weights=w)
        four = np.arange(12, dtype=np.float32).reshape(4, 3)
        assert session.run(plain, {x: four}).shape == (4, 3)
        with pytest.raises(tf.errors.InvalidArgumentError, match="more than one value per channel"):
            session.run(plain, {x: four[:1]})
        assert session.run(weighted, {x: four, w: [1.0, 2.0, 0.0, 1.0]}).shape == (4, 3)
        with pytest.raises(tf.errors.InvalidArgumentError, match="finite and not negative"):
            session.run(weighted, {x: four, w: [1.0, -2.0, 0.0, 1.0]})
