"""A bias before batch norm does nothing: the same network with and without one, on the handwritten digits, in PyTorch.

    python examples/conv_bias.py

Batch norm subtracts the batch's mean, and with it any constant that was added before. So in training y does not depend
on the bias, the bias has gradient 0 and stays where it started, and everything else learns as it would without. Only
the moving mean knows of it: it is higher by bias (1 - decay^t), which in eval takes the bias out again but for the part
decay^t that is left of the average's start at 0. Leave the bias out: `bias=False`; the batch norm's beta is the bias.

In float64, so that what is 0 looks it.
"""

from __future__ import annotations

import digits
import numpy as np
import torch
from torch import nn

from bnlayer_torch import BatchNorm2d

CHANNELS, STEPS = 16, 100


def network(bias: np.ndarray | None) -> nn.Sequential:
    """A convolution with this bias, a batch norm, and a layer on all pixels; float64."""
    model = nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, bias=bias is not None),
        BatchNorm2d(CHANNELS),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(CHANNELS * 36, 10),
    ).double()
    kernel, last = digits.first_kernels(((3, 3, 1, CHANNELS), (CHANNELS * 36, 10)))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
        model[-1].weight.copy_(torch.from_numpy(last.T))
        model[-1].bias.zero_()
        if bias is not None:
            model[0].bias.copy_(torch.from_numpy(bias))
    return model


def tensor(pictures: np.ndarray) -> torch.Tensor:
    """(N, 8, 8, 1) as torch's (N, 1, 8, 8), float64."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).double()


def step(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: np.ndarray, y: np.ndarray) -> torch.Tensor:
    """One step of training; the logits. The gradients stay in the parameters."""
    model.train()
    logits = model(tensor(x))
    optimizer.zero_grad()
    nn.functional.cross_entropy(logits, torch.from_numpy(y).long()).backward()
    optimizer.step()
    return logits


@torch.no_grad()
def eval_logits(model: nn.Sequential, data: digits.Digits) -> torch.Tensor:
    """Logits of the held-out pictures, by the moving averages."""
    return model.eval()(tensor(data.eval_x))


@torch.no_grad()
def differences(
    plain: nn.Sequential, biased: nn.Sequential, logits: tuple[torch.Tensor, torch.Tensor], data: digits.Digits, t: int
) -> dict[str, float]:
    """The largest difference in everything that the two networks share, and what is particular to the bias."""

    def apart(first: torch.Tensor, second: torch.Tensor) -> float:
        return (first - second).abs().max().item()

    others = {name: parameter for name, parameter in biased.named_parameters() if name != "0.bias"}
    bias, norm = biased[0].bias, biased[1]
    left = norm.spec.decay**t  # of the average's start at 0
    return {
        "logits in training": apart(*logits),
        "gradients of all other parameters": max(
            apart(parameter.grad, others[name].grad) for name, parameter in plain.named_parameters()
        ),
        "gradient of the bias": bias.grad.abs().max().item(),
        "moving mean": apart(norm.running_mean, plain[1].running_mean),
        "moving mean, less bias (1 - decay^t)": apart(norm.running_mean - bias * (1 - left), plain[1].running_mean),
        "moving variance": apart(norm.running_var, plain[1].running_var),
        "logits in eval": apart(eval_logits(biased, data), eval_logits(plain, data)),
    }


def main() -> None:
    """Train both, and print how far apart they are after the first step and after the last."""
    torch.set_num_threads(1)  # the network is too small to share out
    data = digits.load()
    models = [network(None), network(np.random.default_rng(1).normal(size=CHANNELS))]
    optimizers = [torch.optim.SGD(model.parameters(), digits.RATE, momentum=digits.MOMENTUM) for model in models]
    columns = []
    for t, (x, y) in zip(range(1, STEPS + 1), digits.batches(data), strict=False):
        logits = [step(model, optimizer, x, y) for model, optimizer in zip(models, optimizers, strict=True)]
        if t in (1, STEPS):
            columns.append(differences(*models, tuple(logits), data, t))
    print(f"{'largest difference':38} {'step 1':>9} {f'step {STEPS}':>9}")
    for name in columns[0]:
        print(f"{name:38} " + " ".join(f"{column[name]:9.1e}" for column in columns))
    for name, model in zip(("without the bias", "with the bias"), models, strict=True):
        print(f"{name:16}  eval accuracy {digits.accuracy(eval_logits(model, data).numpy(), data.eval_y):.3f}")


if __name__ == "__main__":
    main()
