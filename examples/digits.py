"""What the examples share: scikit-learn's handwritten digits, their batches, first weights, and accuracy.

1797 pictures of 8x8 pixels in ten classes, inside the scikit-learn package; nothing is downloaded. Every framework gets
the same pictures in the same order and starts from the same weights, so that what comes out can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

EPOCHS = 10
BATCH = 64
STEPS = 22  # batches of an epoch; the pictures that do not fill another one sit it out
RATE, MOMENTUM = 0.05, 0.9  # of gradient descent: velocity = 0.9 velocity + gradient, weight -= 0.05 velocity

# The two networks of the examples, each with a batch norm and a ReLU after every kernel but the last. Kernels have
# their inputs before their outputs, those of convolutions height and width before both.
DENSE = ((64, 64), (64, 64), (64, 10))
CONVOLUTIONAL = ((3, 3, 1, 16), (3, 3, 16, 32), (32, 10))  # the mean over all pixels goes into the last


class Digits(NamedTuple):
    """Pictures (N, 8, 8, 1), float32 in [0, 1], and their labels (N,), to train on and to evaluate with."""

    train_x: np.ndarray
    train_y: np.ndarray
    eval_x: np.ndarray
    eval_y: np.ndarray


def load() -> Digits:
    """The digits, shuffled once: four fifths to train on, one fifth to evaluate with."""
    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = (pictures[order] / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    y = labels[order].astype(np.int32)
    cut = len(labels) * 4 // 5
    return Digits(x[:cut], y[:cut], x[cut:], y[cut:])


def batches(digits: Digits, epochs: int = EPOCHS, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of all epochs, each epoch in an order of its own."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order = random.permutation(len(digits.train_y))
        for start in range(0, STEPS * BATCH, BATCH):
            chosen = order[start : start + BATCH]
            yield digits.train_x[chosen], digits.train_y[chosen]


def first_kernels(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[np.ndarray]:
    """Kernels to start from, drawn for ReLU: normal, of variance 2 / inputs."""
    random = np.random.default_rng(seed)
    return [random.normal(0.0, (2.0 / np.prod(s[:-1])) ** 0.5, s).astype(np.float32) for s in shapes]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """How many of the largest logits are the label's."""
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def report(name: str, losses: Sequence[float], digits: Digits, predict: Callable[[np.ndarray], np.ndarray]) -> None:
    """Print the mean loss of the first and the last epoch, and the accuracy of `predict`, which gives logits.

    The losses may be of every step or of every epoch.
    """
    first, *_, last = np.reshape(losses, (EPOCHS, -1)).mean(axis=1)
    train = accuracy(predict(digits.train_x), digits.train_y)
    held_out = accuracy(predict(digits.eval_x), digits.eval_y)
    print(f"{name:14} loss {first:.4f} -> {last:.4f}  train accuracy {train:.3f}  eval accuracy {held_out:.3f}")
