"""Handwritten digits in TensorFlow 1's way, on today's TensorFlow: a graph, a session, placeholders and UPDATE_OPS.

    python examples/digits_tf1.py

`bnlayer_tensorflow.v1.batch_norm` stands where `tf.contrib.layers.batch_norm` stood: the same arguments, variable names
and collections. It leaves the updates of its moving statistics in UPDATE_OPS, and the training operation has to depend
on them; tf1_update_ops.py shows what happens if it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import digits
import numpy as np
import tensorflow as tf

from bnlayer_tensorflow.v1 import batch_norm, check_update_ops

tf1 = tf.compat.v1


class Network(NamedTuple):
    """Where to feed a graph, and what to fetch from it."""

    x: tf.Tensor
    y: tf.Tensor
    training: tf.Tensor
    logits: tf.Tensor
    loss: tf.Tensor


def network(shapes: tuple[tuple[int, ...], ...]) -> Network:
    """Kernels of these shapes, a batch norm and a ReLU after each but the last, in the current graph."""
    x = tf1.placeholder(tf.float32, (None, 8, 8, 1), name="x")
    y = tf1.placeholder(tf.int32, (None,), name="y")
    training = tf1.placeholder_with_default(False, (), name="training")
    kernels = [tf1.get_variable(f"kernel{i}", initializer=k) for i, k in enumerate(digits.first_kernels(shapes))]
    bias = tf1.get_variable("bias", (10,), initializer=tf1.zeros_initializer())
    h = x if len(shapes[0]) == 4 else tf.reshape(x, (-1, 64))
    for kernel in kernels[:-1]:
        h = tf.nn.conv2d(h, kernel, 1, "VALID") if kernel.shape.rank == 4 else h @ kernel
        h = tf.nn.relu(batch_norm(h, decay=0.9, scale=True, epsilon=1e-5, is_training=training))
    features = tf.reduce_mean(h, (1, 2)) if h.shape.rank == 4 else h
    logits = features @ kernels[-1] + bias
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
    return Network(x, y, training, logits, loss)


def train_op(loss: tf.Tensor) -> tf.Operation:
    """One step of gradient descent, and with it every update of moving statistics that the graph holds."""
    with tf.control_dependencies(tf1.get_collection(tf1.GraphKeys.UPDATE_OPS)):
        return tf1.train.MomentumOptimizer(digits.RATE, digits.MOMENTUM).minimize(loss)


def train(session: tf1.Session, net: Network, step: tf.Operation, data: digits.Digits) -> list[float]:
    """The loss of every step."""
    feeds = ({net.x: x, net.y: y, net.training: True} for x, y in digits.batches(data))
    return [session.run([net.loss, step], feed)[0] for feed in feeds]


@contextmanager
def new_session() -> Iterator[tf1.Session]:
    """A session on the current graph, its variables initialized, on one thread: the networks are too small to share."""
    config = tf1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    with tf1.Session(config=config) as session:
        session.run(tf1.global_variables_initializer())
        yield session


def main() -> None:
    """Train both networks and print what they learned."""
    data = digits.load()
    for name, shapes in (("dense", digits.DENSE), ("convolutional", digits.CONVOLUTIONAL)):
        with tf.Graph().as_default():
            net = network(shapes)
            step = train_op(net.loss)
            check_update_ops([net.loss, step])  # raises if this would train without moving the statistics
            with new_session() as session:
                losses = train(session, net, step, data)

                def predict(x: np.ndarray, net: Network = net, session: tf1.Session = session) -> np.ndarray:
                    return session.run(net.logits, {net.x: x})

                digits.report(name, losses, data, predict)


if __name__ == "__main__":
    main()
