"""The classic mistake of TensorFlow 1: training without UPDATE_OPS, beside the mended training.

    python examples/tf1_update_ops.py

The moving statistics move only if somebody runs their updates. Nothing fails if nobody does: the loss falls, accuracy
in training mode is good, and in eval mode the network normalizes with the mean 0 and the variance 1 it started with.
`check_update_ops` finds the mistake in what is about to be fetched, `check_statistics` in a trained session.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial

import digits
import tensorflow as tf
from digits_tf1 import Network, network, new_session, train, train_op

from bnlayer_tensorflow.v1 import BatchNormUsageError, check_statistics, check_update_ops

tf1 = tf.compat.v1


def broken_train_op(loss: tf.Tensor) -> tf.Operation:
    """One step of gradient descent, and nothing else."""
    return tf1.train.MomentumOptimizer(digits.RATE, digits.MOMENTUM).minimize(loss)


def accuracy(session: tf1.Session, net: Network, data: digits.Digits, training: bool) -> float:
    """Accuracy on the held-out pictures; in training mode they are one batch, normalized with its own statistics."""
    # The updates are not among what is fetched, so that looking in training mode moves nothing.
    logits = session.run(net.logits, {net.x: data.eval_x, net.training: training})
    return digits.accuracy(logits, data.eval_y)


def ask(name: str, check: Callable[[], None]) -> None:
    """Run one of bnlayer's checks and print what it says."""
    try:
        check()
        print(f"  {name} finds nothing.")
    except BatchNormUsageError as error:
        print(textwrap.fill(f"{name} says: {error}", 110, initial_indent="  ", subsequent_indent="    "))


def main() -> None:
    """Train the same network both ways; print what the checks say and what comes of it."""
    data = digits.load()
    for name, make_step in (("broken", broken_train_op), ("mended", train_op)):
        with tf.Graph().as_default():
            net = network(digits.CONVOLUTIONAL)
            step = make_step(net.loss)
            print(f"{name}:")
            ask("check_update_ops", partial(check_update_ops, [net.loss, step]))
            with new_session() as session:
                losses = train(session, net, step, data)
                ask("check_statistics", partial(check_statistics, session))
                in_training, in_eval = (accuracy(session, net, data, training) for training in (True, False))
            print(
                f"  last loss {losses[-1]:.3f}, accuracy in training mode {in_training:.3f}, in eval mode {in_eval:.3f}"
            )


if __name__ == "__main__":
    main()
