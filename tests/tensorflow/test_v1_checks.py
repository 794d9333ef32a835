"""The classic mistakes in a TensorFlow 1 graph: told where they happen, and only there."""

from __future__ import annotations

import re

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from bnlayer import BatchNormError, InputError  # noqa: E402
from bnlayer_tensorflow import v1 as ours  # noqa: E402

v1 = tf.compat.v1
KEY = v1.GraphKeys.UPDATE_OPS
X = np.random.default_rng(3).normal(3, 2, (8, 3)).astype("f4")


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def network(x=None, **arguments):
    """Two layers; the loss."""
    h = v1.placeholder(tf.float32, [None, 3], "x") if x is None else x
    h = tf.matmul(h, v1.get_variable("w", [3, 3]))
    h = tf.nn.relu(ours.batch_norm(h, scope="first", **arguments))
    return tf.reduce_mean(tf.square(ours.batch_norm(h, scope="second", **arguments)))


def sgd(loss, **arguments):
    return v1.train.GradientDescentOptimizer(0.1).minimize(loss, **arguments)


# check_update_ops


def test_a_train_op_that_leaves_the_updates_out_is_told():
    train_op = sgd(network())
    with pytest.raises(ours.BatchNormUsageError, match="4 of 4 update operations are not run") as told:
        ours.check_update_ops(train_op)
    assert isinstance(told.value, BatchNormError)
    message = str(told.value)
    assert "first/" in message
    assert "tf.control_dependencies(" in message
    assert "session.run([train_op, update_ops])" in message


def test_as_a_warning():
    train_op = sgd(network())
    with pytest.warns(ours.BatchNormUsageWarning, match="update operations are not run") as told:
        ours.check_update_ops(train_op, action="warn")
    assert issubclass(ours.BatchNormUsageWarning, UserWarning)
    assert told[0].filename == __file__
    with pytest.raises(InputError, match="'raise' or 'warn'"):
        ours.check_update_ops(train_op, action="print")


def test_a_control_dependency_is_enough():
    loss = network()
    with tf.control_dependencies(v1.get_collection(KEY)):
        train_op = sgd(loss)
    ours.check_update_ops(train_op)
    ours.check_update_ops([train_op, loss])


def test_a_control_dependency_through_a_group_is_enough():
    train_op = sgd(network())
    ours.check_update_ops(tf.group(train_op, *v1.get_collection(KEY)))
    ours.check_update_ops(tf.group([train_op, v1.get_collection(KEY)]))


def test_side_by_side_is_enough(graph):
    loss = network()
    train_op, updates = sgd(loss), v1.get_collection(KEY)
    ours.check_update_ops([train_op, updates])
    ours.check_update_ops({"train": train_op, "more": (loss, {"updates": updates})})
    ours.check_update_ops([train_op.name, *(tensor.name for tensor in updates)])
    with pytest.raises(ours.BatchNormUsageError, match="1 of 4"):
        ours.check_update_ops([train_op, updates[1:]])


def test_what_does_not_train_is_fine():
    loss = network()
    sgd(loss)
    ours.check_update_ops(loss)
    ours.check_update_ops([v1.global_variables_initializer(), v1.train.Saver().as_saver_def().restore_op_name])
    ours.check_update_ops(v1.trainable_variables())
    ours.check_update_ops([])


def test_eval_graphs_are_fine():
    train_op = sgd(network(is_training=False))
    ours.check_update_ops(train_op)


def test_updates_in_place_are_fine():
    ours.check_update_ops(sgd(network(updates_collections=None)))


def test_a_collection_of_ones_own_is_checked_too():
    train_op = sgd(network(updates_collections="mine"))
    with pytest.raises(ours.BatchNormUsageError, match="4 of 4"):
        ours.check_update_ops(train_op)
    ours.check_update_ops([train_op, v1.get_collection("mine")])


def test_a_fed_flag():
    loss = network(is_training=v1.placeholder(tf.bool, []))
    train_op = sgd(loss)
    with pytest.raises(ours.BatchNormUsageError):
        ours.check_update_ops(train_op)
    ours.check_update_ops([train_op, v1.get_collection(KEY)])


def test_updates_collected_before_the_layers_exist():
    early = v1.get_collection(KEY)
    train_op = sgd(network())
    with pytest.raises(ours.BatchNormUsageError, match=r"empty list.*collected before the layers existed"):
        ours.check_update_ops([train_op, early])


def test_updates_collected_between_the_layers():
    h = ours.batch_norm(v1.placeholder(tf.float32, [None, 3]), scope="first", scale=True)
    with tf.control_dependencies(v1.get_collection(KEY)):
        gate = tf.no_op()
    with tf.control_dependencies([gate]):
        train_op = sgd(tf.reduce_sum(tf.square(ours.batch_norm(h, scope="second", scale=True))))
    with pytest.raises(ours.BatchNormUsageError, match="collected before these layers existed") as told:
        ours.check_update_ops(train_op)
    assert "2 of 4" in str(told.value)
    assert "first/" not in str(told.value).split("Missing:")[1]


def test_only_what_is_trained_through_has_to_move():
    x = v1.placeholder(tf.float32, [None, 3])
    loss = tf.reduce_sum(tf.square(ours.batch_norm(x, scope="used")))
    ours.batch_norm(x, scope="beside")
    train_op = sgd(loss)
    with pytest.raises(ours.BatchNormUsageError) as told:
        ours.check_update_ops(train_op)
    assert "beside" not in str(told.value)
    ours.check_update_ops([train_op, v1.get_collection(KEY, "used")])


def test_a_layer_below_whose_output_no_gradient_needs_has_to_move_too():
    x = tf.constant(X)
    w = v1.get_variable("w", [3, 3])
    loss = tf.reduce_sum(ours.batch_norm(tf.matmul(x, w))[:2])
    with pytest.raises(ours.BatchNormUsageError, match=r"trains.* w"):
        ours.check_update_ops(sgd(loss, var_list=[w]))


def test_a_scope_says_which_layers_should_move():
    train_op = sgd(network())
    with pytest.raises(ours.BatchNormUsageError, match="2 of 2"):
        ours.check_update_ops(train_op, scope="second")
    ours.check_update_ops([train_op, v1.get_collection(KEY, "second")], scope="second")
    ours.check_update_ops(train_op, scope="elsewhere")


@pytest.mark.parametrize("optimizer", ["AdamOptimizer", "MomentumOptimizer", "RMSPropOptimizer", "AdagradOptimizer"])
def test_every_optimizer_trains(optimizer):
    arguments = (0.1, 0.9) if optimizer == "MomentumOptimizer" else (0.1,)
    train_op = getattr(v1.train, optimizer)(*arguments).minimize(network())
    with pytest.raises(ours.BatchNormUsageError):
        ours.check_update_ops(train_op)
    ours.check_update_ops([train_op, v1.get_collection(KEY)])


@pytest.mark.parametrize("write", [v1.assign, lambda w, value: v1.assign_sub(w, w - value)])
def test_a_hand_written_step_trains(write):
    w = v1.get_variable("v", [3, 3])
    loss = tf.reduce_sum(tf.square(ours.batch_norm(tf.matmul(tf.constant(X), w))))
    step = write(w, w - 0.1 * tf.gradients(loss, w)[0])
    with pytest.raises(ours.BatchNormUsageError):
        ours.check_update_ops(step)
    ours.check_update_ops([step, v1.get_collection(KEY)])


def test_a_step_inside_a_cond_trains():
    loss = network()
    optimizer = v1.train.GradientDescentOptimizer(0.1)
    gradients = optimizer.compute_gradients(loss)

    def apply():
        with tf.control_dependencies([optimizer.apply_gradients(gradients)]):
            return tf.constant(True)

    step = tf.cond(v1.placeholder(tf.bool, []), apply, lambda: tf.constant(False))
    with pytest.raises(ours.BatchNormUsageError):
        ours.check_update_ops(step)
    ours.check_update_ops([step, v1.get_collection(KEY)])


def test_copying_weights_is_not_training():
    network()
    w = v1.trainable_variables()[0]
    target = v1.get_variable("target", w.shape)
    ours.check_update_ops(v1.assign(target, 0.9 * target + 0.1 * w))


def test_another_library_s_update_ops_are_known_by_their_collection():
    w = v1.get_variable("w", [3, 3])
    h = tf.matmul(tf.constant(X), w)
    mean = v1.get_variable("bn/moving_mean", [3], trainable=False)
    update = v1.assign_sub(mean, 0.1 * (mean - tf.reduce_mean(h, 0)))
    v1.add_to_collection(KEY, update)
    train_op = sgd(tf.reduce_sum(tf.square(h - tf.reduce_mean(h, 0))))
    with pytest.raises(ours.BatchNormUsageError, match="1 of 1"):
        ours.check_update_ops(train_op)
    ours.check_update_ops([train_op, update])
    ours.check_update_ops([v1.global_variables_initializer(), v1.train.Saver().as_saver_def().restore_op_name])


def test_a_graph_from_a_file_is_known_by_its_collections(tmp_path):
    train_op = sgd(network())
    v1.train.export_meta_graph(str(tmp_path / "graph.meta"))
    with tf.Graph().as_default() as again:
        v1.train.import_meta_graph(str(tmp_path / "graph.meta"))
        with pytest.raises(ours.BatchNormUsageError, match="4 of 4"):
            ours.check_update_ops(train_op.name)
        ours.check_update_ops([train_op.name, again.get_collection(KEY)])


def test_sparse_fetches():
    loss = network()
    train_op = sgd(loss)
    sparse = tf.sparse.from_dense(tf.reshape(loss, [1]))
    ours.check_update_ops([sparse, v1.trainable_variables()[0]])
    with pytest.raises(ours.BatchNormUsageError):
        ours.check_update_ops({"a": sparse, "b": train_op})


def test_fetches_from_two_graphs():
    first = network()
    with tf.Graph().as_default():
        second = network()
    with pytest.raises(InputError, match="one graph"):
        ours.check_update_ops([first, second])


# check_saver


def test_a_saver_of_trainable_variables_is_told():
    network(zero_debias_moving_mean=True)
    with pytest.raises(ours.BatchNormUsageError, match="first/moving_mean") as told:
        ours.check_saver(v1.train.Saver(v1.trainable_variables()))
    assert "global_variables()" in str(told.value)
    with pytest.warns(ours.BatchNormUsageWarning, match="leaves out"):
        ours.check_saver(v1.train.Saver(v1.trainable_variables()), action="warn")


def test_a_saver_that_forgets_one():
    network(renorm=False, zero_debias_moving_mean=True)
    every = v1.global_variables()
    kept = [variable for variable in every if "second/moving_mean/biased" not in variable.op.name]
    with pytest.raises(ours.BatchNormUsageError, match="second/second/moving_mean/biased"):
        ours.check_saver(v1.train.Saver(kept))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_saver_of_all_variables_is_fine(sharded):
    network(renorm=True)
    ours.check_saver(v1.train.Saver(sharded=sharded))
    ours.check_saver(v1.train.Saver(v1.global_variables()))
    ours.check_saver(v1.train.Saver({f"other/{v.op.name}": v for v in v1.global_variables()}))


def test_a_saver_that_is_not_built_or_of_another_graph():
    network()
    graph, saver = tf.compat.v1.get_default_graph(), v1.train.Saver(v1.trainable_variables())
    with pytest.raises(InputError, match="built"):
        ours.check_saver(v1.train.Saver(defer_build=True))
    with tf.Graph().as_default():
        with pytest.raises(InputError, match="graph="):
            ours.check_saver(saver)
        with pytest.raises(ours.BatchNormUsageError):
            ours.check_saver(saver, graph=graph)


def test_another_library_s_statistics_are_known_by_their_names():
    for name in ("gamma", "beta"):
        v1.get_variable(f"bn/{name}", [3])
    for name in ("moving_mean", "moving_variance"):
        v1.get_variable(f"bn/{name}", [3], trainable=False)
    with pytest.raises(ours.BatchNormUsageError, match=re.escape("bn/moving_mean, bn/moving_variance")):
        ours.check_saver(v1.train.Saver(v1.trainable_variables()))


# check_eval


def test_an_eval_that_moves_statistics_in_place_is_told():
    loss = network(updates_collections=None)
    with pytest.raises(ours.BatchNormUsageError, match=r"moves the statistics of first, second.*False"):
        ours.check_eval(loss)
    with pytest.warns(ours.BatchNormUsageWarning):
        ours.check_eval(loss, action="warn")


def test_an_eval_that_fetches_the_updates_is_told():
    loss = network()
    ours.check_eval(loss)
    with pytest.raises(ours.BatchNormUsageError, match="update operations"):
        ours.check_eval([loss, v1.get_collection(KEY)])


@pytest.mark.parametrize("collection", [None, KEY])
def test_an_eval_with_a_fed_flag(collection):
    flag = v1.placeholder(tf.bool, [])
    loss = network(is_training=flag, updates_collections=collection)
    fetches = [loss, v1.get_collection(KEY)]
    ours.check_eval(fetches, feed_dict={flag: False})
    with pytest.raises(ours.BatchNormUsageError, match="first, second"):
        ours.check_eval(fetches, feed_dict={flag: True})
    with pytest.raises(InputError, match="feed_dict"):
        ours.check_eval(fetches)


def test_an_eval_with_a_default_or_a_computed_flag():
    def layer(flag):
        return ours.batch_norm(tf.constant(X), is_training=flag, updates_collections=None)

    default = v1.placeholder_with_default(False, [])
    y = layer(default)
    ours.check_eval(y)
    with pytest.raises(ours.BatchNormUsageError, match=r"of BatchNorm\."):
        ours.check_eval(y, feed_dict={default: True})
    mode = v1.placeholder(tf.string, [])
    y = layer(tf.equal(mode, "train"))
    with v1.Session() as session:
        ours.check_eval(y, feed_dict={mode: "eval"}, session=session)
        with pytest.raises(ours.BatchNormUsageError, match=r"of BatchNorm_1\."):
            ours.check_eval(y, feed_dict={mode: "train"}, session=session)


def test_an_eval_that_runs_another_library_s_update():
    mean = v1.get_variable("bn/moving_mean", [3], trainable=False)
    v1.get_variable("bn/moving_variance", [3], trainable=False)
    update = v1.assign_sub(mean, 0.1 * (mean - tf.constant(X[0])))
    ours.check_eval(mean)
    with pytest.raises(ours.BatchNormUsageError, match="bn/moving_mean"):
        ours.check_eval(update)


# check_statistics


def test_statistics_still_at_0_and_1_are_told():
    train_op = sgd(network(x=tf.constant(X), decay=0.5))
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        session.run(train_op)
        with pytest.raises(ours.BatchNormUsageError, match=r"first/moving_mean, second/moving_mean.* 0 and 1"):
            ours.check_statistics(session)
        with pytest.warns(ours.BatchNormUsageWarning):
            ours.check_statistics(session, action="warn")
        session.run(v1.get_collection(KEY, "first"))
        with pytest.raises(ours.BatchNormUsageError, match=r"^second/moving_mean and"):
            ours.check_statistics(session)
        ours.check_statistics(session, scope="first")
        session.run(v1.get_collection(KEY))
        ours.check_statistics(session)
