"""ResNet-18 in equinox, for one image, channels first."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

from . import randomize


def batch_norm(features: int) -> eqx.nn.BatchNorm:
    return eqx.nn.BatchNorm(features, axis_name="batch", eps=1e-5, momentum=0.9, mode="batch")


class BasicBlock(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    bn2: eqx.nn.BatchNorm
    downsample: list[Any]

    def __init__(self, inputs: int, features: int, stride: int, *, key: Any) -> None:
        keys = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(inputs, features, 3, stride, padding=1, use_bias=False, key=keys[0])
        self.bn1 = batch_norm(features)
        self.conv2 = eqx.nn.Conv2d(features, features, 3, padding=1, use_bias=False, key=keys[1])
        self.bn2 = batch_norm(features)
        self.downsample = []
        if stride != 1 or inputs != features:
            self.downsample = [
                eqx.nn.Conv2d(inputs, features, 1, stride, use_bias=False, key=keys[2]),
                batch_norm(features),
            ]

    def __call__(self, x: Any, state: eqx.nn.State) -> tuple[Any, eqx.nn.State]:
        y, state = self.bn1(self.conv1(x), state)
        y, state = self.bn2(self.conv2(jax.nn.relu(y)), state)
        if self.downsample:
            conv, norm = self.downsample
            x, state = norm(conv(x), state)
        return jax.nn.relu(x + y), state


class ResNet18(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    maxpool: eqx.nn.MaxPool2d
    layer1: list[BasicBlock]
    layer2: list[BasicBlock]
    layer3: list[BasicBlock]
    layer4: list[BasicBlock]
    fc: eqx.nn.Linear

    def __init__(self, width: int, classes: int, *, key: Any) -> None:
        keys = iter(jax.random.split(key, 10))

        def stage(inputs: int, features: int, stride: int) -> list[BasicBlock]:
            first = BasicBlock(inputs, features, stride, key=next(keys))
            return [first, BasicBlock(features, features, 1, key=next(keys))]

        self.conv1 = eqx.nn.Conv2d(3, width, 7, 2, padding=3, use_bias=False, key=next(keys))
        self.bn1 = batch_norm(width)
        self.maxpool = eqx.nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.layer4 = stage(4 * width, 8 * width, 2)
        self.fc = eqx.nn.Linear(8 * width, classes, key=next(keys))

    def __call__(self, x: Any, state: eqx.nn.State) -> tuple[Any, eqx.nn.State]:
        x, state = self.bn1(self.conv1(x), state)
        x = self.maxpool(jax.nn.relu(x))
        for block in [*self.layer1, *self.layer2, *self.layer3, *self.layer4]:
            x, state = block(x, state)
        return self.fc(x.mean(axis=(1, 2))), state


def resnet18(
    width: int = 64, classes: int = 10, seed: int = 0, updates: int = randomize.UPDATES
) -> tuple[ResNet18, eqx.nn.State]:
    """The module and its state, after so many updates of its averages."""
    model, state = eqx.nn.make_with_state(ResNet18)(width, classes, key=jax.random.key(seed))
    return randomize.equinox_model(model, state, seed, updates)
