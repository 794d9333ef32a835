"""Three replicas of one process against the batch that they share; `test_synchronized.py` runs this."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 3
)
import keras  # noqa: E402 - the devices come first

from bnlayer_keras import BatchNormalization  # noqa: E402

STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1", "CPU:2"])
ROWS = (2, 6, 0)
X = (np.random.default_rng(45).normal(size=(8, 4)) + np.arange(8)[:, None]).astype("f4")


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def replicas_against_the_batch():
    with STRATEGY.scope():
        layer = BatchNormalization(synchronized=True, momentum=0.5, moving_variance_estimator="unbiased")
        layer.build((None, 4))
    whole = BatchNormalization(momentum=0.5, moving_variance_estimator="unbiased")

    def one(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        return y, tape.gradient(loss, x)

    @tf.function
    def all_of_them(xs):
        return STRATEGY.run(one, args=(xs,))

    parts = np.split(X, np.cumsum(ROWS)[:-1])
    xs = STRATEGY.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )
    y, dx = ([part.numpy() for part in STRATEGY.experimental_local_results(each)] for each in all_of_them(xs))
    assert tuple(len(part) for part in y) == ROWS
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        want = whole(x, training=True)
        loss = tf.reduce_sum(want**3)
    close(np.concatenate(y), want)
    close(np.concatenate(dx), tape.gradient(loss, x))
    for name in ("moving_mean", "moving_variance"):
        for copy in STRATEGY.experimental_local_results(getattr(layer, name).value):
            close(copy, getattr(whole, name).value)
    assert int(layer.num_updates.numpy()) == 1


def fit_with_a_replica_that_gets_no_rows():
    with STRATEGY.scope():
        model = keras.Sequential([keras.Input((4,)), BatchNormalization(synchronized=True), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(tf.data.Dataset.from_tensor_slices((X, X[:, :1])).batch(6), verbose=0)  # of 2, 2 and 2, then 1, 1 and 0
    assert int(model.layers[0].num_updates.numpy()) == 2
    assert all(np.isfinite(values).all() for values in model.get_weights())


if __name__ == "__main__":
    replicas_against_the_batch()
    fit_with_a_replica_that_gets_no_rows()
