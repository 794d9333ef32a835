"""TensorFlow: our function, and our Keras layer, in `tf.function` against `keras.layers.BatchNormalization`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from .cases import IMAGES, MODES, ROWS, Case, Mode, Pair, Shape, data, parameters

_LAST = {"eval": 0.72, "train": 0.32, "grad": 0.32}
_FIRST = {"eval": 1.05, "train": 0.65, "grad": 0.50}
_ROWS = {"eval": 1.02, "train": 1.02, "grad": 0.95}


def cases() -> Iterator[Case]:
    """Channels last, axis 1, and rank 2."""
    for shape in IMAGES:
        for mode in MODES:
            yield _case(mode, "NHWC", shape, _LAST[mode])
            yield _case(mode, "NCHW", (shape[0], shape[3], shape[1], shape[2]), _FIRST[mode])
    for shape in ROWS:
        for mode in MODES:
            bar = _LAST[mode] if shape == (65536, 64) else _ROWS[mode] if shape == (256, 128) else None
            yield _case(mode, "NC", shape, bar)


def _case(mode: Mode, layout: str, shape: Shape, bar: float | None) -> Case:
    axis = 1 if layout == "NCHW" else -1
    return Case(
        "tensorflow", "keras.layers in tf.function", mode, "float32", layout, shape, bar,
        partial(_pair, mode, shape, axis),
    )  # fmt: skip


def _pair(mode: Mode, shape: Shape, axis: int) -> Pair:
    import keras
    import tensorflow as tf

    import bnlayer_keras

    x, dy = (tf.constant(a) for a in data(shape))
    values = parameters(shape[axis])
    functions = []
    for kind in (bnlayer_keras.BatchNormalization, keras.layers.BatchNormalization):
        layer = kind(axis=axis)
        layer.build(shape)
        for name, value in values.items():
            getattr(layer, name).assign(value)
        functions.append(tf.function(partial(_run, layer, mode), reduce_retracing=True))

    def call(function: Any) -> Any:
        result = function(x, dy)
        tf.test.experimental.sync_devices()
        return result

    def results() -> Any:
        return tuple(tuple(part.numpy() for part in function(x, dy)) for function in functions)

    return Pair(partial(call, functions[0]), partial(call, functions[1]), results)


def _run(layer: Any, mode: Mode, x: Any, dy: Any) -> tuple[Any, ...]:
    import tensorflow as tf

    if mode != "grad":
        return (layer(x, training=mode == "train"),)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    dx, *_ = tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)
    return y, dx
