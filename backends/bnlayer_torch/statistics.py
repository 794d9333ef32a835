"""Batch statistics in torch's own differentiable operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnlayer.call import CallPlan

from .weights import Weights


@dataclass(frozen=True, eq=False)
class Moments:
    """One batch's mean, biased and unbiased variance: (C,) each, in the arithmetic's dtype."""

    mean: Tensor
    variance: Tensor
    unbiased: Tensor


def batch_moments(x: Tensor, plan: CallPlan, weights: Weights | None) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over all axes but the channel's.

    x has the arithmetic's dtype and at least one element a channel. Right to every order of differentiation.
    """
    shift, c, variance = shifted_moments(x, plan, weights)
    if weights is not None:
        scaled = variance.detach() * weights.bessel
        unbiased = torch.where(weights.bessel > 0, scaled, 0.0)  # not 0 times what may not be finite
    elif plan.count == 1:
        unbiased = torch.zeros_like(variance)
    else:
        assert plan.count is not None
        unbiased = variance.detach() * (plan.count / (plan.count - 1))
    return Moments(shift + c, variance, unbiased.to(variance.dtype))


def shifted_moments(x: Tensor, plan: CallPlan, weights: Weights | None) -> tuple[Tensor, Tensor, Tensor]:
    """A constant close to the mean, the mean of x minus that, and the variance: (C,) each; arguments as above."""

    def mean(values: Tensor) -> Tensor:
        if weights is None:
            return values.mean(plan.reduced, keepdim=True)
        return (values * weights.proportions).sum(plan.reduced, keepdim=True)

    # The result does not depend on the shift, so no gradient flows through it. Deviations from it are small: their
    # mean c is accurate where the shift is off by its rounding, and a constant channel gets no variance from that.
    counted = x.detach() if weights is None else torch.where(weights.positive, x.detach(), 0.0)
    shift = mean(counted).detach()
    deviation = x - shift
    if weights is not None:
        deviation = torch.where(entering(deviation, weights), deviation, 0.0)
    c = mean(deviation)
    variance = mean(torch.square(deviation - c))
    return shift.reshape(-1), c.reshape(-1), variance.reshape(-1)


def entering(deviation: Tensor, weights: Weights) -> Tensor:
    """Which positions' values enter the sums: anything may lie under a mask.

    Real weights of 0 get a gradient from the value under them, unless its square is not finite.
    """
    if not weights.real:
        return weights.positive
    representable = torch.finfo(deviation.dtype).max ** 0.5 / 2
    return torch.logical_or(weights.positive, deviation.detach().abs() < representable)
