"""Porting by hand, with nothing of bnlayer: the oracle by which the truth of `truth.py` is judged.

A layer is a mapping of words to arrays: "kernel" (torch's layout) and "bias", or "gamma", "beta", "mean", "variance"
and "epsilon".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .truth import Pair

Layers = dict[str, dict[str, Any]]


def of_keras(model: Any) -> Layers:
    import keras

    found: Layers = {}
    for layer in model.layers:
        weights = layer.get_weights()
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = weights
            found[layer.name] = _batch_norm(gamma, beta, mean, variance, layer.epsilon)
        elif weights:
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            found[layer.name] = _channels_last(weights[0], depthwise) | dict(zip(["bias"], weights[1:], strict=False))
    return found


def of_torch(model: Any) -> Layers:
    import torch

    found: Layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            own = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            found[name] = _batch_norm(*(tensor.detach().numpy().copy() for tensor in own), layer.eps)
        elif isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            found[name] = {"kernel": layer.weight.detach().numpy()}
            found[name] |= {} if layer.bias is None else {"bias": layer.bias.detach().numpy()}
    return found


def of_nnx(model: Any) -> Layers:
    from flax import nnx

    found: Layers = {}
    for path, layer in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(layer, nnx.BatchNorm):
            found[name] = _batch_norm(layer.scale, layer.bias, layer.mean, layer.var, layer.epsilon)
        elif isinstance(layer, nnx.Conv | nnx.Linear):
            found[name] = _channels_last(layer.kernel) | ({} if layer.bias is None else {"bias": layer.bias})
    return found


def of_linen(variables: Any, epsilon: float) -> Layers:
    found: Layers = {}

    def walk(path: tuple[str, ...], params: Any, stats: Any) -> None:
        name = "/".join(path)
        if "scale" in params:
            found[name] = _batch_norm(params["scale"], params["bias"], stats["mean"], stats["var"], epsilon)
        elif "kernel" in params:
            found[name] = _channels_last(params["kernel"]) | {k: v for k, v in params.items() if k == "bias"}
        else:
            for key, inner in params.items():
                walk((*path, key), inner, stats.get(key, {}))

    walk((), variables["params"], variables["batch_stats"])
    return found


def of_equinox(model: Any, state: Any) -> Layers:
    import equinox as eqx
    import jax

    kinds = (eqx.nn.BatchNorm, eqx.nn.Conv2d, eqx.nn.Linear)
    found: Layers = {}
    for path, layer in jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda leaf: isinstance(leaf, kinds)):
        name = jax.tree_util.keystr(path).lstrip(".")
        if isinstance(layer, eqx.nn.BatchNorm):
            debiased = 1 - layer.momentum ** int(state.get(layer.batch_counter))
            mean, variance = (np.asarray(hidden) / debiased for hidden in state.get(layer.batch_state_index))
            found[name] = _batch_norm(layer.weight, layer.bias, mean, variance, layer.eps)
        elif isinstance(layer, kinds):
            found[name] = {"kernel": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
    return found


def of_tf1(variables: Mapping[str, np.ndarray], epsilon: float) -> Layers:
    found: Layers = {}
    for name, value in variables.items():
        scope, last = name.rsplit("/", 1)
        if last == "gamma":
            beta, mean, variance = (variables[f"{scope}/{word}"] for word in ("beta", "moving_mean", "moving_variance"))
            found[scope] = _batch_norm(value, beta, mean, variance, epsilon)
        elif last in ("weights", "depthwise_weights"):
            found[scope] = _channels_last(value, depthwise=last != "weights")
            if f"{scope}/biases" in variables:
                found[scope] = {"kernel": value[0, 0].T, "bias": variables[f"{scope}/biases"]}
    return found


def absorbed(layers: Layers, pairs: Sequence[Pair]) -> Layers:
    """Without the biases of convolutions, which the mean of the batch norm right behind each takes up."""
    after = {conv.source: norm.source for conv, norm in pairwise(pairs) if conv.kind == "conv"}
    without = {name: dict(layer) for name, layer in layers.items()}
    for conv, norm in after.items():
        without[norm]["mean"] = without[norm]["mean"] - without[conv].pop("bias")
    return without


def into_torch(model: Any, layers: Layers, pairs: Sequence[Pair]) -> Any:
    """The torch model with the pairs' layers in it; every tensor of theirs, and every tensor of its own, is used."""
    import torch

    words = {"weight": ("kernel", "gamma"), "bias": ("bias", "beta"), "running_mean": ("mean",),
             "running_var": ("variance",), "num_batches_tracked": ()}  # fmt: skip
    target = dict(model.named_modules())
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    with torch.no_grad():
        for pair in pairs:
            values, layer = dict(layers.pop(pair.source)), target[pair.target]
            if "epsilon" in values:
                layer.eps = values.pop("epsilon")
            for own, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                names.remove(f"{pair.target}.{own}")
                for word in words[own]:
                    if word in values:
                        value = torch.from_numpy(np.array(values.pop(word)))
                        assert value.shape == tensor.shape
                        tensor.copy_(value)
            assert not values, f"{pair.target} has no place for {[*values]} of {pair.source}"
    assert not names, f"nothing was put into {names}"
    assert not layers, f"nothing was done with {[*layers]}"
    return model


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference over the largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _batch_norm(gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float) -> dict[str, Any]:
    return {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance, "epsilon": epsilon}


def _channels_last(kernel: Any, depthwise: bool = False) -> dict[str, Any]:
    kernel = np.asarray(kernel)
    if kernel.ndim == 2:
        return {"kernel": kernel.T}
    if depthwise:
        height, width, channels, multiplier = kernel.shape
        return {"kernel": kernel.transpose(2, 3, 0, 1).reshape(channels * multiplier, 1, height, width)}
    return {"kernel": kernel.transpose(3, 2, 0, 1)}
