"""Every path over every vector, which one ordinary calls take, and both sides of what the kernel's guard decides."""

from __future__ import annotations

import numpy as np
import pytest

import bnlayer
from bnlayer import BatchNormSpec, BatchNormState, Renorm
from bnlayer_conformance import runner, vector

tf = pytest.importorskip("tensorflow")

from bnlayer_tensorflow import batch_norm  # noqa: E402
from bnlayer_tensorflow.paths import PATHS  # noqa: E402

LARGE, SMALL = (32, 16, 16, 16), (8, 4, 4, 4)


@pytest.mark.parametrize("path", PATHS.names)
def test_a_path_over_every_vector(path):
    target = runner.find("tensorflow", bnlayer.backend)
    with PATHS.forced(path) as taken:
        failed = [r.vector for r in runner.run(vector.load(), target) if r.status != "pass"]
    assert not failed
    assert taken[path] > 0


def taken_by(shape, *, axis=-1, training=True, dtype="float32", context=None, weights=None, **options):
    spec = BatchNormSpec(shape[axis], axis=axis, **options)
    state = BatchNormState.initial(spec)

    def call(x):
        return batch_norm(x, state, spec, training=training, weights=weights)[0]

    with PATHS.forced() as taken:
        (call if context is None else tf.function(call, autograph=False, **context))(tf.zeros(shape, dtype))
    [path] = taken
    return path


@pytest.mark.parametrize("context", [None, {}])
def test_which_path_ordinary_calls_take(context):
    def of(shape, **options):
        return taken_by(shape, context=context, **options)

    assert of(LARGE) == of(LARGE, training=False) == of(LARGE, renorm=Renorm()) == of(LARGE, dtype="float16") == "fused"
    assert of(SMALL) == of(SMALL, training=False) == of(LARGE, axis=1) == of(LARGE, dtype="float64") == "sums"
    assert of(LARGE, weights=tf.ones(LARGE[0])) == of(LARGE, virtual_batch_size=8) == "composite"


def test_of_unknown_lengths_many_are_assumed():
    signature = {"input_signature": [tf.TensorSpec([None, None, None, 4])]}
    assert taken_by(SMALL, context=signature, single_value="allow") == "fused"


def test_plain_operations_are_left_to_xla_and_to_graphs_of_tensorflow_1():
    assert taken_by(LARGE, context={"jit_compile": True}) == "composite"
    with tf.Graph().as_default():
        assert taken_by(SMALL) == "composite"


def exact(x, dy, epsilon):
    """y, dx, mean and variance by two passes in float64, and the bounds on the errors of y, mean and variance."""
    x, dy = x.astype("f8"), dy.astype("f8")
    axes, n = tuple(range(x.ndim - 1)), x.size / x.shape[-1]
    mean, variance = x.mean(axes), x.var(axes)
    sd = np.sqrt(variance + epsilon)
    xhat = (x - mean) / sd
    dx = (dy - dy.mean(axes) - xhat * (dy * xhat).mean(axes)) / sd
    ku, size = (8 + np.sqrt(n)) * 2.0**-24, np.sqrt(mean**2 + variance)
    return xhat, dx, mean, variance, ku * (size / sd + abs(xhat)), ku * size, ku * variance + (ku * size) ** 2


def data(kind):
    rng = np.random.default_rng([7, 5])
    x = rng.normal(size=(64, 16, 16, 8)).astype("f4")
    if kind in ("2", "30", "1e4"):
        x[..., 3] += np.float32(kind)
    elif kind == "constant":
        x[..., 3] = 12345.678
    elif kind == "misleading":  # the sample is of mean 0, all else is not
        rows = x.reshape(-1, 8)
        rows[:, 3] += 1000
        rows[:: len(rows) // 256, 3] -= 1000
    return x, rng.normal(size=x.shape).astype("f4")


@pytest.mark.parametrize("where", ["eager", "graph", "compiled", "compiled unseen"])
@pytest.mark.parametrize("kind", ["0", "2", "30", "1e4", "constant", "misleading"])
def test_the_kernel_is_within_its_bounds_for_any_data(kind, where):
    x, dy = data(kind)
    spec = BatchNormSpec(8, epsilon=1e-3, decay=0.0)
    state = BatchNormState.initial(spec)

    def call(x):
        y, after = batch_norm(x, state, spec, training=True)
        return y, after.moving_mean, after.moving_variance

    if where == "compiled unseen":  # traced before anybody says that it is going to be compiled
        call = tf.function(call, autograph=False)
        with PATHS.forced("fused") as taken:
            call(tf.constant(x))
        assert taken["fused"] == 1

    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            results = call(x)
        return *results, tape.gradient(results[0], x, dy)

    if where != "eager":
        step = tf.function(step, autograph=False, jit_compile=where.startswith("compiled"))
    y, mean, variance, dx = (each.numpy().astype("f8") for each in step(tf.constant(x), tf.constant(dy)))
    want_y, want_dx, want_mean, want_variance, of_y, of_mean, of_variance = exact(x, dy, spec.epsilon)
    assert (abs(mean - want_mean) <= of_mean + 2.0**-23 * abs(want_mean)).all()
    assert (abs(variance - want_variance) <= of_variance).all()
    assert (abs(y - want_y) <= of_y).all()
    np.testing.assert_allclose(dx, want_dx, atol=np.maximum(1e-4, of_y.max()) * abs(want_dx).max())


@pytest.mark.parametrize("path", ["fused", "sums"])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_eval_far_from_zero(path, mean):
    rng = np.random.default_rng(9)
    x = (rng.normal(size=(64, 8)) + mean).astype("f4")
    spec = BatchNormSpec(8)
    state = BatchNormState.initial(spec).replace(moving_mean=np.full(8, mean, "f4"))
    with PATHS.forced(path) as taken:
        y, _ = batch_norm(x, state, spec, training=False)
    assert taken[path] == 1
    np.testing.assert_allclose(y, (x.astype("f8") - mean) / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("path", "axis"), [("fused", -1), ("sums", -1), ("sums", 1)])
def test_derivatives_of_functions_loops_and_maps(path, axis):
    """Where custom gradients break: a second derivative of a traced function, forward mode, loops, maps."""
    rng = np.random.default_rng(10)
    shape = (6, 4, 3, 4)
    x, dy, u = (tf.constant(rng.normal(size=shape), tf.float32) for _ in range(3))
    spec = BatchNormSpec(4, axis=axis, epsilon=1e-3)
    state = BatchNormState.initial(spec)

    def f(x):
        return batch_norm(x, state, spec, training=True)[0]

    def first(f, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = f(x)
        return tape.gradient(y, x, tf.broadcast_to(dy, y.shape))

    def second(f, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            dx = first(f, x)
        return tape.gradient(dx, x, tf.broadcast_to(u, dx.shape))

    def forward(f, x):
        with tf.autodiff.ForwardAccumulator(x, u) as accumulator:
            y = f(x)
        return accumulator.jvp(y)

    with PATHS.forced("composite"):
        wanted = [each(f, x).numpy() for each in (first, second, forward)]
    pair = tf.stack([x, 2 * x])
    with PATHS.forced(path) as taken:
        traced = tf.function(f, autograph=False)

        def mapped(z):
            return tf.map_fn(f, z)

        got = [
            [first(f, x), first(traced, x), tf.vectorized_map(lambda z: first(f, z), pair)[0],
             tf.function(lambda: first(mapped, pair), autograph=False)()[0]],
            [second(f, x), second(traced, x), tf.function(lambda: second(mapped, pair), autograph=False)()[0]],
            [forward(f, x), tf.function(lambda: forward(f, x), autograph=False)()],
        ]  # fmt: skip
    assert set(taken) == {path}
    for want, values in zip(wanted, got, strict=True):
        for value in values:
            np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-5)
