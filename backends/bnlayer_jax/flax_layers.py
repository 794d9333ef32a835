"""What Flax's layers are to a checkpoint, by their classes. Linen and NNX name them and their tensors alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import jax

from bnlayer.checkpoint import Layer
from bnlayer.errors import UnsupportedError

from .hosts import channel_axis

_KERNEL: Final = {"kernel": "kernel", "bias": "bias"}
_NORM: Final = {"scale": "gamma", "bias": "beta"}
_BATCH_NORM: Final = {**_NORM, "mean": "moving_mean", "var": "moving_variance"}


def flax_layer(name: str, layer: Any, classes: Any, tensors: Mapping[str, str], shapes: Mapping[str, Any]) -> Layer:
    """The layer as a checkpoint tells of it.

    Args:
        name: the layer's.
        layer: the module.
        classes: `flax.linen` or `flax.nnx`.
        tensors: the variables that it holds itself, by their own names, to the tensors' names.
        shapes: of these variables, by their own names.
    """
    dialect: dict[str, Any] = {"dialect": "flax"}
    if isinstance(layer, classes.BatchNorm):
        return _batch_norm(name, layer, classes, tensors)
    rank = len(shapes.get("kernel", ()))
    dense = classes.Dense if hasattr(classes, "Dense") else classes.Linear
    kind, words, settings = type(layer).__name__, {leaf: leaf for leaf in tensors}, dialect
    if isinstance(layer, (classes.Conv, classes.ConvTranspose)):
        size = layer.kernel_size
        usual = rank == (1 if isinstance(size, int) else len(size)) + 2  # not several layers, stacked
        if usual and isinstance(layer, classes.Conv):
            kind, words, settings = "conv", _KERNEL, {**dialect, "groups": layer.feature_group_count}
        elif usual:
            kind, words = "conv transpose", _KERNEL
            settings = {**dialect, "transpose_kernel": bool(layer.transpose_kernel)}
    elif isinstance(layer, dense) and rank == 2:
        kind, words = "dense", _KERNEL
    elif isinstance(layer, classes.Embed) and len(shapes.get("embedding", ())) == 2:
        kind, words = "embedding", {"embedding": "kernel"}
    elif isinstance(layer, (classes.LayerNorm, classes.GroupNorm, classes.RMSNorm)):
        kind, words = "norm", _NORM
    if not tensors.keys() <= words.keys():  # a subclass with more than its base has
        kind, words, settings = type(layer).__name__, {leaf: leaf for leaf in tensors}, dialect
    return Layer(name, kind, {words[leaf]: tensor for leaf, tensor in tensors.items()}, settings)


def _batch_norm(name: str, layer: Any, classes: Any, tensors: Mapping[str, str]) -> Layer:
    from .hosts import OPTIONS

    roles = {_BATCH_NORM.get(leaf, leaf): tensor for leaf, tensor in tensors.items()}
    own = type(layer) is classes.BatchNorm or all(hasattr(layer, option) for option in OPTIONS)
    settings: dict[str, Any] = {"dialect": "flax", "epsilon": layer.epsilon, "momentum": layer.momentum}
    try:
        settings["axis"] = channel_axis(layer.axis)
    except UnsupportedError:
        own = False
    return Layer(name, "flax.BatchNorm" if own else type(layer).__qualname__, roles, settings)


def is_array(value: Any) -> bool:
    """Whether a leaf is what a file holds: no key of random numbers."""
    return (
        hasattr(value, "shape")
        and hasattr(value, "dtype")
        and not jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
    )
