"""Synchronized statistics under `tf.distribute`: three replicas against the one batch that they share."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm
from bnlayer.contract import Call, Request

tf = pytest.importorskip("tensorflow")

from bnlayer_tensorflow import BatchNorm, batch_norm  # noqa: E402
from bnlayer_tensorflow.backend import BACKEND  # noqa: E402

REPLICAS = 3
RNG = np.random.default_rng(8)
X = RNG.normal(3.0, 2.0, (8, 2, 4))
DY, DIRECTION = RNG.normal(size=(2, *X.shape))
WEIGHTS = {
    "none": None,
    "mask": np.arange(8) % 3 > 0,
    "nothing on the first replica": np.arange(8) > 1,
    "real": RNG.uniform(0.1, 2.0, 8),
    "real, 0 on the first replica": np.where(np.arange(8) > 1, RNG.uniform(0.1, 2.0, 8), 0.0),
    "real, of far sizes": 10.0 ** np.linspace(-200, 200, 8),
    "real, one for all rows": np.full((1, 2), 0.25),
    "all masked": np.zeros(8, bool),
}
DOUBLE = {"param_dtype": "float64", "stats_dtype": "float64"}
SPEC = BatchNormSpec(4, synchronized=True, moving_variance_estimator="unbiased", **DOUBLE)
STATE = BatchNormState(
    gamma=np.array([0.5, -1.0, 2.0, 1.5]),
    beta=np.array([0.1, 0.2, -0.3, 0.0]),
    moving_mean=np.array([1.0, 2.0, 3.0, 4.0]),
    moving_variance=np.array([0.5, 1.0, 2.0, 4.0]),
    num_updates=5,
)


class Counting(tf.distribute.ReductionToOneDevice):
    """Counts what is reduced across devices, once as it is traced or run."""

    number = 0

    def reduce_implementation(self, *args, **kwargs):
        self.number += 1
        return super().reduce_implementation(*args, **kwargs)


@pytest.fixture(scope="module")
def counting():
    return Counting()


@pytest.fixture(scope="module")
def mirrored(counting):
    assert len(tf.config.list_logical_devices("CPU")) >= REPLICAS, "TensorFlow had started before conftest.py was read"
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)], cross_device_ops=counting)


@pytest.fixture(scope="module")
def collective():
    """As in several workers: replicas that meet in collective operations, and not in a common Python function."""
    return tf.distribute.MultiWorkerMirroredStrategy._from_local_devices([f"CPU:{i}" for i in range(REPLICAS)])


@pytest.fixture(params=["mirrored", "collective"])
def strategy(request):
    return request.getfixturevalue(request.param)


def scattered(strategy, shards, array):
    """An array's rows over the replicas; what has one row is there on each."""
    edges = [0, *itertools.accumulate(shards)]

    def rows(context):
        here = int(context.replica_id_in_sync_group)
        whole = array.shape[0] == 1 and sum(shards) != 1
        return tf.constant(array if whole else array[edges[here] : edges[here + 1]])

    return strategy.experimental_distribute_values_from_function(rows)


def everything(spec, *, known=True):
    """y, the gradients to second order and the state after: a function of x, dy, the direction and the weights."""

    def run(x, dy, direction, w):
        if not known:  # x's own rows, by an index whose length the graph does not know
            rows = tf.where(tf.ones([tf.shape(x)[0]], tf.bool))[:, 0]
            x = tf.gather(x, rows)
        gamma, beta = tf.constant(STATE.gamma), tf.constant(STATE.beta)
        real = [w] if w is not None and w.dtype.is_floating else []
        with tf.GradientTape() as outer:
            outer.watch([x, *real])
            with tf.GradientTape() as tape:
                tape.watch([x, gamma, beta, *real])
                y, after = batch_norm(x, STATE.replace(gamma=gamma, beta=beta), spec, training=True, weights=w)
            dx, dgamma, dbeta, *dw = tape.gradient(y, [x, gamma, beta, *real], output_gradients=dy)
        second = outer.gradient(dx, [x, *real], output_gradients=direction)
        got = {"y": y, "dx": dx, "dw": dw, "hvp": second, "dgamma": dgamma, "dbeta": dbeta}
        return {**got, "state": [after.moving_mean, after.moving_variance, tf.cast(after.num_updates, tf.int64)]}

    return run


def gathered(strategy, results, joined=np.concatenate):
    """What the replicas returned, as the whole batch would have."""
    parts = tf.nest.map_structure(
        lambda each: [np.asarray(p) for p in strategy.experimental_local_results(each)], results
    )
    state = [one for one, *_ in parts["state"]]
    for one, *others in parts["state"]:  # to the bit, or they drift apart
        assert all(np.array_equal(one, other) for other in others)
    return {
        **{name: np.concatenate(parts[name]) for name in ("y", "dx")},
        "dw": [joined(part) for part in parts["dw"]],
        "hvp": [np.concatenate(parts["hvp"][0]), *[joined(part) for part in parts["hvp"][1:]]],
        **{name: np.sum(parts[name], 0) for name in ("dgamma", "dbeta")},
        "state": state,
    }


def same(got, want, tolerance=1e-11):
    for name in want:
        for ours, theirs in zip(tf.nest.flatten(got[name]), tf.nest.flatten(want[name]), strict=True):
            theirs = np.asarray(theirs)
            atol = tolerance * max(1.0, np.abs(theirs).max(initial=0.0))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)


def whole(arrays, w=None):
    """What one layer gives that has the whole batch, and is not synchronized."""
    given = [tf.constant(a) for a in arrays]
    return everything(SPEC.replace(synchronized=False))(*given, None if w is None else tf.constant(w))


def check_one_batch(strategy, shards, w, mode="eager"):
    arrays = [a[: sum(shards)] for a in (X, DY, DIRECTION)]
    want = whole(arrays, w)
    run = everything(SPEC, known=mode != "graph of unknown lengths")
    columns = [None if a is None else scattered(strategy, shards, a) for a in (*arrays, w)]

    def step(*columns):
        return strategy.run(run, columns)

    got = (step if mode == "eager" else tf.function(step))(*columns)
    spread = w is not None and w.shape[0] == 1
    same(gathered(strategy, got, joined=(lambda parts: np.sum(parts, 0)) if spread else np.concatenate), want)
    return want


@pytest.mark.parametrize("weights", WEIGHTS)
def test_replicas_are_one_batch(mirrored, weights):
    want = check_one_batch(mirrored, (2, 6, 0), WEIGHTS[weights])
    assert np.array_equal(want["state"][1], STATE.moving_variance) == (weights == "all masked")


@pytest.mark.parametrize("shards", [(3, 3, 2), (8, 0, 0), (0, 1, 7), (1, 0, 1)])
def test_any_shards(mirrored, shards):
    check_one_batch(mirrored, shards, None)


def test_replicas_in_a_graph_of_unknown_lengths(mirrored):
    w = WEIGHTS["real, 0 on the first replica"]
    check_one_batch(mirrored, (2, 6, 0), w, "graph of unknown lengths")


def test_replicas_that_meet_in_collective_operations(collective):
    check_one_batch(collective, (0, 1, 7), None, "graph")


def test_means_far_apart_and_far_from_zero(mirrored):
    """float32 keeps the digits that one batch in float64 has."""
    spec = BatchNormSpec(4, synchronized=True, decay=0.0)
    x = (RNG.normal(size=(8, 4)) + 1e4 + 50 * np.arange(8)[:, None]).astype("f4")
    column = scattered(mirrored, (2, 6, 0), x)
    state = BatchNormState.initial(spec)
    got = mirrored.run(lambda x: batch_norm(x, state, spec, training=True)[1].moving_variance, (column,))
    np.testing.assert_allclose(got.values[2], x.astype("f8").var(0), rtol=1e-6)


def test_a_constant_channel_has_no_variance(mirrored):
    """Not even a rounding's: with an epsilon of 0 it would come out as 1."""
    spec = SPEC.replace(epsilon=0.0, decay=0.0)
    column = scattered(mirrored, (2, 6, 0), np.full((8, 4), 0.1))
    got = mirrored.run(lambda x: batch_norm(x, STATE, spec, training=True)[1].moving_variance, (column,))
    np.testing.assert_array_equal(got.values[0], np.zeros(4))


def test_one_value_in_all_is_refused_by_all(strategy):
    x, more = X[:1, :1], X[:2, :1]

    def run(x):
        return batch_norm(x, STATE, SPEC, training=True)[0]

    with pytest.raises(InputError, match="more than one value per channel"):
        strategy.run(run, (scattered(strategy, (0, 1, 0), x),))
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than one value per channel"):
        tf.function(lambda column: strategy.run(run, (column,)))(scattered(strategy, (0, 1, 0), x))
    assert strategy.run(run, (scattered(strategy, (0, 1, 1), more),)) is not None  # nobody waits for anybody


def test_a_bad_weight_anywhere_is_refused_by_all(strategy):
    weights = np.ones(8)
    weights[3] = np.nan
    columns = [scattered(strategy, (2, 6, 0), a) for a in (X, weights)]

    def run(x, w):
        return batch_norm(x, STATE, SPEC, training=True, weights=w)[0]

    with pytest.raises(InputError, match="finite and not negative"):
        strategy.run(run, columns)
    with pytest.raises(tf.errors.InvalidArgumentError, match="finite and not negative"):
        tf.function(lambda *columns: strategy.run(run, columns))(*columns)


def test_a_training_loop(strategy):
    """Replicas inside a `tf.function`, with the layer's own variables: the same run as of the big batch."""
    batches = RNG.normal(1.0, 2.0, (3, 8, 4))
    with strategy.scope():
        layer = BatchNorm(SPEC, STATE)
    alone = BatchNorm(SPEC.replace(synchronized=False), STATE)

    def gradients(layer, x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
        return tape.gradient(loss, [layer.gamma, layer.beta])

    def descend(layer, gradients):
        for variable, gradient in zip((layer.gamma, layer.beta), gradients, strict=True):
            variable.assign_sub(1e-3 * gradient)

    @tf.function
    def step(column):
        parts = strategy.run(lambda x: gradients(layer, x), (column,))
        descend(layer, [strategy.reduce("SUM", part, axis=None) for part in parts])

    for batch, shards in zip(batches, [(2, 6, 0), (4, 4, 0), (1, 3, 4)], strict=True):
        step(scattered(strategy, shards, batch))
        descend(alone, gradients(alone, tf.constant(batch)))
    for name in ("gamma", "beta", "moving_mean", "moving_variance", "num_updates"):
        copies = [np.asarray(v) for v in strategy.experimental_local_results(getattr(layer, name))]
        np.testing.assert_allclose(copies[0], getattr(alone, name).numpy(), rtol=1e-12, err_msg=name)
        assert len(copies) == REPLICAS and all(np.array_equal(copies[0], copy) for copy in copies)
    assert int(layer.num_updates.numpy()) == STATE.num_updates + 3


def test_the_layer_outside_of_its_replicas(mirrored, tmp_path):
    """One value: the state as it is read, loaded, saved and restored."""
    with mirrored.scope():
        layer, other = BatchNorm(SPEC, STATE), BatchNorm(SPEC)
    mirrored.run(lambda x: layer(x, training=True), (scattered(mirrored, (2, 6, 0), X),))
    spec, state = BACKEND.extract(layer)
    assert spec == SPEC and state.num_updates == 6
    alone = BatchNorm(SPEC, STATE)
    alone(tf.constant(X), training=True)  # outside of a strategy a synchronized layer is one replica
    np.testing.assert_allclose(state.moving_variance, alone.moving_variance.numpy(), rtol=1e-12)
    path = tf.train.Checkpoint(layer=layer).write(str(tmp_path / "checkpoint"))
    alone.load(STATE)
    tf.train.Checkpoint(layer=alone).read(path).assert_consumed()
    BACKEND.load(other, state)
    for name, array in state.arrays().items():
        np.testing.assert_array_equal(getattr(alone, name).numpy(), array)
        for copy in mirrored.experimental_local_results(getattr(other, name)):
            np.testing.assert_array_equal(copy, array)


def test_replicas_that_are_not_synchronized_have_statistics_of_their_own(mirrored, counting):
    with mirrored.scope():
        layer = BatchNorm(SPEC.replace(synchronized=False, decay=0.0), STATE)
    counting.number = 0
    mirrored.run(lambda x: layer(x, training=True), (scattered(mirrored, (2, 2, 4), X),))
    assert counting.number == 0
    means = [part.mean((0, 1)) for part in (X[:2], X[2:4], X[4:])]
    np.testing.assert_allclose([np.asarray(v) for v in layer.moving_mean.values], means)
    np.testing.assert_allclose(layer.moving_mean.numpy(), np.mean(means, 0))  # as it would be saved
    assert int(layer.num_updates.numpy()) == 6


def test_one_all_reduce_forward_and_one_backward(mirrored, counting):
    spec = SPEC.replace(moving_variance_estimator="biased", renorm=Renorm(r_max=1.5, d_max=0.5))
    with mirrored.scope():
        layer = BatchNorm(spec)
    columns = [scattered(mirrored, (2, 6, 0), a) for a in (X, WEIGHTS["real"])]

    def forward(x, w):
        return layer(x, training=True, weights=w)

    def both(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = forward(x, w)
        return tape.gradient(y, [x, w, layer.gamma])

    for function, number in ((forward, 1), (both, 2)):
        counting.number = 0
        tf.function(lambda *columns, function=function: mirrored.run(function, columns)).get_concrete_function(*columns)
        assert counting.number == number


@pytest.mark.parametrize("mode", ["eval", "frozen"])
def test_no_collective_where_no_batch_is_normalized_together(collective, mode):
    with collective.scope():
        layer = BatchNorm(SPEC)
    layer.frozen_statistics = mode == "frozen"
    column = scattered(collective, (2, 6, 0), X)

    def run(column, training):
        def both(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training)
            return tape.gradient(y, x)

        return collective.run(both, (column,))

    def collectives(training):
        graph = tf.function(run).get_concrete_function(column, training).graph
        return [op.type for op in graph.get_operations() if op.type.startswith("Collective")]

    assert not collectives(mode == "frozen")
    layer.frozen_statistics = False
    reduced = [kind for kind in collectives(True) if kind.startswith("CollectiveReduce")]
    assert len(reduced) == 2 * REPLICAS  # forward and backward on each: the graph would show them


def test_a_step_with_shards_runs_on_the_devices_of_this_process():
    layer = BACKEND.build(SPEC, STATE)
    call = Call(X, dy=DY, direction=DIRECTION, weights=WEIGHTS["real"])
    layer, got = BACKEND.step(layer, Request((call,), training=True, shards=(2, 6, 0)))
    alone, want = BACKEND.step(BACKEND.build(SPEC, STATE), Request((call,), training=True))
    for name in ("y", "dx", "dweights", "hvp"):
        np.testing.assert_allclose(getattr(got.calls[0], name), getattr(want.calls[0], name), rtol=0, atol=1e-11)
    np.testing.assert_allclose(got.dgamma, want.dgamma)
    np.testing.assert_allclose(layer.moving_variance.numpy(), alone.moving_variance.numpy(), rtol=1e-13)
    with pytest.raises(InputError, match="shards must be counts that add up"):
        BACKEND.step(layer, Request((call,), training=True, shards=(2, 2)))


_OTHER_PROCESS = """
    import numpy as np, pytest
    from bnlayer import BatchNormSpec, InputError
    from bnlayer.contract import Call, Request
    from bnlayer_tensorflow import replicas
    from bnlayer_tensorflow.backend import BACKEND

    x = np.random.default_rng(1).normal(size=(8, 3)).astype("f4")
    layer = BACKEND.build(BatchNormSpec(3, synchronized=True, decay=0.0))
    def step(x, *shards):
        return BACKEND.step(layer, Request((Call(x, dy=x),), training=True, shards=shards))[1]

    for shards in ((2, 6, 0), (3, 3, 2)):
        np.testing.assert_allclose(step(x, *shards).state.moving_variance, x.var(0), rtol=1e-5)
    first = replicas._held[0]
    with pytest.raises(InputError, match="more than one value per channel"):
        step(x[:1], 0, 1, 0)
    assert step(x, 8, 0, 0) and replicas._held == [first] and first.alive, "one process serves them all"

    replicas.TIMEOUT = 0.0
    with pytest.raises(replicas.ReplicasError, match="did not answer within 0 s"):
        step(x, 2, 6, 0)
    assert not first.alive
    print("done")
"""


def test_a_step_with_shards_brings_its_own_devices():
    """Where this process has one CPU, as every process has that was not told otherwise."""
    code = textwrap.dedent(_OTHER_PROCESS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]
