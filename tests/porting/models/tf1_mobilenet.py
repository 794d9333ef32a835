"""MobileNetV2's variables under the names that TensorFlow 1's slim gives them, as a Saver writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnlayer.checkpoint import Checkpoint, Tensor

from .randomize import Draw

AVERAGE = "/ExponentialMovingAverage"  # the twin of a variable that is trained
BATCH_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
# Channels out, stride apart: MobileNetV2 1.0's bottlenecks after the first.
BOTTLENECKS = (24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)


def layers() -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Scope, the kernel's name in it, and the kernel's shape, of each convolution that a batch norm follows."""
    yield "MobilenetV2/Conv", "weights", (3, 3, 3, 32)
    yield "MobilenetV2/expanded_conv/depthwise", "depthwise_weights", (3, 3, 32, 1)
    yield "MobilenetV2/expanded_conv/project", "weights", (1, 1, 32, 16)
    inputs = 16
    for number, outputs in enumerate(BOTTLENECKS, 1):
        scope = f"MobilenetV2/expanded_conv_{number}"
        yield f"{scope}/expand", "weights", (1, 1, inputs, 6 * inputs)
        yield f"{scope}/depthwise", "depthwise_weights", (3, 3, 6 * inputs, 1)
        yield f"{scope}/project", "weights", (1, 1, 6 * inputs, outputs)
        inputs = outputs
    yield "MobilenetV2/Conv_1", "weights", (1, 1, 320, 1280)


def variables(classes: int = 10, seed: int = 0) -> dict[str, np.ndarray]:
    """Variables without their twins."""
    draw, values = Draw(seed), {}
    for scope, kernel, shape in layers():
        height, width, inputs, last = shape
        depthwise = kernel == "depthwise_weights"
        values[f"{scope}/{kernel}"] = draw.kernel(shape, height * width * (1 if depthwise else inputs))
        for name, value in zip(BATCH_NORM, draw.batch_norm(inputs * last if depthwise else last), strict=True):
            values[f"{scope}/BatchNorm/{name}"] = value
    values["MobilenetV2/Logits/Conv2d_1c_1x1/weights"] = draw.kernel((1, 1, 1280, classes), 1280)
    values["MobilenetV2/Logits/Conv2d_1c_1x1/biases"] = draw.bias((classes,))
    return values


def checkpoint(classes: int = 10, seed: int = 0) -> Checkpoint:
    """Variables, twins of other values for those that are trained, and the step; sorted, as a Saver sorts them."""
    values = variables(classes, seed)
    twins = variables(classes, seed + 1)
    trained = [name for name in values if "moving_" not in name]
    values |= {name + AVERAGE: twins[name] for name in trained}
    values["global_step"] = np.array(1234, np.int64)
    tensors = {name: Tensor.of(values[name]) for name in sorted(values)}
    return Checkpoint("tensorflow checkpoint", tensors, order_is_meaningful=False)


def into_keras(model: Any, values: Mapping[str, np.ndarray]) -> Any:
    """`keras.applications`' model, which TensorFlow 1's is but for a few names, with these variables; by hand."""
    for scope, kernel, _ in layers():
        name = scope.removeprefix("MobilenetV2/").replace("/", "_").replace("expanded_conv_", "block_")
        name = {"block_depthwise": "expanded_conv_depthwise", "block_project": "expanded_conv_project"}.get(name, name)
        conv, norm = {"Conv": ("Conv1", "bn_Conv1"), "Conv_1": ("Conv_1", "Conv_1_bn")}.get(name, (name, f"{name}_BN"))
        model.get_layer(conv).set_weights([values[f"{scope}/{kernel}"]])
        model.get_layer(norm).set_weights([values[f"{scope}/BatchNorm/{word}"] for word in BATCH_NORM])
    head = "MobilenetV2/Logits/Conv2d_1c_1x1"
    model.get_layer("predictions").set_weights([values[f"{head}/weights"][0, 0], values[f"{head}/biases"]])
    return model


def write(prefix: Path, classes: int = 10, seed: int = 0) -> Path:
    """Write it under a name such as `mobilenet.ckpt`, before `.index`; the name."""
    checkpoint(classes, seed).save(prefix, "tensorflow")
    return prefix
