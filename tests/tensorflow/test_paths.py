"""Every path over every vector, which one ordinary calls take, and both sides of what the kernel's guard decides."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import bnlayer
from bnlayer import BatchNormSpec, BatchNormState, Renorm
from bnlayer_conformance import runner, vector

tf = pytest.importorskip("tensorflow")

from bnlayer_tensorflow import batch_norm, kernel, totals  # noqa: E402
from bnlayer_tensorflow.paths import PATHS  # noqa: E402

LARGE, SMALL = (32, 16, 16, 16), (8, 4, 4, 4)


def to_second_order(call):
    """What the call gives of x, dx along dy, and what follows from that along dy."""

    def step(x, dy):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                results = call(x)
            dx = tape.gradient(results[0], x, dy)
        return *results, dx, outer.gradient(dx, x, dy)

    return step


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
    w = tf.ones(LARGE[0])
    assert of(LARGE, weights=w) == of(LARGE, weights=w, training=False) == of(LARGE, weights=w > 0) == "fused"
    assert of(LARGE, axis=1, weights=w) == of(LARGE, renorm=Renorm(), weights=w) == "composite"
    ghosts = {"virtual_batch_size": 16}
    assert of(LARGE, **ghosts) == of(LARGE, **ghosts, virtual_batch_layout="consecutive") == "fused"
    assert of(LARGE, **ghosts, weights=w) == of(LARGE, **ghosts, renorm=Renorm()) == of(LARGE, axis=1, **ghosts) \
        == of((31, 64, 64, 16), **ghosts) == of(LARGE, virtual_batch_size=8) == "composite"  # fmt: skip


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


def weighted(x, dy, w, epsilon):
    """y, dx, dw, dgamma, mean and variance by the definition in float64, where w hides what is not finite."""
    seen, dy, w = np.where(w[..., None] > 0, x, 0).astype("f8"), dy.astype("f8"), w.astype("f8")
    p = (w / w.sum())[..., None]
    axes = tuple(range(x.ndim - 1))
    mean = (p * seen).sum(axes)
    variance = (p * np.square(seen - mean)).sum(axes)
    sd = np.sqrt(variance + epsilon)
    xhat = (x - mean) / sd
    shown = np.where(np.isfinite(xhat), xhat, 0)
    first, second = dy.sum(axes), (dy * shown).sum(axes)
    dx = (dy - p * (first + shown * second)) / sd
    dw = -(shown * first + (np.square(shown) - (variance / sd**2)) * second / 2).sum(-1) / w.sum()
    return xhat, dx, dw, second, mean, variance


@pytest.mark.parametrize("where", ["eager", "graph", "compiled unseen"])
@pytest.mark.parametrize("kind", ["0", "30", "1e4", "hidden", "hidden, 1e4", "large, hidden"])
def test_weights_are_within_the_bounds_for_any_data(kind, where):
    """Either round of what sums by weight: near 0, far from it, and where what is hidden, or its square, is not
    finite."""
    rng = np.random.default_rng([7, 6])
    x, dy = rng.normal(size=(2, 32, 8, 8, 8)).astype("f4")
    w = rng.uniform(size=x.shape[:-1]).astype("f4") * (rng.uniform(size=x.shape[:-1]) < 0.75)
    w[3, 4, 5] = w[6, 0, 7] = 0
    if kind.endswith(("30", "1e4")):
        x[..., 3] += np.float32(kind.split()[-1])
    if "hidden" in kind:
        x[3, 4, 5, 1], x[6, 0, 7] = (1e30, -1e30) if "large" in kind else (np.nan, np.inf)
        dy[3, 4, 5] = dy[6, 0, 7] = 0
    spec = BatchNormSpec(8, epsilon=1e-3, decay=0.0)
    state = BatchNormState.initial(spec)

    def call(x, w, gamma):
        y, after = batch_norm(x, state.replace(gamma=gamma), spec, training=True, weights=w)
        return y, after.moving_mean, after.moving_variance

    gamma = tf.ones(8)
    if where == "compiled unseen":
        call = tf.function(call, autograph=False)
        call(tf.constant(x), tf.constant(w), gamma)

    def step(x, dy, w, gamma):
        with tf.GradientTape() as tape:
            tape.watch([x, w, gamma])
            results = call(x, w, gamma)
        return *results, *tape.gradient(results[0], [x, w, gamma], dy)

    if where != "eager":
        step = tf.function(step, autograph=False, jit_compile=where.startswith("compiled"))
    with PATHS.forced() as taken:
        got = step(tf.constant(x), tf.constant(dy), tf.constant(w), gamma)
    assert set(taken) <= {"fused"}
    y, mean, variance, dx, dw, dgamma = (each.numpy().astype("f8") for each in got)
    want_y, want_dx, want_dw, want_dgamma, want_mean, want_variance = weighted(x, dy, w, spec.epsilon)
    n = np.square(w.sum(dtype="f8")) / np.square(w, dtype="f8").sum()
    ku, size = (8 + np.sqrt(n)) * 2.0**-24, np.sqrt(want_mean**2 + want_variance)
    of_y = ku * (size / np.sqrt(want_variance + spec.epsilon) + abs(want_y))
    assert (abs(mean - want_mean) <= ku * size + 2.0**-23 * abs(want_mean)).all()
    assert (abs(variance - want_variance) <= ku * want_variance + (ku * size) ** 2).all()
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(want_y))
    finite = np.isfinite(want_y)
    assert (abs(y[finite] - want_y[finite]) <= of_y[finite]).all()
    relative = max(1e-4, of_y[w > 0].max())
    if "large" in kind:  # a derivative by its weight is beyond float32, and reaches all that have a total in common
        dw = want_dw
    for ours, want in ((dx, want_dx), (dw[w > 0], want_dw[w > 0]), (dgamma, want_dgamma)):
        np.testing.assert_allclose(ours, want, atol=relative * abs(want).max())


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
        rows[:: len(rows) // 64 + 1, 3] -= 1000
    return x, rng.normal(size=x.shape).astype("f4")


@pytest.mark.parametrize("where", ["eager", "graph", "compiled", "compiled unseen"])
@pytest.mark.parametrize("kind", ["0", "2", "30", "1e4", "constant", "misleading"])
@pytest.mark.parametrize(("path", "axis"), [("fused", -1), ("sums", 1)])
def test_the_guards_keep_results_within_bounds_for_any_data(path, axis, kind, where):
    x, dy = data(kind)
    spec = BatchNormSpec(8, axis=axis, epsilon=1e-3, decay=0.0)
    state = BatchNormState.initial(spec)

    def call(x):
        y, after = batch_norm(x, state, spec, training=True)
        return y, after.moving_mean, after.moving_variance

    if where == "compiled unseen":  # traced before anybody says that it is going to be compiled
        call = tf.function(call, autograph=False)
        with PATHS.forced(path) as taken:
            call(tf.constant(np.moveaxis(x, -1, axis)))
        assert taken[path] == 1

    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            results = call(x)
        return *results, tape.gradient(results[0], x, dy)

    if where != "eager":
        step = tf.function(step, autograph=False, jit_compile=where.startswith("compiled"))
    arguments = (tf.constant(np.moveaxis(each, -1, axis)) for each in (x, dy))
    with PATHS.forced(None if where == "compiled" else path):
        y, mean, variance, dx = (each.numpy().astype("f8") for each in step(*arguments))
    y, dx = (np.moveaxis(each, axis, -1) for each in (y, dx))
    want_y, want_dx, want_mean, want_variance, of_y, of_mean, of_variance = exact(x, dy, spec.epsilon)
    assert (abs(mean - want_mean) <= of_mean + 2.0**-23 * abs(want_mean)).all()
    assert (abs(variance - want_variance) <= of_variance).all()
    assert (abs(y - want_y) <= of_y).all()
    np.testing.assert_allclose(dx, want_dx, atol=np.maximum(1e-4, of_y.max()) * abs(want_dx).max())


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        *(("graph", kind) for kind in ("0", "2", "30", "1e4", "constant", "misleading")),
        ("eager", "1e4"),
        ("unknown lengths", "0"),
        ("unknown lengths", "1e4"),
        ("compiled unseen", "2"),
        ("compiled unseen", "1e4"),
    ],
)
def test_renorm_through_the_kernel_is_within_the_bounds_for_any_data(where, kind):
    """Its statistics are known before y is: by sums near 0, and by the kernel elsewhere. Clipped so, it is the plain
    formula, with derivatives of its own."""
    x, dy = data(kind)
    spec = BatchNormSpec(8, epsilon=1e-3, renorm=Renorm(r_max=1.0, r_min=1.0, d_max=0.0, decay=0.0))
    state = BatchNormState.initial(spec)

    def call(x):
        y, after = batch_norm(x, state, spec, training=True)
        return y, after.renorm_mean, after.renorm_stddev

    if where == "unknown lengths":
        call = tf.function(call, autograph=False, input_signature=[tf.TensorSpec([None, None, None, 8])])
    elif where == "compiled unseen":
        call = tf.function(call, autograph=False)

    step = to_second_order(call)
    with PATHS.forced("fused") as taken:
        compiled = where == "compiled unseen"
        if compiled:
            call(tf.constant(x))
        whole = step if where == "eager" else tf.function(step, autograph=False, jit_compile=compiled)
        y, mean, stddev, dx, ddx = (each.numpy().astype("f8") for each in whole(tf.constant(x), tf.constant(dy)))
    assert set(taken) == {"fused"}
    with PATHS.forced("composite"):
        want_ddx = tf.function(step, autograph=False)(tf.constant(x), tf.constant(dy))[-1]
    want_y, want_dx, want_mean, want_variance, of_y, of_mean, of_variance = exact(x, dy, spec.epsilon)
    assert (abs(mean - want_mean) <= of_mean + 2.0**-23 * abs(want_mean)).all()
    of_stddev = of_variance / (2 * np.sqrt(want_variance + spec.epsilon))
    assert (abs(stddev - np.sqrt(want_variance + spec.epsilon)) <= of_stddev + 2.0**-22 * stddev).all()
    assert (abs(y - want_y) <= of_y).all()
    np.testing.assert_allclose(dx, want_dx, atol=np.maximum(1e-4, of_y.max()) * abs(want_dx).max())
    if kind != "constant":  # there its terms are the rounding of others
        np.testing.assert_allclose(ddx, want_ddx, atol=np.maximum(1e-3, 10 * of_y.max()) * abs(want_ddx).numpy().max())


@pytest.mark.parametrize("n", [0, 1, 7, 4099, 12544, 65536])
@pytest.mark.parametrize("known", [True, False])
def test_totals_of_any_number_of_positions(n, known):
    a = np.random.default_rng(14).normal(size=(n, 1, 1, 3)).astype("f4")
    if known and n != 4099:  # on terms that are all alike, sums one after the other drift; of a prime nothing else is
        a[..., 1] = 0.1
    signature = [tf.TensorSpec(a.shape if known else [None, 1, 1, 3])]
    found = tf.function(lambda a: (totals.total(a), totals.total_of_products(a, a)), input_signature=signature)(a)
    wide = a.reshape(-1, 3).astype("f8")
    wanted, sizes = (wide.sum(0), (wide**2).sum(0)), (abs(wide).sum(0), (wide**2).sum(0))
    for got, want, size in zip(found, wanted, sizes, strict=True):
        assert (abs(got.numpy() - want) <= (8 + np.sqrt(n)) * 2.0**-24 * size).all()


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        *(("graph", kind) for kind in ("0", "2", "1e4", "constant", "apart")),
        ("eager", "apart"),
        ("unknown lengths", "0"),
        ("compiled unseen", "2"),
        ("compiled unseen", "apart"),
    ],
)
@pytest.mark.parametrize("layout", ["strided", "consecutive"])
def test_ghost_batches_through_the_kernel(layout, kind, where):
    """Each as if it were alone, the guard's one answer for all of them included."""
    x, dy = data(kind)
    number, g = 4, np.arange(64) % 4 if layout == "strided" else np.arange(64) // 16
    if kind == "apart":  # each is far from 0, and all together are not
        x += np.float32(30) * (g - 1.5).astype("f4").reshape(64, 1, 1, 1)
    spec = BatchNormSpec(8, epsilon=1e-3, decay=0.0, virtual_batch_size=16, virtual_batch_layout=layout)
    state = BatchNormState.initial(spec)

    def call(x):
        y, after = batch_norm(x, state, spec, training=True)
        return y, after.moving_mean, after.moving_variance

    if where == "unknown lengths":
        call = tf.function(call, autograph=False, input_signature=[tf.TensorSpec([64, None, None, 8])])
    elif where == "compiled unseen":
        call = tf.function(call, autograph=False)

    step = to_second_order(call)
    with PATHS.forced("fused") as taken:
        if where == "compiled unseen":
            call(tf.constant(x))
        compiled = where == "compiled unseen"
        whole = step if where == "eager" else tf.function(step, autograph=False, jit_compile=compiled)
        y, mean, variance, dx, ddx = (each.numpy().astype("f8") for each in whole(tf.constant(x), tf.constant(dy)))
    assert set(taken) == {"fused"}
    with PATHS.forced("composite"):
        want_ddx = tf.function(step, autograph=False)(tf.constant(x), tf.constant(dy))[-1]
    found = [exact(x[g == i], dy[g == i], spec.epsilon) for i in range(number)]
    for i, (want_y, want_dx, _, _, of_y, _, _) in enumerate(found):
        assert (abs(y[g == i] - want_y) <= of_y).all()
        np.testing.assert_allclose(dx[g == i], want_dx, atol=np.maximum(1e-4, of_y.max()) * abs(want_dx).max())
    _, _, want_mean, want_variance, of_y, of_mean, of_variance = (np.mean(each, 0) for each in zip(*found, strict=True))
    assert (abs(mean - want_mean) <= of_mean + 2.0**-23 * abs(want_mean)).all()
    assert (abs(variance - want_variance) <= of_variance).all()
    if kind != "constant":  # there its terms are the rounding of others
        scale = np.maximum(1e-3, 10 * of_y.max()) * abs(want_ddx).numpy().max()
        np.testing.assert_allclose(ddx, want_ddx, atol=scale)


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


@pytest.mark.parametrize(
    ("path", "axis", "weighted", "training"),
    [
        ("fused", -1, False, True),
        ("fused", -1, True, True),
        ("fused", -1, True, False),
        ("fused", -1, False, False),
        ("sums", -1, False, True),
        ("sums", 1, False, True),
    ],
)
def test_derivatives_of_functions_loops_and_maps(path, axis, weighted, training):
    """Where custom gradients break: a second derivative of a traced function, forward mode, loops, maps."""
    rng = np.random.default_rng(10)
    shape = (6, 4, 3, 4)
    x, dy, u = rng.normal(size=(3, *shape))
    x[2, 1] = 0.0  # a row of zeros, whose norm has no derivative
    x, dy, u = (tf.constant(each, tf.float32) for each in (x, dy, u))
    spec = BatchNormSpec(4, axis=axis, epsilon=1e-3)
    state = BatchNormState.initial(spec)
    weights = tf.constant([1.0, 0.0, 2.0, 0.5, 1.0, 0.3]) if weighted else None

    def f(x):
        return batch_norm(x, state, spec, training=training, weights=weights)[0]

    def first(f, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = f(x)
        return tape.gradient(y, x, tf.broadcast_to(dy, y.shape))

    def second(f, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            dx = first(f, x)
        return tape.gradient(dx, x, tf.broadcast_to(u, dx.shape), unconnected_gradients="zero")

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


@pytest.mark.parametrize("kind", ["training", "eval", "renorm"])
def test_second_derivatives_by_gamma_inside_of_a_loop(kind):
    """There TensorFlow's derivative of its own gradient of the kernel's inference is wrong."""
    rng = np.random.default_rng(13)
    x, dy = (tf.constant(rng.normal(size=(3, 16, 2, 2, 6)), tf.float32) for _ in range(2))
    gamma = tf.constant(rng.uniform(0.5, 1.5, 6), tf.float32)
    renorm = Renorm(r_max=3.0, r_min=0.33, d_max=5.0, decay=0.9) if kind == "renorm" else None
    spec = BatchNormSpec(6, renorm=renorm)
    state = BatchNormState.initial(spec).replace(
        moving_mean=rng.normal(size=6).astype("f4"), moving_variance=rng.uniform(0.5, 2, 6).astype("f4")
    )

    def second(x, gamma, *, loop):
        def one(x):
            return batch_norm(x, state.replace(gamma=gamma), spec, training=kind != "eval")[0]

        with tf.GradientTape() as outer:
            outer.watch([x, gamma])
            with tf.GradientTape() as inner:
                inner.watch([x, gamma])
                y = tf.map_fn(one, x) if loop else tf.stack([one(each) for each in tf.unstack(x)])
                loss = tf.reduce_sum(tf.sin(y) * dy)
            by_x, by_gamma = inner.gradient(loss, [x, gamma])
            total = tf.reduce_sum(by_x * tf.cos(x)) + tf.reduce_sum(by_gamma * by_gamma)
        return outer.gradient(total, [x, gamma])

    with PATHS.forced("composite"):
        wanted = second(x, gamma, loop=False)
    with PATHS.forced("fused") as taken:
        found = tf.function(partial(second, loop=True), autograph=False)(x, gamma)
    assert set(taken) == {"fused"}
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("nothing", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_by_weights_and_parameters(training, nothing):
    """Of all that y depends on, the moving statistics where nothing has weight among them, against plain operations."""
    rng = np.random.default_rng(12)
    x, dy, u = (tf.constant(rng.normal(size=(6, 4, 3, 4)), tf.float32) for _ in range(3))
    w = tf.constant([0.0] * 6 if nothing else [1.0, 0.5, 2.0, 0.5, 1.0, 0.3])
    spec = BatchNormSpec(4, epsilon=1e-3)
    state = BatchNormState.initial(spec)
    rest = [tf.constant(rng.uniform(0.5, 1.5, 4), tf.float32) for _ in range(4)]
    along = [u, tf.constant(rng.normal(size=6), tf.float32), *(each + 1.0 for each in rest)]

    def derivatives(x, w, gamma, beta, mean, variance):
        sources = [x, w, gamma, beta, mean, variance]
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as inner:
                inner.watch(sources)
                changed = state.replace(gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance)
                y, _ = batch_norm(x, changed, spec, training=training, weights=w)
            first = inner.gradient(y, sources, dy, unconnected_gradients="zero")
            loss = tf.add_n([tf.reduce_sum(a * b) for a, b in zip(first, along, strict=True)])
        return first, outer.gradient(loss, sources, unconnected_gradients="zero")

    with PATHS.forced("composite"):
        wanted = derivatives(x, w, *rest)
    with PATHS.forced("fused") as taken:
        eager, traced = derivatives(x, w, *rest), tf.function(derivatives, autograph=False)(x, w, *rest)
    assert set(taken) == {"fused"}
    for got in (eager, traced):
        for ours, want in zip([*got[0], *got[1]], [*wanted[0], *wanted[1]], strict=True):
            np.testing.assert_allclose(ours, want, rtol=1e-4, atol=2e-4)


def test_what_the_kernel_cannot_differentiate():
    """Third derivatives, and forward mode around a traced function: a limit that the function's docstring states."""
    rng = np.random.default_rng(11)
    x, *directions = (tf.constant(rng.normal(size=(6, 4, 3, 4)), tf.float32) for _ in range(4))
    spec = BatchNormSpec(4, epsilon=1e-3)
    state = BatchNormState.initial(spec)

    def f(x):
        return batch_norm(x, state, spec, training=True)[0]

    def third(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as middle:
                middle.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = f(x)
                first = inner.gradient(y, x, directions[0])
            second = middle.gradient(first, x, directions[1])
        return outer.gradient(second, x, directions[2])

    def forward(f):
        with tf.autodiff.ForwardAccumulator(x, directions[0]) as accumulator:
            y = f(x)
        return accumulator.jvp(y)

    with PATHS.forced("composite"):
        want, want_forward = third(x), forward(f)
    with PATHS.forced("fused"):
        assert abs(third(x) - want).numpy().max() > 1e-2
        assert forward(tf.function(f, autograph=False)) is None
        np.testing.assert_allclose(forward(f), want_forward, rtol=1e-4, atol=1e-5)
        compiled = tf.function(third, autograph=False, jit_compile=True)
        np.testing.assert_allclose(compiled(x), want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            forward(tf.function(f, autograph=False, jit_compile=True)), want_forward, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("probe", [kernel._two_pass, kernel._measured])
def test_whether_the_kernel_takes_two_passes(probe):
    """It does, unless XLA compiles it; an empty batch asks as well."""
    for x in (tf.random.stateless_normal((5, 3), (1, 2)), tf.zeros((5, 3)), -tf.ones((5, 3)), tf.zeros((0, 3))):
        traced = tf.function(probe, autograph=False)
        assert probe(x) and traced(x)
        assert len(x) == 0 or not tf.function(traced, autograph=False, jit_compile=True)(x)
