"""Example weights and masks, in torch: checked, and as proportions of their total."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnlayer.call import CallPlan
from bnlayer.errors import InputError

from .dtypes import DTYPES, dtype_name


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one call.

    Attributes:
        positive: where there is weight: boolean, in the plan's `weights_shape`.
        proportions: w/W in the plan's arithmetic, so that they sum to 1 over all positions of a channel; all 0 where
            W is 0. A gradient flows through them to real weights.
        present: whether W > 0: a boolean scalar.
        bessel: what makes the biased variance unbiased, 1/(1 - Q/W^2): a scalar; 0 where a single position has weight.
        real: whether they are floating-point weights, and not a mask.
    """

    positive: Tensor
    proportions: Tensor
    present: Tensor
    bessel: Tensor
    real: bool


def read_weights(weights: Tensor, plan: CallPlan) -> Weights:
    """Check the weights' values and relate them to their total.

    While torch.compile or torch.export traces, no value can be looked at: there a negative or non-finite weight makes
    every statistic NaN instead of raising.

    Raises:
        InputError: a weight is negative, not finite, or not a real number.
    """
    assert plan.weights_shape is not None and plan.count is not None
    if weights.dtype.is_complex:
        raise InputError(f"weights must be real or boolean; got {dtype_name(weights.dtype)}.")
    # In double precision 1 - Q/W^2 survives one weight that outweighs the rest; Apple's GPU has none.
    wide = torch.float32 if weights.device.type == "mps" else torch.float64
    values = weights.reshape([int(length or 0) for length in plan.weights_shape]).to(wide)
    valid = (values >= 0) & (values < torch.inf)
    if torch.compiler.is_compiling():
        values = torch.where(valid, values, torch.nan)
    elif not bool(valid.all()):
        raise InputError(f"weights must be finite and not negative; got {values[~valid][0].item()}.")
    present = (values > 0).any()
    spread = plan.count // values.numel()  # positions of x that one weight stands for
    # Relative to the largest, neither the total nor the squares can overflow or vanish. w/W does not depend on what
    # both are divided by, so no gradient is lost with the largest held constant.
    relative = values / torch.where(present, values.detach().amax(), 1.0)
    proportions = relative / torch.where(present, relative.sum() * spread, 1.0)
    rest = 1.0 - torch.square(proportions.detach()).sum() * spread
    single = (rest <= 0) | (torch.count_nonzero(values) * spread == 1)
    return Weights(
        positive=values > 0,
        proportions=proportions.to(DTYPES[plan.arithmetic]),
        present=present,
        bessel=torch.where(single, 0.0, 1.0 / torch.where(single, 1.0, rest)),
        real=weights.dtype.is_floating_point,
    )
