"""The drop-ins at work in graphs and sessions: training, checkpoints, flags, and what they do unlike the originals."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnlayer_numpy
from bnlayer import BatchNormSpec, BatchNormState, InputError, SpecError, UnsupportedError
from bnlayer.spec import Renorm

tf = pytest.importorskip("tensorflow")

import bnlayer_tensorflow  # noqa: E402
from bnlayer_tensorflow.v1 import batch_norm, batch_normalization  # noqa: E402

v1 = tf.compat.v1
KEYS = v1.GraphKeys
RNG = np.random.default_rng(17)
X = RNG.normal([1, -2, 0], [1, 3, 0.5], (8, 3)).astype("f4")
IMAGES = RNG.normal([1, -2, 0], [1, 3, 0.5], (6, 2, 2, 3)).astype("f4")


@pytest.fixture
def session():
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        yield session


def start(session):
    session.run(v1.global_variables_initializer())


def kept(session, *names):
    """Variables by the last part of their names."""
    by_name = {v.op.name.split("/")[-1]: v for v in v1.global_variables()}
    return [session.run(by_name[name]) for name in names]


# What is called how


def test_the_signatures_are_the_originals():
    contrib = (
        "inputs decay=0.999 center=True scale=False epsilon=0.001 activation_fn=None param_initializers=None"
        " param_regularizers=None updates_collections='update_ops' is_training=True reuse=None"
        " variables_collections=None outputs_collections=None trainable=True batch_weights=None fused=None"
        " data_format='NHWC' zero_debias_moving_mean=False scope=None renorm=False renorm_clipping=None"
        " renorm_decay=0.99 adjustment=None"
    )
    layers = (
        "inputs axis=-1 momentum=0.99 epsilon=0.001 center=True scale=True beta_initializer='zeros'"
        " gamma_initializer='ones' moving_mean_initializer='zeros' moving_variance_initializer='ones'"
        " beta_regularizer=None gamma_regularizer=None beta_constraint=None gamma_constraint=None training=False"
        " trainable=True name=None reuse=None renorm=False renorm_clipping=None renorm_momentum=0.99 fused=None"
        " virtual_batch_size=None adjustment=None"
    )
    for function, want in ((batch_norm, contrib), (batch_normalization, layers)):
        given = [
            p.name if p.default is p.empty else f"{p.name}={p.default!r}"
            for p in inspect.signature(function).parameters.values()
        ]
        assert " ".join(given) == want


def test_the_package_has_it_as_an_attribute():
    assert bnlayer_tensorflow.v1.batch_norm is batch_norm
    assert "v1" in dir(bnlayer_tensorflow)


@pytest.mark.parametrize("function", [batch_norm, batch_normalization])
def test_eager_code_is_sent_to_the_keras_layer(function):
    with pytest.raises(UnsupportedError, match=r"bnlayer_keras\.BatchNormalization"):
        function(tf.constant(X))
    with pytest.raises(UnsupportedError, match=r"bnlayer_keras\.BatchNormalization"):
        tf.function(lambda x: function(x), autograph=False)(tf.constant(X))


# Train, save, restore, evaluate


def classifier(x, labels, training, layer):
    h = tf.nn.relu(layer(tf.matmul(x, v1.get_variable("w1", [3, 8])), training))
    logits = tf.matmul(h, v1.get_variable("w2", [8, 2]))
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    return loss, logits


LAYERS = {
    "contrib": lambda h, t: batch_norm(h, decay=0.5, scale=True, is_training=t),
    "contrib in place": lambda h, t: batch_norm(h, decay=0.5, is_training=t, updates_collections=None),
    "contrib zero debias": lambda h, t: batch_norm(h, decay=0.5, is_training=t, zero_debias_moving_mean=True),
    "contrib renorm": lambda h, t: batch_norm(h, decay=0.5, is_training=t, renorm=True, renorm_decay=0.5),
    "layers": lambda h, t: batch_normalization(h, momentum=0.5, training=t),
    "layers renorm": lambda h, t: batch_normalization(h, momentum=0.5, training=t, renorm=True, renorm_momentum=0.5),
    "layers virtual": lambda h, t: batch_normalization(h, momentum=0.5, training=t, virtual_batch_size=8),
}


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_train_save_restore_evaluate(name, fed, tmp_path):
    rng = np.random.default_rng(5)
    x = rng.normal(4, 3, (64, 3)).astype("f4")
    labels = (x[:, 0] > x[:, 1]).astype("i4")
    where = str(tmp_path / "model.ckpt")

    def build(training):
        v1.set_random_seed(7)
        inputs, wanted = v1.placeholder(tf.float32, [None, 3]), v1.placeholder(tf.int32, [None])
        flag = v1.placeholder(tf.bool, []) if fed else training
        return inputs, wanted, flag, *classifier(inputs, wanted, flag, LAYERS[name])

    def feed(inputs, wanted, flag, training, rows=slice(None)):
        return {inputs: x[rows], wanted: labels[rows], **({flag: training} if fed else {})}

    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        inputs, wanted, flag, loss, _ = build(True)
        with tf.control_dependencies(v1.get_collection(KEYS.UPDATE_OPS)):
            train_op = v1.train.AdamOptimizer(0.05).minimize(loss)
        bnlayer_tensorflow.v1.check_update_ops([train_op, loss])
        start(session)
        losses = []
        for _ in range(60):
            rows = rng.permutation(64)[:32]
            losses.append(session.run([loss, train_op], feed(inputs, wanted, flag, True, rows))[0])
        assert losses[-1] < 0.5 * losses[0]
        saver = v1.train.Saver()
        bnlayer_tensorflow.v1.check_saver(saver)
        bnlayer_tensorflow.v1.check_statistics(session)
        saver.save(session, where)
        trained = {v.op.name: session.run(v) for v in v1.global_variables()}
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        inputs, wanted, flag, loss, logits = build(False)
        v1.train.Saver().restore(session, where)
        bnlayer_tensorflow.v1.check_eval(logits, feed_dict={flag: False} if fed else None)
        whole = session.run(logits, feed(inputs, wanted, flag, False))
        assert (whole.argmax(1) == labels).mean() > 0.9
        one = session.run(logits, feed(inputs, wanted, flag, False, slice(3, 4)))
        np.testing.assert_allclose(one, whole[3:4], rtol=1e-4, atol=1e-5)  # eval does not depend on the batch
        for variable in v1.global_variables():
            np.testing.assert_array_equal(session.run(variable), trained[variable.op.name])


OLD_STYLE = {
    "contrib": (
        "conv1/BatchNorm/",
        lambda x: normalizer("conv1", x, batch_norm, {"is_training": False, "scale": True}),
        {"gamma": "gamma", "beta": "beta"},
        [],
    ),
    "contrib without gamma": ("BatchNorm/", lambda x: batch_norm(x, is_training=False), {"beta": "beta"}, []),
    "contrib zero debias": (
        "a/BatchNorm/",
        lambda x: inside("a", lambda: batch_norm(x, is_training=v1.placeholder_with_default(False, []),
                                                 zero_debias_moving_mean=True)),
        {"beta": "beta"},
        ["a/BatchNorm/moving_mean/biased", "a/BatchNorm/moving_mean/local_step"],
    ),
    "layers": (
        "batch_normalization_1/",
        lambda x: [batch_normalization(x) for _ in range(2)][1],
        {"gamma": "gamma", "beta": "beta"},
        [],
    ),
    "layers renorm": (
        "net/batch_normalization/",
        lambda x: inside("net", lambda: batch_normalization(x, renorm=True)),
        {"gamma": "gamma", "beta": "beta"},
        ["moving_stddev", "renorm_mean", "renorm_stddev"],
    ),
}  # fmt: skip


def inside(scope, build):
    with v1.variable_scope(scope):
        return build()


def normalizer(scope, x, normalizer_fn, normalizer_params):
    """What contrib's layers do with these two arguments."""
    with v1.variable_scope(scope):
        return normalizer_fn(tf.matmul(x, v1.get_variable("weights", initializer=tf.eye(3))), **normalizer_params)


@pytest.mark.parametrize("name", OLD_STYLE)
def test_an_old_checkpoint_restores(name, tmp_path):
    """Written by plain variables of those names, and read by the Saver of a graph built with the drop-ins."""
    prefix, build, parameters, more = OLD_STYLE[name]
    rng = np.random.default_rng(11)
    arrays = {n: rng.normal(size=3).astype("f4") for n in (*parameters, "moving_mean", *more)}
    arrays["moving_variance"] = rng.uniform(0.5, 2, 3).astype("f4")
    arrays = {n: np.float32(12) if n.endswith("local_step") else array for n, array in arrays.items()}
    where = str(tmp_path / "old.ckpt")
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        for n, array in arrays.items():
            v1.get_variable(prefix + n, initializer=array)
        for n in ("gamma", "beta", "moving_mean", "moving_variance"):
            v1.get_variable(f"batch_normalization/{n}", initializer=np.zeros(3, "f4"))
        v1.get_variable("conv1/weights", initializer=np.eye(3, dtype="f4"))
        start(session)
        v1.train.Saver().save(session, where)
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        y = build(tf.constant(X))
        v1.train.Saver().restore(session, where)
        want = (X - arrays["moving_mean"]) / np.sqrt(arrays["moving_variance"] + 1e-3)
        want = want * arrays.get("gamma", 1) + arrays["beta"]
        np.testing.assert_allclose(session.run(y), want, rtol=1e-5, atol=1e-5)


# The flag


@pytest.mark.parametrize("flag", [1, np.True_, True])
@pytest.mark.parametrize("function", [batch_norm, batch_normalization])
def test_a_flag_that_is_known(function, flag, session):
    name = "is_training" if function is batch_norm else "training"
    y = function(tf.constant(X), **{name: flag})
    start(session)
    np.testing.assert_allclose(session.run(y).mean(0), 0, atol=1e-6)
    assert len(v1.get_collection(KEYS.UPDATE_OPS)) == 2


def test_a_constant_tensor_is_a_known_flag(session):
    batch_norm(tf.constant(X), is_training=tf.constant(False))
    assert v1.get_collection(KEYS.UPDATE_OPS) == []


@pytest.mark.parametrize(
    "flag", [lambda: v1.placeholder_with_default(True, []), lambda: v1.placeholder_with_default(1, []),
             lambda: v1.get_variable("flag", initializer=True, trainable=False),
             lambda: tf.equal(v1.placeholder_with_default("train", []), "train")]
)  # fmt: skip
@pytest.mark.parametrize("in_place", [False, True])
def test_a_flag_that_the_graph_computes(flag, in_place, session):
    more = {"updates_collections": None} if in_place else {}
    y = batch_norm(tf.constant(X), decay=0.0, is_training=flag(), **more)
    start(session)
    session.run([y, v1.get_collection(KEYS.UPDATE_OPS)])
    np.testing.assert_allclose(kept(session, "moving_mean")[0], X.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flag", [None, "train", 2, 0.5, [True], np.array([True, False])])
def test_what_is_no_flag_is_refused(flag, session):
    with pytest.raises(InputError, match="is_training must be"):
        batch_norm(tf.constant(X), is_training=flag)
    with pytest.raises(InputError, match="training must be"):
        batch_normalization(tf.constant(X), training=flag)


def test_eval_moves_nothing_though_the_updates_are_fetched(session):
    flag = v1.placeholder(tf.bool, [])
    y = batch_norm(tf.constant(X), is_training=flag, zero_debias_moving_mean=True)
    start(session)
    before = session.run(v1.global_variables())
    session.run([y, v1.get_collection(KEYS.UPDATE_OPS)], {flag: False})
    for old, new in zip(before, session.run(v1.global_variables()), strict=True):
        np.testing.assert_array_equal(old, new)


# Statistics


def ancestors(op):
    found, waiting = set(), [op]
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += [*(tensor.op for tensor in op.inputs), *op.control_inputs]
    return found


def on(name, types, ops):
    """The operations of these types on the variable of this name."""
    return [op for op in ops if op.type in types and op.inputs[0].op.name.endswith(name)]


def test_a_layer_used_twice_moves_by_both_batches_in_one_run(session):
    for x in (X, X + 10):
        batch_normalization(tf.constant(x), momentum=0.9, training=True, name="shared", reuse=v1.AUTO_REUSE)
    # The order that loses an update to anything but a subtraction: both read before either writes.
    writes = on("moving_mean", ("AssignSubVariableOp", "AssignVariableOp"), session.graph.get_operations())[-2:]
    reads = [read for write in writes for read in on("moving_mean", ("ReadVariableOp",), ancestors(write))]
    assert len(reads) == 2
    for write in writes:
        write._add_control_inputs(reads)
    start(session)
    session.run(v1.get_collection(KEYS.UPDATE_OPS))
    np.testing.assert_allclose(kept(session, "moving_mean")[0], 0.1 * (X.mean(0) + X.mean(0) + 10), rtol=1e-5)


@pytest.mark.parametrize("fed", [False, True])
def test_renorm_normalizes_with_the_averages_before_the_update(fed, session):
    """In one run too: what y reads is read before it is written."""
    flag = v1.placeholder(tf.bool, []) if fed else True
    y = batch_norm(tf.constant(X), renorm=True, is_training=flag)
    for update in v1.get_collection(KEYS.UPDATE_OPS):
        assert y.op in ancestors(update.op) or {t.op for t in y.op.inputs} & ancestors(update.op)


def test_a_reused_variable_is_collected_once(session):
    for _ in range(2):
        batch_norm(tf.constant(X), scope="a", reuse=v1.AUTO_REUSE, variables_collections=["kept"])
    assert [v.op.name for v in v1.get_collection("kept")] == ["a/beta", "a/moving_mean", "a/moving_variance"]


def test_zero_debias_of_a_layer_used_twice_counts_both(session):
    for x in (X, X):
        batch_norm(tf.constant(x), decay=0.9, scope="s", reuse=v1.AUTO_REUSE, zero_debias_moving_mean=True)
    start(session)
    session.run(v1.get_collection(KEYS.UPDATE_OPS))
    assert kept(session, "local_step")[0] == 2


@pytest.mark.parametrize("more", [{}, {"zero_debias_moving_mean": True}, {"renorm": True}, {"fused": False}])
@pytest.mark.parametrize("fed", [False, True])
def test_an_empty_batch_moves_nothing(more, fed, session):
    x = v1.placeholder(tf.float32, [None, 3])
    y = batch_norm(x, is_training=v1.placeholder_with_default(True, []) if fed else True, **more)
    start(session)
    session.run(v1.get_collection(KEYS.UPDATE_OPS), {x: X})
    before = session.run(v1.global_variables())
    got, _ = session.run([y, v1.get_collection(KEYS.UPDATE_OPS)], {x: X[:0]})
    assert got.shape == (0, 3)
    for old, new in zip(before, session.run(v1.global_variables()), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_empty_batch_of_known_shape(session):
    y = batch_normalization(tf.constant(X[:0]), training=True)
    start(session)
    session.run([y, v1.get_collection(KEYS.UPDATE_OPS)])
    np.testing.assert_array_equal(kept(session, "moving_variance")[0], np.ones(3))


def test_zero_debias_keeps_its_digits_at_a_large_decay(session):
    decay = 1 - 2.0**-20
    batch_norm(tf.constant(X), decay=decay, zero_debias_moving_mean=True)
    start(session)
    session.run(v1.get_collection(KEYS.UPDATE_OPS))
    np.testing.assert_allclose(kept(session, "moving_mean")[0], X.mean(0, dtype="f8"), rtol=1e-6)


def test_a_decay_schedule(session):
    decay = v1.placeholder(tf.float32, [])
    batch_normalization(tf.constant(X), momentum=decay, training=True)
    start(session)
    want = 0.0
    for d in (0.9, 0.5, 0.0):
        session.run(v1.get_collection(KEYS.UPDATE_OPS), {decay: d})
        want = d * want + (1 - d) * X.mean(0)
        np.testing.assert_allclose(kept(session, "moving_mean")[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fed", [False, True])
def test_bad_batch_weights_stop_the_run(fed, session):
    w = v1.placeholder(tf.float32, [None])
    y = batch_norm(tf.constant(X), batch_weights=w, is_training=v1.placeholder_with_default(True, []) if fed else True)
    start(session)
    session.run(y, {w: np.ones(8)})
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(tf.errors.InvalidArgumentError, match="finite and not negative"):
            session.run(y, {w: np.array([1, 1, bad, 1, 1, 1, 1, 1])})


def test_batch_weights_have_a_gradient(session):
    w = tf.constant(RNG.uniform(0.5, 2, 8).astype("f4"))
    x = tf.constant(X)
    y = batch_norm(x, batch_weights=w)
    start(session)
    dy = RNG.normal(size=X.shape).astype("f4")
    got = session.run(tf.gradients(y, [x, w], dy))
    spec = BatchNormSpec(3, epsilon=1e-3, scale=False)
    *_, cache = bnlayer_numpy.batch_norm_forward(
        X, BatchNormState.initial(spec), spec, training=True, weights=session.run(w)
    )
    want = bnlayer_numpy.batch_norm_backward(dy, cache)
    np.testing.assert_allclose(got[0], want.dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], want.dweights, rtol=1e-4, atol=1e-5)


# Virtual batches


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("renorm", [False, True])
def test_virtual_batches(rows, fed, renorm, session):
    """Also where the originals fail or do not split: rows that do not divide, a fed flag, an unknown length."""
    x = v1.placeholder(tf.float32, [None, 2, 2, 3])
    flag = v1.placeholder(tf.bool, []) if fed else True
    y = batch_normalization(
        x,
        momentum=0.5,
        training=flag,
        virtual_batch_size=4,
        renorm=renorm,
        renorm_momentum=0.5,
        renorm_clipping={"rmax": 1.5},
    )
    start(session)
    spec = BatchNormSpec(
        3, epsilon=1e-3, decay=0.5, virtual_batch_size=4, renorm=Renorm(r_max=1.5, decay=0.5) if renorm else None
    )
    state = BatchNormState.initial(spec)
    if renorm:  # TensorFlow starts them at sqrt(1), without epsilon
        state = state.replace(moving_stddev=np.ones(3, "f4"), renorm_stddev=np.ones(3, "f4"))
    for step in range(2):
        data = (np.concatenate([IMAGES, IMAGES[:2]]) * (step + 1))[:rows]
        want, state, *_ = bnlayer_numpy.batch_norm(data, state, spec, training=True)
        feed = {x: data, **({flag: True} if fed else {})}
        np.testing.assert_allclose(session.run(y, feed), want, rtol=1e-4, atol=1e-5)
        session.run(v1.get_collection(KEYS.UPDATE_OPS), feed)
        mean, variance = kept(session, "moving_mean", "moving_variance")
        assert mean.shape == (1, 1, 1, 1, 3)
        np.testing.assert_allclose(mean.ravel(), state.moving_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance.ravel(), state.moving_variance, rtol=1e-5)


# What the originals dropped without a word


@pytest.mark.parametrize("more", [{"batch_weights": np.ones(8, "f4")}, {"fused": False, "updates_collections": None}])
def test_regularizers_and_adjustment_work_beside_weights_and_in_place_updates(more, session):
    scale, bias = np.float32([0.5, 1, 2]), np.float32([0, 1, -1])
    arguments = {"scale": True, "param_regularizers": {"beta": tf.nn.l2_loss, "gamma": tf.nn.l2_loss}, **more}
    plain = batch_norm(tf.constant(X), scope="plain", **arguments)
    adjusted = batch_norm(tf.constant(X), scope="adjusted", adjustment=lambda shape: (scale, bias), **arguments)
    start(session)
    assert len(v1.get_collection(KEYS.REGULARIZATION_LOSSES)) == 4
    assert session.run(v1.losses.get_regularization_loss()) == 2 * 1.5
    got, want = session.run([adjusted, plain])
    np.testing.assert_allclose(got, want * scale + bias, rtol=1e-5, atol=1e-5)


def test_constraints_hold_after_the_optimizer(session):
    y = batch_normalization(
        tf.constant(X), training=True,
        gamma_constraint=lambda w: tf.clip_by_value(w, 0.9, 1.1), beta_constraint=lambda w: tf.maximum(w, 0.25),
    )  # fmt: skip
    step = v1.train.GradientDescentOptimizer(1.0).minimize(tf.reduce_sum(y * X))
    start(session)
    session.run(step)
    gamma, beta = kept(session, "gamma", "beta")
    assert gamma.min() >= np.float32(0.9) and gamma.max() <= np.float32(1.1)
    assert gamma.max() == np.float32(1.1) or gamma.min() == np.float32(0.9)
    assert beta.min() == np.float32(0.25)


def test_renorm_clips_can_be_fed(session):
    rmax = v1.placeholder(tf.float32, [])
    y = batch_normalization(tf.constant(X), training=True, renorm=True, renorm_clipping={"rmax": rmax, "dmax": 0.0})
    start(session)
    tight, wide = session.run(y, {rmax: 0.5}), session.run(y, {rmax: 1e9})
    xhat = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-3)
    r = np.sqrt(X.var(0) + 1e-3)
    np.testing.assert_allclose(tight, xhat * np.minimum(r, 0.5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(wide, xhat * r, rtol=1e-4, atol=1e-5)


def test_an_adjustment_is_for_training_only_and_gets_the_dynamic_shape(session):
    seen = []

    def adjustment(shape):
        seen.append(shape)
        return tf.fill(shape[-1:], 2.0), tf.zeros(shape[-1:])

    x, flag = v1.placeholder(tf.float32, [None, 3]), v1.placeholder(tf.bool, [])
    y = batch_norm(x, is_training=flag, adjustment=adjustment)
    batch_norm(x, is_training=False, adjustment=adjustment)
    start(session)
    assert len(seen) == 1
    assert session.run(seen[0], {x: X}).tolist() == [8, 3]
    xhat = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-3)
    np.testing.assert_allclose(session.run(y, {x: X, flag: True}), 2 * xhat, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(session.run(y, {x: X, flag: False}), X / np.sqrt(1.001), rtol=1e-5)


def test_the_second_derivative_goes_through_a_fed_flag(session):
    x, flag = v1.placeholder(tf.float64, [None, 3]), v1.placeholder(tf.bool, [])
    c = RNG.normal(size=X.shape)

    def hvp(training):
        y = batch_normalization(x, training=training, name="bn", reuse=v1.AUTO_REUSE)
        return tf.gradients(tf.reduce_sum(tf.gradients(tf.reduce_sum(y**3), x)[0] * c), x)[0]

    fed, known = hvp(flag), hvp(True)
    start(session)
    got, want = session.run([fed, known], {x: X, flag: True})
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(want.sum(0), 0, atol=1e-6)  # y does not change when x is shifted


# Refusals


BAD = {
    "several axes": (batch_normalization, {"axis": [1, 2]}, InputError, r"one axis; got \[1, 2\].*Several"),
    "no axis": (batch_normalization, {"axis": []}, InputError, "axis must be one axis"),
    "batch axis": (batch_normalization, {"axis": 0}, InputError, "axis 0"),
    "no such axis": (batch_normalization, {"axis": 4}, InputError, "axis 4"),
    "axis that is no integer": (batch_normalization, {"axis": 1.0}, InputError, "axis must be an integer"),
    "momentum beyond 1": (batch_normalization, {"momentum": 1.5}, InputError, r"momentum must be a number in \[0, 1\]"),
    "decay below 0": (batch_norm, {"decay": -0.1}, InputError, "decay must be"),
    "decay that is text": (batch_norm, {"decay": "fast"}, InputError, "decay must be"),
    "renorm_decay": (batch_norm, {"renorm": True, "renorm_decay": 2}, InputError, "renorm_decay must be"),
    "epsilon": (batch_norm, {"epsilon": -1.0}, SpecError, "epsilon"),
    "data_format": (batch_norm, {"data_format": "NDHWC"}, InputError, "data_format must be 'NHWC' or 'NCHW'"),
    "clip": (batch_norm, {"renorm": True, "renorm_clipping": {"r_max": 3}}, InputError, "has no 'r_max'"),
    "crossed clips": (batch_norm, {"renorm": True, "renorm_clipping": {"rmax": 1, "rmin": 2}}, InputError, "r_min"),
    "initializer": (batch_norm, {"param_initializers": {"mean": 0}}, InputError, "param_initializers has no 'mean'"),
    "regularizer": (batch_norm, {"param_regularizers": {"moving_mean": 0}}, InputError, "param_regularizers has no"),
    "initializer's name": (batch_normalization, {"beta_initializer": "nil"}, InputError, "beta_initializer.*'nil'"),
    "weights' shape": (batch_norm, {"batch_weights": np.ones((6, 1), "f4")}, InputError, "must have shape"),
    "renorm, weights": (batch_norm, {"renorm": True, "batch_weights": np.ones(6)}, UnsupportedError, "batch_weights"),
    "renorm, in place": (batch_norm, {"renorm": True, "updates_collections": None}, UnsupportedError, "UPDATE_OPS"),
    "renorm, debias": (batch_norm, {"renorm": True, "zero_debias_moving_mean": True}, UnsupportedError, "zero_debias"),
    "zero debias, decay 1": (batch_norm, {"zero_debias_moving_mean": True, "decay": 1}, InputError, "decay=1"),
    "virtual batches": (batch_normalization, {"virtual_batch_size": 0}, SpecError, "virtual_batch_size"),
    "virtual batches, adjusted": (batch_normalization, {"virtual_batch_size": 2, "adjustment": lambda s: (1.0, 0.0)},
                                  InputError, "adjustment and virtual_batch_size"),
    "adjustment": (batch_norm, {"adjustment": lambda s: tf.ones(s)}, InputError, "pair"),
    "adjustment's shape": (batch_norm, {"adjustment": lambda s: (tf.ones(5), 0.0)}, InputError, "adjustment's scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refusals(name, session):
    function, arguments, error, match = BAD[name]
    flag = {"is_training": True} if function is batch_norm else {"training": True}
    with pytest.raises(error, match=match):
        function(tf.constant(IMAGES), **flag, **arguments)


@pytest.mark.parametrize("function", [batch_norm, batch_normalization])
def test_inputs_that_cannot_be_normalized(function, session):
    for x, match in (
        (v1.placeholder(tf.float32), "known rank"),
        (v1.placeholder(tf.float32, [None, None]), "known number of channels"),
        (tf.ones([3]), "batch axis 0"),
        (tf.ones([4, 3], tf.int32), "int32"),
    ):
        with pytest.raises(InputError, match=match):
            function(x)


# Variables that are references, and the control flow of TensorFlow 1


OLD_BEHAVIOR = """
import json, sys
import tensorflow as tf
tf.compat.v1.disable_v2_behavior()
sys.path.insert(0, sys.argv[1])
import cases
from bnlayer_tensorflow import v1
ours = {"batch_norm": v1.batch_norm, "batch_normalization": v1.batch_normalization}
found = {}
for case in cases.cases():
    if "fed" in case.name or "renorm" in case.name or "defaults" in case.name or "in place" in case.name:
        got = cases.run(case, ours)
        found[case.name] = {"y": got["y"].tolist(), "eval": got["eval"].tolist(), "dx": got["dx"].tolist(),
                            "statistics": {n: a.tolist() for n, a in got["statistics"][-1].items()}}
y = v1.batch_norm(tf.ones([2, 3]), is_training=tf.compat.v1.placeholder(tf.bool, []))
w = tf.compat.v1.get_variable("w", [3])
train_op = tf.compat.v1.train.AdamOptimizer().minimize(tf.reduce_sum(tf.square(y * w)))
updates = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
v1.check_update_ops([train_op, updates])
v1.check_saver(tf.compat.v1.train.Saver())
for check, argument in ((v1.check_update_ops, train_op),
                        (v1.check_saver, tf.compat.v1.train.Saver(tf.compat.v1.trainable_variables()))):
    try:
        check(argument)
    except v1.BatchNormUsageError:
        continue
    raise SystemExit(f"{check.__name__} said nothing")
print(json.dumps(found))
"""


def test_with_v2_behavior_disabled():
    recorded = Path(__file__).with_name("recorded")
    child = subprocess.run(
        [sys.executable, "-c", OLD_BEHAVIOR, str(recorded)], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert len(found) > 40
    originals = json.loads((recorded / "originals.json").read_text(encoding="utf-8"))["cases"]
    for name, got in found.items():
        want = originals[name]
        pairs = [(got[part], want[part]) for part in ("y", "eval", "dx")]
        pairs += [(array, want["statistics"][-1][n]) for n, array in got["statistics"].items()]
        for ours, theirs in pairs:
            values = np.array(theirs["values"]).reshape(theirs["shape"])
            np.testing.assert_allclose(ours, values, rtol=2e-5, atol=2e-5 * max(1, np.abs(values).max()), err_msg=name)


def test_the_page_s_example_runs():
    page = (Path(__file__).parents[2] / "docs" / "tensorflow1.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == "(1, 4)"
