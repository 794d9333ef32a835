"""The true pairs of layers of the real models, written out model by model.

A name is where the layer is in its framework's own words: `layer.name` of Keras, `named_modules` of torch, a path of
attributes in nnx ("layer1.layers.0.conv1") and equinox ("layer1[0].conv1"), of scopes in linen ("BasicBlock_0/Conv_0")
and in TensorFlow 1, where a convolution's name is its scope and its batch norm's ends in "/BatchNorm".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["conv", "depthwise", "batch norm", "dense"]


class Pair(NamedTuple):
    """A layer of the source, and the one of transformers' torch model that it becomes."""

    kind: Kind
    source: str
    target: str


def _conv_and_norm(kind: Kind, conv: str, norm: str, target: str) -> Iterator[Pair]:
    yield Pair(kind, conv, f"{target}.convolution")
    yield Pair("batch norm", norm, f"{target}.normalization")


def keras_resnet50() -> list[Pair]:
    """`keras.applications.ResNet50`: conv2 to conv5 are stages 0 to 3, blocks from 1, `_0_` the projection."""
    pairs = [*_conv_and_norm("conv", "conv1_conv", "conv1_bn", "resnet.embedder.embedder")]
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            name = f"conv{stage + 2}_block{block + 1}"
            target = f"resnet.encoder.stages.{stage}.layers.{block}"
            if block == 0:
                pairs += _conv_and_norm("conv", f"{name}_0_conv", f"{name}_0_bn", f"{target}.shortcut")
            for number in (1, 2, 3):
                layer = f"{target}.layer.{number - 1}"
                pairs += _conv_and_norm("conv", f"{name}_{number}_conv", f"{name}_{number}_bn", layer)
    return [*pairs, Pair("dense", "predictions", "classifier.1")]


# What a bottleneck's layers are called: ours for the role, and transformers'.
_ROLES: tuple[tuple[str, Kind, str], ...] = (
    ("expand", "conv", "expand_1x1"),
    ("depthwise", "depthwise", "conv_3x3"),
    ("project", "conv", "reduce_1x1"),
)


def keras_mobilenet_v2() -> list[Pair]:
    """`keras.applications.MobileNetV2`: its first bottleneck is the stem's end in transformers, block 1 is layer 0."""
    stem = "mobilenet_v2.conv_stem"
    pairs = [*_conv_and_norm("conv", "Conv1", "bn_Conv1", f"{stem}.first_conv")]
    for role, kind, name in _ROLES[1:]:
        own = f"expanded_conv_{role}"
        pairs += _conv_and_norm(kind, own, f"{own}_BN", f"{stem}.{name}")
    for block in range(1, 17):
        for role, kind, name in _ROLES:
            own = f"block_{block}_{role}"
            pairs += _conv_and_norm(kind, own, f"{own}_BN", f"mobilenet_v2.layer.{block - 1}.{name}")
    pairs += _conv_and_norm("conv", "Conv_1", "Conv_1_bn", "mobilenet_v2.conv_1x1")
    return [*pairs, Pair("dense", "predictions", "classifier")]


def tf1_mobilenet_v2() -> list[Pair]:
    """slim's MobileNetV2: bottlenecks as in Keras, and a 1 x 1 convolution where torch has a dense layer."""
    root, stem = "MobilenetV2", "mobilenet_v2.conv_stem"
    pairs = [*_conv_and_norm("conv", f"{root}/Conv", f"{root}/Conv/BatchNorm", f"{stem}.first_conv")]
    for role, kind, name in _ROLES[1:]:
        own = f"{root}/expanded_conv/{role}"
        pairs += _conv_and_norm(kind, own, f"{own}/BatchNorm", f"{stem}.{name}")
    for block in range(1, 17):
        for role, kind, name in _ROLES:
            own = f"{root}/expanded_conv_{block}/{role}"
            pairs += _conv_and_norm(kind, own, f"{own}/BatchNorm", f"mobilenet_v2.layer.{block - 1}.{name}")
    pairs += _conv_and_norm("conv", f"{root}/Conv_1", f"{root}/Conv_1/BatchNorm", "mobilenet_v2.conv_1x1")
    return [*pairs, Pair("dense", f"{root}/Logits/Conv2d_1c_1x1", "classifier")]


def _resnet18(stem: tuple[str, str], block: str, layers: tuple[tuple[str, str], ...], head: str) -> list[Pair]:
    """Two blocks in each of four stages; the first block of the last three has a projection.

    `block` is a template of the number of the stage and of the block, each from 0, and of the block in the model;
    `layers` names the first and second convolution, the projection, and the batch norm of each.
    """
    pairs = [*_conv_and_norm("conv", *stem, "resnet.embedder.embedder")]
    for stage in range(4):
        for number in range(2):
            own = block.format(stage=stage, stage1=stage + 1, number=number, overall=2 * stage + number)
            target = f"resnet.encoder.stages.{stage}.layers.{number}"
            for (conv, norm), name in zip(layers, ("layer.0", "layer.1", "shortcut"), strict=True):
                if name != "shortcut" or (stage > 0 and number == 0):
                    pairs += _conv_and_norm("conv", own + conv, own + norm, f"{target}.{name}")
    return [*pairs, Pair("dense", head, "classifier.1")]


def nnx_resnet18() -> list[Pair]:
    """`models.nnx_models`."""
    layers = ((".conv1", ".bn1"), (".conv2", ".bn2"), (".shortcut.layers.0", ".shortcut.layers.1"))
    return _resnet18(("conv1", "bn1"), "layer{stage1}.layers.{number}", layers, "fc")


def linen_resnet18() -> list[Pair]:
    """`models.linen_models`."""
    layers = (("/Conv_0", "/BatchNorm_0"), ("/Conv_1", "/BatchNorm_1"), ("/conv_proj", "/norm_proj"))
    return _resnet18(("conv_init", "bn_init"), "BasicBlock_{overall}", layers, "Dense_0")


def equinox_resnet18() -> list[Pair]:
    """`models.equinox_models`."""
    layers = ((".conv1", ".bn1"), (".conv2", ".bn2"), (".downsample[0]", ".downsample[1]"))
    return _resnet18(("conv1", "bn1"), "layer{stage1}[{number}]", layers, "fc")
