"""`keras.applications`' ResNet50 and MobileNetV2, with logits for outputs: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import keras

from . import randomize


def resnet50(size: int | None = None, classes: int = 10, seed: int = 0) -> Any:
    """For images of any size, or of one."""
    model = keras.applications.ResNet50(
        weights=None, input_shape=(size, size, 3), classes=classes, classifier_activation=None
    )
    return randomize.keras_model(model, seed)


def mobilenet_v2(size: int | None = 65, classes: int = 10, seed: int = 0) -> Any:
    """For images of one size: built for any, it pads before strides as if every layer's input were even."""
    model = keras.applications.MobileNetV2(
        weights=None, input_shape=(size, size, 3), classes=classes, classifier_activation=None
    )
    return randomize.keras_model(model, seed)
