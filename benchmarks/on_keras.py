"""Our Keras layer against Keras's own, on JAX (under jit) or torch: as KERAS_BACKEND says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .cases import IMAGES, MODES, ROWS, Case, Mode, Pair, Shape, data, parameters

_BARS = {"eval": 1.0, "train": 1.0, "grad": 0.90}


def cases(device: str = "cpu") -> Iterator[Case]:
    """Channels last, on the runtime of this process; on a device that is not the CPU without bars."""
    runtime = os.environ["KERAS_BACKEND"]
    for shape in (*IMAGES, *ROWS):
        for mode in MODES:
            layout = "NHWC" if len(shape) == 4 else "NC"
            bar = _BARS[mode] if device == "cpu" and shape != (8, 64) else None
            make = partial(_pair, runtime, device, mode, shape)
            yield Case("keras", f"keras.layers on {runtime}", mode, "float32", layout, shape, bar, make)


def _pair(runtime: str, device: str, mode: Mode, shape: Shape) -> Pair:
    import keras

    import bnlayer_keras

    layers = []
    for kind in (bnlayer_keras.BatchNormalization, keras.layers.BatchNormalization):
        layer = kind()
        layer.build(shape)
        for name, value in parameters(shape[-1]).items():
            getattr(layer, name).assign(value)
        layers.append(layer)
    return (_on_jax if runtime == "jax" else _on_torch)(layers, device, mode, shape)


def _on_jax(layers: list[Any], device: str, mode: Mode, shape: Shape) -> Pair:
    from .on_jax import Repeated, flat

    ours, peer = (Repeated(*_stateless(layer, device, mode, shape)) for layer in layers)

    def results() -> Any:
        theirs = flat(peer())
        return flat(ours())[: len(theirs)], theirs  # ours has a counter besides, and it is the last

    return Pair(ours, peer, results, memory=ours.memory)


def _stateless(layer: Any, device: str, mode: Mode, shape: Shape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step that Keras's own training takes, and what it takes it on: variables go in, and come out."""
    import jax

    from .on_jax import on

    def function(x: Any, trained: Any, rest: Any) -> tuple[Any, Any]:
        return layer.stateless_call(trained, rest, x, training=mode != "eval")

    def step(x: Any, trained: Any, rest: Any, dy: Any) -> tuple[Any, ...]:
        if mode != "grad":
            return function(x, trained, rest)
        y, back, after = jax.vjp(lambda x, trained: function(x, trained, rest), x, trained, has_aux=True)
        return y, *back(dy), after

    x, dy = on(device, *data(shape))
    trained, rest = (
        on(device, *(variable.value for variable in variables))
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    )
    return step, (x, trained, rest, dy)


def _on_torch(layers: list[Any], device: str, mode: Mode, shape: Shape) -> Pair:
    import torch

    x, dy = (torch.from_numpy(a).to(device) for a in data(shape))
    x.requires_grad_(mode == "grad")

    def run(layer: Any) -> tuple[Any, ...]:
        if mode != "grad":
            with torch.no_grad():
                return (layer(x, training=mode == "train"),)
        y = layer(x, training=True)
        y.backward(dy)
        dx, x.grad = x.grad, None  # held on to, it would count as there before the next call
        return y.detach(), dx

    def call(layer: Any) -> tuple[Any, ...]:
        found = run(layer)
        if device != "cpu":
            torch.cuda.synchronize()
        return found

    def results() -> Any:
        return tuple(tuple(part.cpu().numpy() for part in call(layer)) for layer in layers)

    return Pair(partial(call, layers[0]), partial(call, layers[1]), results)
