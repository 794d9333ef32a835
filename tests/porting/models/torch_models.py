"""transformers' ResNet and MobileNetV2, built from their configs: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from . import randomize


def resnet50(classes: int = 10, seed: int = 0) -> torch.nn.Module:
    """With the stride on a block's first convolution, where `keras.applications` has it."""
    config = ResNetConfig(downsample_in_bottleneck=True, num_labels=classes)
    return randomize.torch_model(ResNetForImageClassification(config), seed).eval()


def resnet18(width: int = 64, classes: int = 10, seed: int = 0) -> torch.nn.Module:
    """Basic blocks; a width below 64 is a thinner one."""
    config = ResNetConfig(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        num_labels=classes,
    )
    return randomize.torch_model(ResNetForImageClassification(config), seed).eval()


def mobilenet_v2(classes: int = 10, seed: int = 0) -> torch.nn.Module:
    """Padded as TensorFlow pads, without the dropout that `keras.applications` has not."""
    config = MobileNetV2Config(
        depth_multiplier=1.0, tf_padding=True, layer_norm_eps=1e-3, classifier_dropout_prob=0.0, num_labels=classes
    )
    return randomize.torch_model(MobileNetV2ForImageClassification(config), seed).eval()
