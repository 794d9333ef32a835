"""Handwritten digits in Keras 3: a dense and a convolutional network with bnlayer's batch norm.

    KERAS_BACKEND=jax python examples/digits_keras.py        (or tensorflow, which is the default, or torch)

`bnlayer_keras.BatchNormalization` takes Keras's arguments: momentum 0.9 is the weight on the OLD statistics. What it
takes beyond them makes it the layer of the other digits examples: Keras's own cannot average the unbiased variance.
"""

from __future__ import annotations

import digits
import keras
import numpy as np
from keras import layers

from bnlayer_keras import BatchNormalization


def batch_norm() -> BatchNormalization:
    """torch's defaults, in Keras's words."""
    return BatchNormalization(momentum=0.9, epsilon=1e-5, moving_variance_estimator="unbiased")


def dense() -> keras.Sequential:
    """64 pixels, two hidden layers of 64; no biases before a batch norm, which would take them out again."""
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(64, use_bias=False),
            batch_norm(),
            layers.ReLU(),
            layers.Dense(64, use_bias=False),
            batch_norm(),
            layers.ReLU(),
            layers.Dense(10),
        ]
    )


def convolutional() -> keras.Sequential:
    """Two convolutions, and the mean over the 4x4 pixels that they leave."""
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, use_bias=False),
            batch_norm(),
            layers.ReLU(),
            layers.Conv2D(32, 3, use_bias=False),
            batch_norm(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


def start(model: keras.Sequential, kernels: list[np.ndarray]) -> None:
    """Put the examples' first kernels in."""
    of_layers = [layer for layer in model.layers if isinstance(layer, (layers.Dense, layers.Conv2D))]
    for layer, kernel in zip(of_layers, kernels, strict=True):
        layer.kernel.assign(kernel)


def train(model: keras.Sequential, data: digits.Digits) -> list[float]:
    """The mean loss of every epoch."""
    model.compile(
        optimizer=keras.optimizers.SGD(digits.RATE, momentum=digits.MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    fitted = model.fit(
        digits.batches(data), steps_per_epoch=digits.STEPS, epochs=digits.EPOCHS, shuffle=False, verbose=0
    )
    return fitted.history["loss"]


def main() -> None:
    """Train both networks and print what they learned."""
    data = digits.load()
    print(f"Keras runs on {keras.backend.backend()}")
    for name, model, shapes in (
        ("dense", dense(), digits.DENSE),
        ("convolutional", convolutional(), digits.CONVOLUTIONAL),
    ):
        start(model, digits.first_kernels(shapes))
        losses = train(model, data)
        digits.report(name, losses, data, lambda x, model=model: model.predict(x, verbose=0))


if __name__ == "__main__":
    main()
