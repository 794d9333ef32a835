"""ResNet-18 in flax.linen, most of its layers named by Linen."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from . import randomize

PAD_1 = ((1, 1), (1, 1))
PAD_3 = ((3, 3), (3, 3))


class BasicBlock(nn.Module):
    features: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        residual = x
        y = nn.Conv(self.features, (3, 3), self.stride, padding=PAD_1, use_bias=False)(x)
        y = nn.relu(self.norm()(y))
        y = nn.Conv(self.features, (3, 3), padding=PAD_1, use_bias=False)(y)
        y = self.norm()(y)
        if residual.shape != y.shape:
            residual = nn.Conv(self.features, (1, 1), self.stride, padding="VALID", use_bias=False, name="conv_proj")(
                residual
            )
            residual = self.norm(name="norm_proj")(residual)
        return nn.relu(y + residual)


class ResNet18(nn.Module):
    width: int
    classes: int

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = nn.Conv(self.width, (7, 7), 2, padding=PAD_3, use_bias=False, name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=PAD_1)
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(self.width * 2**stage, stride, norm)(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


def resnet18(width: int = 64, classes: int = 10, seed: int = 0) -> tuple[ResNet18, Any, np.ndarray]:
    """The module, its variables, and an array that it can be called with."""
    module = ResNet18(width, classes)
    inputs = np.zeros((1, 65, 65, 3), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return module, randomize.linen_variables(variables, seed), inputs
