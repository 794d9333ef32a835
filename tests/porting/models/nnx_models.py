"""ResNet-18 in flax.nnx."""

from __future__ import annotations

from typing import Any

from flax import nnx

from . import randomize

PAD_1 = ((1, 1), (1, 1))
PAD_3 = ((3, 3), (3, 3))


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)


class BasicBlock(nnx.Module):
    def __init__(self, inputs: int, features: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(inputs, features, (3, 3), strides=stride, padding=PAD_1, use_bias=False, rngs=rngs)
        self.bn1 = batch_norm(features, rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), padding=PAD_1, use_bias=False, rngs=rngs)
        self.bn2 = batch_norm(features, rngs)
        if stride != 1 or inputs != features:
            self.shortcut = nnx.Sequential(
                nnx.Conv(inputs, features, (1, 1), strides=stride, padding="VALID", use_bias=False, rngs=rngs),
                batch_norm(features, rngs),
            )
        else:
            self.shortcut = None

    def __call__(self, x: Any) -> Any:
        residual = x if self.shortcut is None else self.shortcut(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return nnx.relu(x + residual)


class ResNet18(nnx.Module):
    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs) -> None:
        def stage(inputs: int, features: int, stride: int) -> nnx.Sequential:
            first = BasicBlock(inputs, features, stride, rngs=rngs)
            return nnx.Sequential(first, BasicBlock(features, features, 1, rngs=rngs))

        self.conv1 = nnx.Conv(3, width, (7, 7), strides=2, padding=PAD_3, use_bias=False, rngs=rngs)
        self.bn1 = batch_norm(width, rngs)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.layer4 = stage(4 * width, 8 * width, 2)
        self.fc = nnx.Linear(8 * width, classes, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=PAD_1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(axis=(1, 2)))


def resnet18(width: int = 64, classes: int = 10, seed: int = 0) -> ResNet18:
    model = ResNet18(width, classes, rngs=nnx.Rngs(seed))
    model.eval()
    return randomize.nnx_model(model, seed)
