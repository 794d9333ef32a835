"""What a functional model's graph tells of a layer's input."""

from __future__ import annotations

from typing import Any, Final

from . import runtime

# Layers that change values one by one, so that the order of a flattened map goes through them.
_ELEMENTWISE: Final = ("Activation", "AlphaDropout", "Dropout", "ELU", "GaussianDropout", "GaussianNoise", "Identity",
                       "LeakyReLU", "ReLU")  # fmt: skip


def flattened_from(layer: Any) -> list[int] | None:
    """The shape [channels, *spatial] of the feature map that a layer's input was flattened from.

    None where there is no such map, where its size is not known, or where the layer's calls differ in it.
    """
    found = [_flattened(node.input_tensors) for node in layer._inbound_nodes]
    return found[0] if found and all(each == found[0] for each in found) else None


def _flattened(tensors: Any) -> list[int] | None:
    layers = runtime.load_keras().layers
    plain = tuple(getattr(layers, name) for name in _ELEMENTWISE if hasattr(layers, name))
    while len(tensors) == 1:
        operation, index, _ = getattr(tensors[0], "_keras_history", (None, 0, 0))
        if operation is None:
            return None
        if isinstance(operation, layers.Flatten):
            shape = list(operation._inbound_nodes[index].input_tensors[0].shape[1:])
            if len(shape) < 2 or any(size is None for size in shape):
                return None
            # Keras flattens the channels last either way.
            return shape if operation.data_format == "channels_first" else [shape[-1], *shape[:-1]]
        if not isinstance(operation, plain):
            return None
        tensors = operation._inbound_nodes[index].input_tensors
    return None
