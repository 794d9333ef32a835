"""The function against NumPy's backend, which computes the definitions in float64 with an analytic backward."""

from __future__ import annotations

import numpy as np
import pytest

import bnlayer
from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm
from bnlayer.contract import Call, Outcome, Request
from bnlayer.state import array_dtype, array_names

tf = pytest.importorskip("tensorflow")

from bnlayer_tensorflow import batch_norm  # noqa: E402

TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


def random_state(spec, rng):
    arrays = {}
    for name in array_names(spec):
        values = rng.normal(size=spec.num_features)
        positive = name.endswith(("variance", "stddev"))
        arrays[name] = (values**2 + 0.1 if positive else values).astype(array_dtype(spec, name))
    return BatchNormState(**arrays, num_updates=int(rng.integers(0, 5)))


def random_options(rng):
    """Fields of a spec that work together: at most one kind of average, and ghost batches with any of them."""
    fields = {}
    average = rng.choice(["plain", "cumulative", "mean", "all", "renorm", "untracked"])
    if average == "cumulative":
        fields["decay"] = "cumulative"
    elif average in ("mean", "all"):
        fields |= {"decay": float(rng.choice([0.0, 0.5, 0.999])), "zero_debias": str(average)}
    else:
        fields["decay"] = float(rng.choice([0.0, 0.5, 0.9, 1.0]))
    if average == "renorm":
        clips = {"r_max": 1.5, "r_min": 0.5, "d_max": 0.4}
        fields["renorm"] = Renorm(decay=0.8, **{n: c for n, c in clips.items() if rng.random() < 0.7})
    else:
        fields["moving_variance_estimator"] = str(rng.choice(["biased", "unbiased"]))
    if rng.random() < 0.4:
        fields["virtual_batch_size"] = int(rng.integers(1, 5))
        fields["virtual_batch_layout"] = str(rng.choice(["strided", "consecutive"]))
    return {**fields, "track_moving_stats": average != "untracked"}


def random_adjustment(shape, rng):
    return tuple(rng.normal(size=[1 if rng.random() < 0.5 else n for n in shape]).astype("f4") for _ in range(2))


def random_case(seed):
    """A spec, a state and a request of one or two calls, from one seed."""
    rng = np.random.default_rng([20, seed])
    rank = int(rng.integers(2, 6))
    axis = int(rng.integers(1, rank))
    shape = [int(n) for n in rng.integers(1, 5, rank)]
    shape[0] += 2
    dtype = str(rng.choice(["float64", "float32", "float32", "float16", "bfloat16"]))
    options = random_options(rng)
    spec = BatchNormSpec(
        shape[axis],
        axis=axis - (rank if rng.random() < 0.5 else 0),
        epsilon=float(rng.choice([1e-5, 1e-3, 0.1])),
        center=bool(rng.random() < 0.8),
        scale=bool(rng.random() < 0.8),
        single_value="allow",
        param_dtype="float64" if dtype == "float64" else "float32",
        stats_dtype="float64" if dtype == "float64" else "float32",
        **options,
    )
    calls = []
    for _ in range(int(rng.integers(1, 3))):
        x = (rng.normal(size=shape) * rng.uniform(0.5, 3) + rng.normal()).astype(bnlayer.state.numpy_dtype(dtype))
        dy = rng.normal(size=shape).astype(x.dtype)
        full = [1 if i == axis else n for i, n in enumerate(shape)]
        form = rng.choice(["none", "rows", "without", "full"])
        weights_shape = {"none": None, "rows": shape[:1], "without": [n for i, n in enumerate(shape) if i != axis],
                         "full": full}[str(form)]  # fmt: skip
        weights = None
        if weights_shape is not None:
            kind = rng.choice(["bool", "float32", "float64", "int32"])
            weights = (rng.uniform(0, 3, weights_shape) * (rng.random(weights_shape) < 0.7)).astype(str(kind))
        adjusts = spec.virtual_batch_size is None and rng.random() < 0.3
        adjustment = random_adjustment(shape, rng) if adjusts else None
        calls.append(Call(x, dy=dy, weights=weights, adjustment=adjustment))
    request = Request(
        tuple(calls),
        training=bool(rng.random() < 0.85),
        update_stats=bool(rng.random() < 0.8),
        frozen_statistics=spec.track_moving_stats and bool(rng.random() < 0.15),
        renorm_clips={"r_max": 2.0, "d_max": None} if spec.renorm is not None and rng.random() < 0.3 else None,
    )
    return spec, random_state(spec, rng), request


def same(ours: Outcome, theirs: Outcome, tolerance: float) -> None:
    pairs = [("dgamma", ours.dgamma, theirs.dgamma), ("dbeta", ours.dbeta, theirs.dbeta)]
    pairs += [(name, getattr(ours.state, name), array) for name, array in theirs.state.arrays().items()]
    for i, (a, b) in enumerate(zip(ours.calls, theirs.calls, strict=True)):
        pairs += [(f"{name} of call {i}", getattr(a, name), getattr(b, name)) for name in ("y", "dx", "dweights")]
    for name, a, b in pairs:
        assert (a is None) == (b is None), name
        if b is not None:
            assert a.dtype == b.dtype, name
            assert a.shape == b.shape, name
            wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
            scale = np.max(np.abs(wide_b), where=np.isfinite(wide_b), initial=1.0)
            np.testing.assert_allclose(wide_a, wide_b, rtol=tolerance, atol=tolerance * scale, err_msg=name)
    assert ours.state.num_updates == theirs.state.num_updates
    assert ours.state.arrays().keys() == theirs.state.arrays().keys()


def both(spec, state, request):
    outcomes = []
    for name in ("tensorflow", "numpy"):
        backend = bnlayer.backend(name)
        layer, outcome = backend.step(backend.build(spec, state), request)
        outcomes.append(outcome)
        assert backend.extract(layer)[0] == spec
    return outcomes


@pytest.mark.parametrize("seed", range(120))
def test_agrees_with_numpy_on_a_random_case(seed):
    spec, state, request = random_case(seed)
    same(*both(spec, state, request), TOLERANCE[request.calls[0].x.dtype.name])


def test_what_lies_under_a_mask_stays_there():
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(2, 4, 5, 3))
    x[1, 2], x[3, 4], x[0, 0] = np.nan, np.inf, -np.inf
    mask = np.isfinite(x).all(-1)
    weights = mask * rng.uniform(0.5, 2, mask.shape)
    dy[~mask] = 0
    for given in (mask, weights):
        for training in (True, False):
            request = Request((Call(x, dy=dy, weights=given),), training=training)
            ours, theirs = both(BatchNormSpec(3), None, request)
            same(ours, theirs, 1e-6)
            assert not np.isfinite(ours.calls[0].y[~mask]).any()
            for gradient in (ours.calls[0].dx, ours.dgamma, ours.dbeta):
                assert gradient is not None
                assert np.isfinite(gradient).all()


@pytest.mark.parametrize("single_value", ["raise", "allow"])
def test_a_mask_that_leaves_one_value_is_allowed(single_value):
    rng = np.random.default_rng(4)
    x, dy = rng.normal(size=(2, 6, 3)).astype("f4")
    mask = np.arange(6) == 2
    spec = BatchNormSpec(3, single_value=single_value, moving_variance_estimator="unbiased", decay=0.5)
    ours, theirs = both(spec, None, Request((Call(x, dy=dy, weights=mask),), training=True))
    same(ours, theirs, 1e-5)
    np.testing.assert_array_equal(ours.state.moving_variance, np.full(3, 0.5, "f4"))


@pytest.mark.parametrize("scale", [1e-30, 1e300])
def test_the_size_of_the_weights_does_not_matter(scale):
    rng = np.random.default_rng(5)
    x, weights = rng.normal(size=(6, 3)).astype("f4"), rng.uniform(0.1, 1, 6)
    spec = BatchNormSpec(3, moving_variance_estimator="unbiased")
    y, after = batch_norm(x, BatchNormState.initial(spec), spec, training=True, weights=weights * scale)
    want, wanted = batch_norm(x, BatchNormState.initial(spec), spec, training=True, weights=weights)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    np.testing.assert_allclose(after.moving_variance, wanted.moving_variance, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_float32_statistics_far_from_zero_stay_accurate(offset):
    rng = np.random.default_rng(6)
    x = (rng.normal(size=(4096, 4)) + offset).astype("f4")
    spec = BatchNormSpec(4, decay=0.0)
    y, after = batch_norm(x, BatchNormState.initial(spec), spec, training=True)
    exact = x.astype("f8")
    want = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + spec.epsilon)
    np.testing.assert_allclose(y, want, atol=3e-6, rtol=3e-6)
    bound = (8 + len(x) ** 0.5) * 2.0**-24
    np.testing.assert_allclose(after.moving_variance, exact.var(0), rtol=bound)
    np.testing.assert_allclose(after.moving_mean, exact.mean(0), rtol=2.0**-23, atol=bound)


def test_a_constant_channel_has_no_variance():
    x = np.full((7, 3), 12345.678, "f4")
    spec = BatchNormSpec(3, decay=0.0)
    y, after = batch_norm(x, BatchNormState.initial(spec), spec, training=True)
    np.testing.assert_array_equal(y, np.zeros((7, 3), "f4"))
    np.testing.assert_array_equal(after.moving_variance, np.zeros(3, "f4"))


def test_half_inputs_accumulate_in_float32():
    rng = np.random.default_rng(7)
    x = (rng.normal(size=(512, 4)) * 3000).astype("f2")  # squares and the variance are beyond float16
    spec = BatchNormSpec(4, decay=0.0)
    y, after = batch_norm(x, BatchNormState.initial(spec), spec, training=True)
    assert y.dtype == tf.float16
    np.testing.assert_allclose(after.moving_variance, x.astype("f8").var(0), rtol=1e-5)


@pytest.mark.parametrize("nonfinite", ["propagate", "keep"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_channel_that_is_not_finite(nonfinite, bad):
    rng = np.random.default_rng(8)
    x, dy = rng.normal(size=(2, 5, 3))
    x[2, 1] = bad
    ours, theirs = both(BatchNormSpec(3, nonfinite=nonfinite), None, Request((Call(x, dy=dy),), training=True))
    same(ours, theirs, 1e-6)
    assert np.isfinite(ours.state.moving_variance[1]) == (nonfinite == "keep")


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_changes_nothing(training):
    spec = BatchNormSpec(3)
    x = np.zeros((0, 4, 3), "f4")
    ours, theirs = both(spec, None, Request((Call(x, dy=x, weights=np.zeros((0, 4), "f4")),), training=training))
    same(ours, theirs, 0.0)
    np.testing.assert_array_equal(ours.dgamma, np.zeros(3, "f4"))


def test_all_zero_weights_change_nothing():
    rng = np.random.default_rng(9)
    x, dy = rng.normal(size=(2, 5, 3))
    for tracks in (True, False):
        spec = BatchNormSpec(3, track_moving_stats=tracks)
        state = random_state(spec, rng)
        ours, theirs = both(spec, state, Request((Call(x, dy=dy, weights=np.zeros(5)),), training=True))
        same(ours, theirs, 1e-6)
        np.testing.assert_array_equal(ours.calls[0].dweights, np.zeros(5))


def numeric_gradient(function, at, step=1e-5):
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        moved = at.copy()
        moved[i] += step
        up = function(moved)
        moved[i] -= 2 * step
        gradient[i] = (up - function(moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_second_order(training, masked):
    """The gradient of <dloss/dx, u>, against differences of the first gradient, in float64."""
    rng = np.random.default_rng(11)
    x, dy, u = rng.normal(size=(3, 4, 2, 3))
    spec = BatchNormSpec(3, param_dtype="float64", stats_dtype="float64", epsilon=1e-3)
    state = random_state(spec, rng)
    weights = np.array([1.0, 0.0, 2.5, 0.5])
    if masked:
        x[1, 0, 0] = np.nan
        dy[1] = 0
        u[1] = 0
    given = weights if masked else None

    def first(values, w, gamma):
        with tf.GradientTape() as tape:
            tape.watch(values)
            y, _ = batch_norm(values, state.replace(gamma=gamma), spec, training=training, weights=w)
            loss = tf.reduce_sum(tf.where(dy == 0, tf.zeros_like(y), y) * dy)
        return tf.reduce_sum(tape.gradient(loss, values) * u)

    sources = [tf.constant(x), None if given is None else tf.constant(given), tf.constant(state.gamma)]
    with tf.GradientTape() as tape:
        tape.watch([s for s in sources if s is not None])
        product = first(*sources)
    got = tape.gradient(product, [s for s in sources if s is not None], unconnected_gradients="zero")
    present = [i for i, s in enumerate(sources) if s is not None]
    for which, ours in zip(present, got, strict=True):

        def at(moved, which=which):
            return float(first(*[tf.constant(moved) if i == which else s for i, s in enumerate(sources)]))

        start = sources[which].numpy()
        if which == 1:
            # One-sided at the boundary w = 0 would be needed; the interior weights say the same.
            inside = start > 0
            want = numeric_gradient(lambda moved, at=at: at(np.where(weights > 0, moved, 0.0)), start)
            np.testing.assert_allclose(ours.numpy()[inside], want[inside], atol=2e-7, rtol=1e-6)
        else:
            want = numeric_gradient(at, start)
            keep = np.isfinite(start)
            np.testing.assert_allclose(ours.numpy()[keep], want[keep], atol=2e-7, rtol=1e-6)


def test_the_state_carries_no_gradient():
    spec = BatchNormSpec(3)
    x = tf.random.stateless_normal((4, 3), [1, 2])
    with tf.GradientTape() as tape:
        tape.watch(x)
        _, after = batch_norm(x, BatchNormState.initial(spec), spec, training=True)
    assert tape.gradient([after.moving_mean, after.moving_variance], x) is None


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_refuses_weights_by_value(bad):
    spec = BatchNormSpec(3)
    with pytest.raises(InputError, match="finite and not negative"):
        batch_norm(
            np.ones((4, 3), "f4"), BatchNormState.initial(spec), spec, training=True, weights=[1.0, bad, 1.0, 1.0]
        )


def test_refuses_inputs_that_do_not_fit():
    spec = BatchNormSpec(3)
    state = BatchNormState.initial(spec)
    for x in (np.ones((4, 2), "f4"), np.ones(3, "f4"), np.ones((4, 3), "i4"), np.ones((1, 3), "f4")):
        with pytest.raises(InputError):
            batch_norm(x, state, spec, training=True)
    with pytest.raises(InputError, match="real or boolean"):
        batch_norm(np.ones((4, 3), "f4"), state, spec, training=True, weights=np.ones(4, "c8"))


def test_a_square_that_overflows_under_a_mask():
    rng = np.random.default_rng(12)
    x, dy = rng.normal(size=(2, 6, 3)).astype("f4")
    mask = np.arange(6) != 4
    x[4], dy[4] = 1e30, 0
    ours, theirs = both(BatchNormSpec(3), None, Request((Call(x, dy=dy, weights=mask),), training=True))
    same(ours, theirs, 1e-5)
