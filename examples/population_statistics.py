"""What to normalize with after training: the moving averages, or the paper's population statistics; in PyTorch.

    python examples/population_statistics.py

Ioffe & Szegedy (2015), algorithm 2, fix the weights first, then take for every channel the mean over training batches
of the batch's mean and of its unbiased variance. That is a batch norm of decay "cumulative" (torch's momentum None) and
of the unbiased estimator, run in training mode over one epoch without an optimizer. A moving average needs no such
epoch; what it pays is that its statistics belong to the weights of earlier steps, and where it decays slowly still to
the layer's start at mean 0 and variance 1.
"""

from __future__ import annotations

import copy

import digits
import numpy as np
import torch
from digits_torch import dense, start, tensor, train
from torch import nn

from bnlayer_torch import BatchNorm1d

MOMENTA = (0.1, 0.01, 0.001)  # torch's: decay 0.9, 0.99 and 0.999, the default of tf.contrib's layer


def batch_norms(model: nn.Module) -> list[BatchNorm1d]:
    """The model's batch norms, in order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm1d)]


@torch.no_grad()
def with_population_statistics(model: nn.Sequential, data: digits.Digits) -> nn.Sequential:
    """A copy of the model whose batch norms hold the paper's statistics."""
    model = copy.deepcopy(model).train()
    for norm in batch_norms(model):
        norm.reset_running_stats()
        norm.momentum = None
    for x, _ in digits.batches(data, epochs=1, seed=1):
        model(tensor(x))
    return model


@torch.no_grad()
def by_the_book(model: nn.Sequential, data: digits.Digits) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same statistics from the paper's formulas, with torch's own mean and variance."""
    inputs: list[list[torch.Tensor]] = [[] for _ in batch_norms(model)]
    copied = copy.deepcopy(model).train()
    for seen, norm in zip(inputs, batch_norms(copied), strict=True):
        norm.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0].double()))
    for x, _ in digits.batches(data, epochs=1, seed=1):
        copied(tensor(x))
    return [
        (torch.stack([h.mean(0) for h in seen]).mean(0), torch.stack([h.var(0, correction=1) for h in seen]).mean(0))
        for seen in inputs
    ]


def distance(model: nn.Sequential, population: nn.Sequential) -> tuple[float, float]:
    """How far the moving statistics are from the population's, on average over the channels: means in the population's
    standard deviations, variances relative to its own."""
    pairs = list(zip(batch_norms(model), batch_norms(population), strict=True))
    means = [((a.running_mean - b.running_mean).abs() / b.running_var.sqrt()).mean().item() for a, b in pairs]
    variances = [(a.running_var / b.running_var - 1).abs().mean().item() for a, b in pairs]
    return float(np.mean(means)), float(np.mean(variances))


@torch.no_grad()
def eval_accuracy(model: nn.Sequential, data: digits.Digits) -> float:
    """Accuracy on the held-out pictures, by the statistics that the model holds."""
    return digits.accuracy(model.eval()(tensor(data.eval_x)).numpy(), data.eval_y)


def main() -> None:
    """Train once a momentum, which changes the averages alone, and compare them with the population statistics."""
    torch.set_num_threads(1)  # the network is too small to share out
    data = digits.load()
    print(f"{'statistics':24} eval accuracy   mean off by (in sd)   variance off by")
    for momentum in MOMENTA:
        model = dense()
        start(model, digits.first_kernels(digits.DENSE))
        for norm in batch_norms(model):
            norm.momentum = momentum
        train(model, data)
        population = with_population_statistics(model, data)
        means, variances = distance(model, population)
        accuracy = eval_accuracy(model, data)
        print(f"{f'moving, decay {1 - momentum:g}':24} {accuracy:13.3f} {means:21.3f} {variances:17.3f}")
    print(f"{'population':24} {eval_accuracy(population, data):13.3f}")

    expected = by_the_book(model, data)
    error = max(
        float(((got - want).abs() / norm.running_var).max())
        for norm, (mean, variance) in zip(batch_norms(population), expected, strict=True)
        for got, want in ((norm.running_mean, mean), (norm.running_var, variance))
    )
    print(f"The population statistics are the paper's formulas to {error:.0e}.")


if __name__ == "__main__":
    main()
