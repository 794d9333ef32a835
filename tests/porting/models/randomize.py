"""Random kernels, biases, parameters and moving statistics, so that no mistake hides behind a zero or a one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

UPDATES = 7  # of an equinox layer, which stores its averages before the debiasing by this count; SETTLED ones need none
SETTLED = 1000


class Draw:
    """Tensors of each role, drawn one after the other."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def kernel(self, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        """Activations stay of one magnitude through convolutions and rectifiers."""
        return (self._rng.normal(size=shape) * math.sqrt(2 / fan_in)).astype(np.float32)

    def bias(self, shape: tuple[int, ...]) -> np.ndarray:
        return self._rng.normal(0, 0.2, shape).astype(np.float32)

    def batch_norm(self, features: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """gamma, beta, moving mean, moving variance."""
        gamma, variance = self._rng.uniform(0.5, 1.5, features), self._rng.uniform(0.5, 2, features)
        beta, mean = self._rng.normal(0, 0.2, (2, features))
        gamma, beta, mean, variance = (a.astype(np.float32) for a in (gamma, beta, mean, variance))
        return gamma, beta, mean, variance


def torch_model(model: Any, seed: int) -> Any:
    """The model, changed in place."""
    import torch

    draw = Draw(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                own = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
                for tensor, value in zip(own, draw.batch_norm(layer.num_features), strict=True):
                    tensor.copy_(torch.from_numpy(value))
            elif isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                shape = tuple(layer.weight.shape)
                layer.weight.copy_(torch.from_numpy(draw.kernel(shape, math.prod(shape[1:]))))
                if layer.bias is not None:
                    layer.bias.copy_(torch.from_numpy(draw.bias(tuple(layer.bias.shape))))
    return model


def keras_model(model: Any, seed: int) -> Any:
    """The model, changed in place."""
    import keras

    draw = Draw(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights(draw.batch_norm(layer.gamma.shape[0]))
        elif layer.weights:
            kernel, *bias = (tuple(w.shape) for w in layer.weights)
            spatial_only = isinstance(layer, keras.layers.DepthwiseConv2D)
            fan_in = math.prod(kernel[:-2] if spatial_only else kernel[:-1])
            layer.set_weights([draw.kernel(kernel, fan_in), *map(draw.bias, bias)])
    return model


def nnx_model(model: Any, seed: int) -> Any:
    """The model, changed in place."""
    from flax import nnx

    draw = Draw(seed)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.BatchNorm):
            own = (layer.scale, layer.bias, layer.mean, layer.var)
            for variable, value in zip(own, draw.batch_norm(layer.num_features), strict=True):
                variable[...] = value
        elif isinstance(layer, nnx.Conv | nnx.Linear):
            shape = tuple(layer.kernel.shape)
            layer.kernel[...] = draw.kernel(shape, math.prod(shape[:-1]))
            if layer.bias is not None:
                layer.bias[...] = draw.bias(tuple(layer.bias.shape))
    return model


def linen_variables(shapes: Any, seed: int) -> dict[str, Any]:
    """Variables of these shapes."""
    draw = Draw(seed)

    def filled(params: Any, stats: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if "scale" in params:
            gamma, beta, mean, variance = draw.batch_norm(params["scale"].shape[0])
            return {"scale": gamma, "bias": beta}, {"mean": mean, "var": variance}
        if "kernel" in params:
            shape = params["kernel"].shape
            kernel = {"kernel": draw.kernel(shape, math.prod(shape[:-1]))}
            return kernel | ({"bias": draw.bias(params["bias"].shape)} if "bias" in params else {}), {}
        inner = {name: filled(params[name], stats.get(name, {})) for name in params}
        return {k: p for k, (p, _) in inner.items()}, {k: s for k, (_, s) in inner.items() if s}

    params, stats = filled(shapes["params"], shapes["batch_stats"])
    return {"params": params, "batch_stats": stats}


def equinox_model(model: Any, state: Any, seed: int, updates: int = UPDATES) -> tuple[Any, Any]:
    """A new model and a new state."""
    import equinox as eqx
    import jax

    draw = Draw(seed)

    def filled(layer: Any) -> Any:
        nonlocal state
        if isinstance(layer, eqx.nn.BatchNorm):
            gamma, beta, mean, variance = map(jax.numpy.asarray, draw.batch_norm(layer.input_size))
            stored = np.float32(1 - layer.momentum**updates)
            state = state.set(layer.batch_state_index, (mean * stored, variance * stored))
            state = state.set(layer.batch_counter, jax.numpy.asarray(updates))
            return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (gamma, beta))
        if isinstance(layer, eqx.nn.Conv2d | eqx.nn.Linear):
            kernel = jax.numpy.asarray(draw.kernel(layer.weight.shape, math.prod(layer.weight.shape[1:])))
            layer = eqx.tree_at(lambda layer: layer.weight, layer, kernel)
            if layer.bias is not None:
                bias = jax.numpy.asarray(draw.bias(layer.bias.shape))
                layer = eqx.tree_at(lambda layer: layer.bias, layer, bias)
        return layer

    kinds = (eqx.nn.BatchNorm, eqx.nn.Conv2d, eqx.nn.Linear)
    return jax.tree.map(filled, model, is_leaf=lambda leaf: isinstance(leaf, kinds)), state
