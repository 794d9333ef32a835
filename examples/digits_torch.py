"""Handwritten digits in PyTorch: a dense and a convolutional network with bnlayer's batch norm.

    python examples/digits_torch.py

`bnlayer_torch.BatchNorm1d` and `BatchNorm2d` take torch's arguments and defaults: momentum 0.1 is the weight on the NEW
statistics, and what enters the moving variance is unbiased. digits_keras.py, digits_jax.py and digits_tf1.py train the
same networks; from the same start they come to the same numbers.
"""

from __future__ import annotations

import digits
import numpy as np
import torch
from torch import nn

from bnlayer_torch import BatchNorm1d, BatchNorm2d


def dense() -> nn.Sequential:
    """64 pixels, two hidden layers of 64; no biases before a batch norm, which would take them out again."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64, bias=False),
        BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def convolutional() -> nn.Sequential:
    """Two convolutions, and the mean over the 4x4 pixels that they leave."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False),
        BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False),
        BatchNorm2d(32),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@torch.no_grad()
def start(model: nn.Sequential, kernels: list[np.ndarray]) -> None:
    """Put the examples' first kernels in; torch wants the outputs first."""
    layers = [layer for layer in model if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer, kernel in zip(layers, kernels, strict=True):
        layer.weight.copy_(torch.from_numpy(np.moveaxis(kernel, [-1, -2], [0, 1])))
    layers[-1].bias.zero_()


def tensor(pictures: np.ndarray) -> torch.Tensor:
    """(N, 8, 8, 1) as torch's (N, 1, 8, 8)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def train(model: nn.Sequential, data: digits.Digits) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.SGD(model.parameters(), digits.RATE, momentum=digits.MOMENTUM)
    losses = []
    model.train()
    for x, y in digits.batches(data):
        loss = nn.functional.cross_entropy(model(tensor(x)), torch.from_numpy(y).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train both networks and print what they learned."""
    data = digits.load()
    torch.set_num_threads(1)  # the networks are too small to share out
    for name, model, shapes in (
        ("dense", dense(), digits.DENSE),
        ("convolutional", convolutional(), digits.CONVOLUTIONAL),
    ):
        start(model, digits.first_kernels(shapes))
        losses = train(model, data)
        model.eval()
        with torch.no_grad():
            digits.report(name, losses, data, lambda x, model=model: model(tensor(x)).numpy())


if __name__ == "__main__":
    main()
