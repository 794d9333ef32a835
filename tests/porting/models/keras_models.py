"""`keras.applications`' ResNet50 and MobileNetV2, with logits for outputs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from . import randomize


def resnet50(size: int | None = 65, classes: int = 10, seed: int = 0) -> Any:
    """For images of one size, or with None of any."""
    return randomize.keras_model(_with_head(keras.applications.ResNet50, size, classes), seed)


def mobilenet_v2(size: int | None = 65, classes: int = 10, seed: int = 0) -> Any:
    """For images of one size; built for any, it pads before strides as if every layer's input were even."""
    return randomize.keras_model(_with_head(keras.applications.MobileNetV2, size, classes), seed)


def _with_head(application: Callable[..., Any], size: int | None, classes: int) -> Any:
    options = {"weights": None, "input_shape": (size, size, 3)}
    if size is not None:
        return application(classes=classes, classifier_activation=None, **options)
    backbone = application(include_top=False, pooling="avg", **options)
    return keras.Model(backbone.input, keras.layers.Dense(classes, name="predictions")(backbone.output))
