"""renorm, ghost batches, zero_debias, adjustments: what is TensorFlow's own about them."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm

tf = pytest.importorskip("tensorflow")

from bnlayer_tensorflow import BatchNorm, batch_norm  # noqa: E402

RNG = np.random.default_rng(51)
WIDE = {"param_dtype": "float64", "stats_dtype": "float64"}
LAYOUTS = ("strided", "consecutive")
CLIPPED = Renorm(r_max=1.3, r_min=1.3, d_max=0.01, decay=0.8)  # constants where every d is beyond its clip


def both_graphs(spec, *, weighted):
    """Forward and backward of one call: in a graph that knows no length but the channels', under XLA, and eagerly."""
    state = BatchNormState.initial(spec)

    def run(x, dy, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y, after = batch_norm(x, state, spec, training=True, weights=w if weighted else None)
        dx, dw = tape.gradient(y, [x, w], dy, unconnected_gradients="zero")
        return {"y": y, "dx": dx, "dw": dw, "num_updates": after.num_updates, **after.arrays()}

    signature = [tf.TensorSpec([None, None, 3]), tf.TensorSpec([None, None, 3]), tf.TensorSpec([None])]
    return [tf.function(run, input_signature=signature, jit_compile=jit) for jit in (False, True)], run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("weighted", "renorm"), [(False, None), (True, Renorm(r_max=1.2, d_max=0.3))])
def test_one_graph_takes_any_number_of_rows(layout, weighted, renorm):
    spec = BatchNormSpec(3, virtual_batch_size=3, virtual_batch_layout=layout, renorm=renorm, single_value="allow")
    graphs, eager = both_graphs(spec, weighted=weighted)
    for rows in (0, 2, 4, 6, 7):
        x, dy = (tf.constant(RNG.normal(size=(rows, 2, 3)).astype("f4")) for _ in range(2))
        w = tf.constant((RNG.uniform(0, 2, rows) * (np.arange(rows) % 3 > 0)).astype("f4"))
        want = eager(x, dy, w)
        for graph in graphs if rows in (0, 7) else graphs[:1]:  # XLA compiles anew for every length
            for name, ours in graph(x, dy, w).items():
                np.testing.assert_allclose(ours, want[name], rtol=2e-5, atol=2e-5, err_msg=f"{name}, {rows} rows")


def test_y_keeps_its_static_shape():
    spec = BatchNormSpec(3, virtual_batch_size=2)
    state = BatchNormState.initial(spec)
    shapes = []

    @tf.function(input_signature=[tf.TensorSpec([None, 4, 3])], autograph=False)
    def run(x):
        y, after = batch_norm(x, state, spec, training=True)
        shapes.extend([y.shape.as_list(), after.moving_mean.shape.as_list()])
        return y

    run(tf.zeros((5, 4, 3)))
    assert shapes == [[None, 4, 3], [3]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ghost_batch_of_one_value_at_run_time(layout):
    spec = BatchNormSpec(3, virtual_batch_size=2, virtual_batch_layout=layout)
    state = BatchNormState.initial(spec)
    run = tf.function(
        lambda x: batch_norm(x, state, spec, training=True)[0],
        input_signature=[tf.TensorSpec([None, None, 3])],
        autograph=False,
    )
    run(RNG.normal(size=(5, 2, 3)).astype("f4"))  # ghost batches of 2, 2 and 1 rows, of two positions each
    run(RNG.normal(size=(4, 1, 3)).astype("f4"))
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than one value per channel"):
        run(RNG.normal(size=(5, 1, 3)).astype("f4"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_ghost_batch_stays_alone(layout):
    x = RNG.normal(size=(6, 3))
    x[5, 1] = np.nan
    spec = BatchNormSpec(3, virtual_batch_size=2, virtual_batch_layout=layout, nonfinite="keep", **WIDE)
    bad = [2, 5] if layout == "strided" else [4, 5]
    with tf.GradientTape() as tape:
        moving = tf.constant(x)
        tape.watch(moving)
        y, after = batch_norm(moving, BatchNormState.initial(spec), spec, training=True)
    dx = tape.gradient(y, moving)
    for values in (y.numpy(), dx.numpy()):
        finite = np.isfinite(values)
        assert not finite[bad, 1].any()
        finite[bad, 1] = True
        assert finite.all()
    np.testing.assert_array_equal(after.moving_mean.numpy() == 0, [False, True, False])


def numeric_gradient(function, at, step=1e-5):
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        moved = at.copy()
        moved[i] += step
        up = function(moved)
        moved[i] -= 2 * step
        gradient[i] = (up - function(moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    "options",
    [
        {"virtual_batch_size": 3, "virtual_batch_layout": "strided"},
        {"virtual_batch_size": 3, "virtual_batch_layout": "consecutive"},
        {"renorm": CLIPPED},
        {"renorm": CLIPPED, "virtual_batch_size": 4},
        {"zero_debias": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_second_order(options, weighted):
    """The gradient of <dloss/dx, u> with respect to x, w and gamma, against differences of the first gradient."""
    rng = np.random.default_rng(52)
    spec = BatchNormSpec(3, epsilon=1e-3, **WIDE, **options)
    state = BatchNormState.initial(spec)
    if spec.renorm is not None:
        state = state.replace(renorm_mean=np.array([9.0, -9.0, 9.0]))
    x, dy, u = rng.normal(size=(3, 7, 3))
    start = [x, rng.uniform(0.5, 2, 7), rng.normal(size=3)]
    adjustment = tuple(rng.normal(size=(2, 7, 3))) if spec.virtual_batch_size is None else None

    @tf.function
    def product(x, w, gamma):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = batch_norm(x, state.replace(gamma=gamma), spec, training=True, weights=w if weighted else None,
                              adjustment=adjustment)  # fmt: skip
        return tf.reduce_sum(tape.gradient(y, x, dy) * u)

    sources = [tf.constant(array) for array in start]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        value = product(*sources)
    got = tape.gradient(value, sources, unconnected_gradients="zero")
    for which, ours in enumerate(got):

        def at(moved, which=which):
            return float(product(*[tf.constant(moved) if i == which else s for i, s in enumerate(sources)]))

        np.testing.assert_allclose(ours, numeric_gradient(at, start[which]), atol=2e-7, rtol=1e-6)


def test_gradients_reach_the_adjustment():
    rng = np.random.default_rng(53)
    spec = BatchNormSpec(3, renorm=CLIPPED, **WIDE)
    state = BatchNormState.initial(spec).replace(gamma=rng.normal(size=3))
    x, dy = rng.normal(size=(2, 5, 3))
    scale, bias = tf.constant(rng.normal(size=(5, 1))), tf.constant(rng.normal(size=3))
    with tf.GradientTape() as tape:
        tape.watch([scale, bias])
        y, _ = batch_norm(x, state, spec, training=True, adjustment=(scale, bias))
    dscale, dbias = tape.gradient(y, [scale, bias], dy)
    normalized = 1.3 * (x - x.mean(0)) / np.sqrt(x.var(0) + spec.epsilon) + np.clip(x.mean(0), -0.01, 0.01)
    np.testing.assert_allclose(dscale, (dy * state.gamma * normalized).sum(1, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(dbias, (dy * state.gamma).sum(0), rtol=1e-9)


def test_python_numbers_lose_nothing():
    rng = np.random.default_rng(54)
    x = rng.normal(size=(5, 3))
    spec = BatchNormSpec(3, renorm=Renorm(), center=False, scale=False, **WIDE)
    state = BatchNormState.initial(spec)
    clips = {"r_max": 0.1, "d_max": 0.0}
    y, after = batch_norm(x, state, spec, training=True, adjustment=(0.3, 0.7), renorm_clips=clips, decay=0.1)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * 0.1 * 0.3 + 0.7, rtol=1e-13)
    np.testing.assert_allclose(after.moving_mean, 0.9 * x.mean(0), rtol=1e-14)


@pytest.mark.parametrize("average", [{}, {"zero_debias": "all"}, {"renorm": Renorm(r_max=1.1)}], ids=str)
def test_a_schedule_of_decays_and_clips(average):
    """Tensors of one graph do what Python's numbers do eagerly."""
    spec = BatchNormSpec(3, decay=0.5, **average)
    scheduled, plain = BatchNorm(spec), BatchNorm(spec)

    @tf.function
    def step(x, decay, r_max):
        clips = None if spec.renorm is None else {"r_max": r_max, "d_max": 2.0 * r_max}
        return scheduled(x, training=True, decay=decay, renorm_clips=clips)

    for i in range(1, 4):
        x = RNG.normal(size=(6, 3)).astype("f4") + i
        decay, r_max = 0.25 * i, 0.5 * i
        clips = None if spec.renorm is None else {"r_max": r_max, "d_max": 2.0 * r_max}
        y = step(x, tf.constant(decay), tf.constant(r_max))
        np.testing.assert_allclose(y, plain(x, training=True, decay=decay, renorm_clips=clips), rtol=1e-5, atol=1e-6)
    assert step.experimental_get_tracing_count() == 1
    for name, array in plain.state.arrays().items():
        np.testing.assert_allclose(getattr(scheduled, name), array, rtol=1e-5, atol=1e-6)


def test_decay_of_a_call():
    x = RNG.normal(size=(6, 3)).astype("f4")
    spec = BatchNormSpec(3, decay=0.9, renorm=Renorm(decay=0.8))
    state = BatchNormState.initial(spec)
    _, after = batch_norm(x, state, spec, training=True, decay=0.0)
    np.testing.assert_allclose(after.moving_mean, x.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(after.renorm_mean, 0.2 * x.mean(0), rtol=1e-5, atol=1e-7)
    _, frozen = batch_norm(x, state, spec, training=True, decay=1.0)
    np.testing.assert_array_equal(frozen.moving_mean, state.moving_mean)
    for changes, decay, match in (
        ({}, 1.5, r"\[0, 1\]"),
        ({}, float("nan"), r"\[0, 1\]"),
        ({"decay": "cumulative", "renorm": None}, 0.5, "cumulative"),
        ({"zero_debias": "mean", "renorm": None}, 1.0, "below 1"),
    ):
        changed = spec.replace(**changes)
        with pytest.raises(InputError, match=match):
            batch_norm(x, BatchNormState.initial(changed), changed, training=True, decay=decay)


def test_zero_debias_of_a_decay_near_one():
    spec = BatchNormSpec(3, decay=1 - 1e-7, zero_debias="all")
    x = RNG.normal(size=(64, 3)).astype("f4")
    _, after = batch_norm(x, BatchNormState.initial(spec), spec, training=True)
    np.testing.assert_allclose(after.moving_mean, x.astype("f8").mean(0), rtol=1e-5)
    np.testing.assert_allclose(after.moving_variance, x.astype("f8").var(0), rtol=1e-5)


def test_refuses_an_adjustment_that_is_not_real():
    spec = BatchNormSpec(3)
    with pytest.raises(InputError, match="bias must be real"):
        batch_norm(np.ones((4, 3), "f4"), BatchNormState.initial(spec), spec, training=True,
                   adjustment=(1.0, np.zeros(3, "c8")))  # fmt: skip


def test_options_bring_their_variables(tmp_path):
    for options, names in (
        ({"renorm": Renorm()}, ["renorm_mean", "renorm_stddev", "moving_stddev"]),
        ({"zero_debias": "mean"}, ["hidden_mean"]),
        ({"zero_debias": "all"}, ["hidden_mean", "hidden_variance"]),
        ({"virtual_batch_size": 4}, []),
    ):
        layer, other = (BatchNorm(BatchNormSpec(3, **options), name="norm") for _ in range(2))
        have = {v.name.removeprefix("norm/").removesuffix(":0") for v in layer.variables}
        assert have == {"gamma", "beta", "moving_mean", "moving_variance", "num_updates", *names}
        assert len(layer.trainable_variables) == 2
        layer(RNG.normal(size=(8, 3)).astype("f4"), training=True)
        path = tf.train.Checkpoint(layer=layer).write(str(tmp_path / "state"))
        tf.train.Checkpoint(layer=other).read(path).assert_consumed()
        for name, variable in layer.state.arrays().items():
            np.testing.assert_array_equal(getattr(other, name), variable)
