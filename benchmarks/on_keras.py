"""Our Keras layer against Keras's own, on JAX (under jit) or torch: as KERAS_BACKEND says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from .cases import IMAGES, MODES, ROWS, Case, Mode, Pair, Shape, data, parameters

_BARS = {"eval": 1.0, "train": 1.0, "grad": 0.90}


def cases() -> Iterator[Case]:
    """Channels last, on the runtime of this process; TensorFlow's are those of `on_tensorflow`."""
    runtime = os.environ.get("KERAS_BACKEND", "")
    if runtime not in ("jax", "torch"):
        return
    for shape in (*IMAGES, *ROWS):
        for mode in MODES:
            layout = "NHWC" if len(shape) == 4 else "NC"
            bar = None if shape == (8, 64) else _BARS[mode]
            make = partial(_pair, runtime, mode, shape)
            yield Case("keras", f"keras.layers on {runtime}", mode, "float32", layout, shape, bar, make)


def _pair(runtime: str, mode: Mode, shape: Shape) -> Pair:
    import keras

    import bnlayer_keras

    layers = []
    for kind in (bnlayer_keras.BatchNormalization, keras.layers.BatchNormalization):
        layer = kind()
        layer.build(shape)
        for name, value in parameters(shape[-1]).items():
            getattr(layer, name).assign(value)
        layers.append(layer)
    calls = [(_jax if runtime == "jax" else _torch)(layer, mode, shape) for layer in layers]

    def results() -> Any:
        return tuple(tuple(keras.ops.convert_to_numpy(part) for part in call()) for call in calls)

    return Pair(calls[0], calls[1], results)


def _jax(layer: Any, mode: Mode, shape: Shape) -> Any:
    import jax
    import jax.numpy as jnp

    x, dy = (jnp.asarray(a) for a in data(shape))
    trained = [v.value for v in layer.trainable_variables]
    rest = [v.value for v in layer.non_trainable_variables]

    def function(x: Any, trained: Any) -> tuple[Any, Any]:
        return layer.stateless_call(trained, rest, x, training=mode != "eval")

    def step(x: Any, trained: Any, dy: Any) -> tuple[Any, ...]:
        if mode != "grad":
            return function(x, trained)
        y, back, after = jax.vjp(function, x, trained, has_aux=True)
        return y, back(dy)[0], after

    run = jax.jit(step)
    return lambda: jax.block_until_ready(run(x, trained, dy))[:-1]


def _torch(layer: Any, mode: Mode, shape: Shape) -> Any:
    import torch

    x, dy = (torch.from_numpy(a) for a in data(shape))
    if mode == "grad":
        x.requires_grad_()

    def call() -> tuple[Any, ...]:
        if mode != "grad":
            with torch.no_grad():
                return (layer(x, training=mode == "train"),)
        x.grad = None
        y = layer(x, training=True)
        y.backward(dy)
        return y.detach(), x.grad

    return call
