"""Folded Keras models compute what they computed; run as a script, for Keras has one backend a process."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import numpy as np
from keras import layers

from bnlayer.surgery.fold import fold
from bnlayer.surgery.recalibrate import recalibrate
from bnlayer_keras.model import ADAPTER

X = np.random.default_rng(3).normal(size=(2, 9, 7, 4)).astype("f4")


def main() -> None:
    rng = np.random.default_rng(1)
    folds(partial(layers.Conv2D, 8, 3), rng, bias=True)
    folds(partial(layers.Dense, 8), rng, bias=False)
    for made in (
        partial(layers.Conv2D, 8, 3, groups=2),
        partial(layers.DepthwiseConv2D, 3, depth_multiplier=2),
        partial(layers.Conv2DTranspose, 8, 3, strides=2),
    ):
        if keras.backend.backend() == "torch":  # JAX compiles each, which takes long and shows nothing more
            folds(made, rng, bias=False)
    model = keras.Sequential([keras.Input((9, 7, 4)), layers.BatchNormalization()])
    model = recalibrate(model, [X[:1], X[1:]])
    np.testing.assert_allclose(model.layers[0].moving_variance.numpy(), X.reshape(-1, 4).var(0), rtol=1e-6)


def folds(made: Any, rng: np.random.Generator, *, bias: bool) -> None:
    """In both forms: the same model with identities for batch norms, and the model without them."""
    norm = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((9, 7, 4)), made(use_bias=bias), norm])
    for variable in norm.variables:
        variable.assign(rng.uniform(0.5, 2, 8).astype("f4"))
    wanted = ADAPTER.run(model, X, training=False).output
    checkpoint = ADAPTER.read(model)
    kept, without = (fold(checkpoint, keep=keep, model=model, x=X) for keep in (True, False))
    smaller = keras.Sequential([keras.Input((9, 7, 4)), made(use_bias=True)])
    for one, folded in ((model, kept), (smaller, without)):
        got = ADAPTER.run(ADAPTER.write(one, folded), X, training=False).output
        assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max(), (made, bias)


if __name__ == "__main__":
    main()
