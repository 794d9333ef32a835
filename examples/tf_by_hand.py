"""A batch norm written by hand over tf.nn, as TensorFlow 1 code has it, and the same with bnlayer: equal results.

    python examples/tf_by_hand.py

The hand-written layer has three things to get right: the batch's moments in training, an ExponentialMovingAverage of
them for eval, and somebody who runs its update. It also has two traits that one has to know to replace it. Its moving
variance is biased, for tf.nn.moments is; and the averages of tensors start at 0, the variance too, so that the moving
standard deviation is too small at first. bnlayer's drop-in for contrib says both: `fused=False` and an initializer.

Both networks start equal and train on the same batches of handwritten digits, in float64, so that rounding stays small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import digits
import numpy as np
import tensorflow as tf
from digits_tf1 import new_session, train_op

from bnlayer_tensorflow.v1 import batch_norm

tf1 = tf.compat.v1
# A decay that float32 holds exactly: TensorFlow's average rounds its decay to float32, whatever it averages.
DECAY, EPSILON = 0.875, 1e-3
COMPARED_STEPS = (1, digits.STEPS, digits.EPOCHS * digits.STEPS)


def by_hand(x: tf.Tensor, training: tf.Tensor) -> tf.Tensor:
    """Batch normalization over the last axis, from TensorFlow's own parts."""
    gamma = tf1.get_variable("gamma", x.shape[-1:], x.dtype, tf1.ones_initializer())
    beta = tf1.get_variable("beta", x.shape[-1:], x.dtype, tf1.zeros_initializer())
    mean, variance = tf.nn.moments(x, list(range(x.shape.rank - 1)))
    averages = tf.train.ExponentialMovingAverage(DECAY)
    tf1.add_to_collection(tf1.GraphKeys.UPDATE_OPS, averages.apply([mean, variance]))
    used = [tf.where(training, batch, averages.average(batch)) for batch in (mean, variance)]
    return tf.nn.batch_normalization(x, *used, beta, gamma, EPSILON)


def with_bnlayer(x: tf.Tensor, training: tf.Tensor) -> tf.Tensor:
    """The same."""
    return batch_norm(
        x,
        decay=DECAY,
        scale=True,
        epsilon=EPSILON,
        is_training=training,
        fused=False,
        param_initializers={"moving_variance": tf1.zeros_initializer()},
    )


class Network(NamedTuple):
    """What to fetch: logits (N, 10), the loss, and the moving statistics, means and variances by turns."""

    logits: tf.Tensor
    loss: tf.Tensor
    moving: list[tf.Variable]


def network(
    name: str, normalize: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], x: tf.Tensor, y: tf.Tensor, training: tf.Tensor
) -> Network:
    """The dense network with this batch norm."""
    *kernels, last = (tf.Variable(kernel.astype(np.float64)) for kernel in digits.first_kernels(digits.DENSE))
    h = tf.reshape(x, (-1, 64))
    for i, kernel in enumerate(kernels):
        with tf1.variable_scope(f"{name}/layer{i}"):
            h = tf.nn.relu(normalize(h @ kernel, training))
    logits = h @ last
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
    moving = [variable for variable in tf1.global_variables(scope=f"{name}/") if not variable.trainable]
    return Network(logits, loss, moving)


def main() -> None:
    """Train both and print how far apart they are on the way."""
    data = digits.load()
    with tf.Graph().as_default():
        x = tf1.placeholder(tf.float64, (None, 8, 8, 1))
        y = tf1.placeholder(tf.int32, (None,))
        training = tf1.placeholder_with_default(False, ())
        networks = [network("by_hand", by_hand, x, y, training), network("bnlayer", with_bnlayer, x, y, training)]
        step = train_op(networks[0].loss + networks[1].loss)  # they share no variable, so each trains alone
        with new_session() as session:
            print("         largest difference in          eval accuracy")
            print("  step   statistics  eval logits   by hand    bnlayer")
            for t, (batch_x, batch_y) in enumerate(digits.batches(data), 1):
                session.run(step, {x: batch_x, y: batch_y, training: True})
                if t in COMPARED_STEPS:
                    hand, ours = session.run(networks, {x: data.eval_x, y: data.eval_y})
                    statistics = max(np.abs(a - b).max() for a, b in zip(hand.moving, ours.moving, strict=True))
                    logits = np.abs(hand.logits - ours.logits).max()
                    reached = [digits.accuracy(net.logits, data.eval_y) for net in (hand, ours)]
                    print(f"{t:6}   {statistics:10.1e}   {logits:10.1e}   {reached[0]:7.3f}    {reached[1]:7.3f}")


if __name__ == "__main__":
    main()
