"""Our Keras layer against Keras's own, on JAX (under jit) or torch: as KERAS_BACKEND says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .cases import IMAGES, MODES, ROWS, Case, Mode, Pair, Shape, data, parameters

_BARS = {"eval": 1.0, "train": 1.0, "grad": 0.90}
_MOMENTUM, _EPSILON = 0.99, 1e-3  # Keras's defaults


def cases(device: str = "cpu") -> Iterator[Case]:
    """Channels last, on the runtime of this process; on a device that is not the CPU without bars."""
    runtime = os.environ["KERAS_BACKEND"]
    for shape in (*IMAGES, *ROWS):
        for mode in MODES:
            layout = "NHWC" if len(shape) == 4 else "NC"
            bar = _BARS[mode] if device == "cpu" and shape != (8, 64) else None
            make = partial(_pair, runtime, device, mode, shape)
            yield Case("keras", f"keras.layers on {runtime}", mode, "float32", layout, shape, bar, make)
    if runtime == "jax":
        for mode in MODES:
            yield _limit("the same again", _again, device, mode, ROWS[0])
            yield _limit("bare operations", _bare, device, mode, ROWS[0])
        for shape in IMAGES:
            yield _limit("the same again", _again, device, "eval", shape)


def _limit(what: str, make: Callable[[str, Mode, Shape], Pair], device: str, mode: Mode, shape: Shape) -> Case:
    layout = "NHWC" if len(shape) == 4 else "NC"
    peer = f"keras.layers on jax (not ours: {what})"
    return Case("keras", peer, mode, "float32", layout, shape, None, partial(make, device, mode, shape))


def _pair(runtime: str, device: str, mode: Mode, shape: Shape) -> Pair:
    import keras

    import bnlayer_keras

    layers = [_layer(kind, shape) for kind in (bnlayer_keras.BatchNormalization, keras.layers.BatchNormalization)]
    return (_on_jax if runtime == "jax" else _on_torch)(layers, device, mode, shape)


def _layer(kind: Any, shape: Shape) -> Any:
    layer = kind()
    layer.build(shape)
    for name, value in parameters(shape[-1]).items():
        getattr(layer, name).assign(value)
    return layer


def _again(device: str, mode: Mode, shape: Shape) -> Pair:
    """Not ours, but Keras's layer twice: by how much the same program differs from itself."""
    import keras

    return _on_jax([_layer(keras.layers.BatchNormalization, shape) for _ in range(2)], device, mode, shape)


def _bare(device: str, mode: Mode, shape: Shape) -> Pair:
    """Not ours, but the operations that are left without any layer, in a step of the same arguments and results."""
    import jax.numpy as jnp
    import keras

    from .on_jax import Repeated, flat

    def step(x: Any, trained: Any, rest: Any, dy: Any) -> tuple[Any, ...]:
        (gamma, beta), (mean, variance) = trained, rest
        if mode == "eval":
            return (x - mean) * (gamma / jnp.sqrt(variance + _EPSILON)) + beta, rest
        axes = tuple(range(x.ndim - 1))
        m = jnp.mean(x, axes)
        v = jnp.mean(jnp.square(x - m), axes)
        averages = [_MOMENTUM * old + (1 - _MOMENTUM) * new for old, new in ((mean, m), (variance, v))]
        sd = jnp.sqrt(v + _EPSILON)
        xhat = (x - m) / sd
        y = gamma * xhat + beta
        if mode == "train":
            return y, averages
        dbeta, dgamma = jnp.sum(dy, axes), jnp.sum(dy * xhat, axes)
        n = x.size // x.shape[-1]
        return y, gamma / sd * (dy - dbeta / n - xhat * (dgamma / n)), [dgamma, dbeta], averages

    theirs, inputs = _stateless(_layer(keras.layers.BatchNormalization, shape), device, mode, shape)
    bare = Repeated(step, inputs)
    peer = Repeated(theirs, inputs)

    return Pair(bare, peer, lambda: (flat(bare()), flat(peer())), memory=bare.memory)


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
