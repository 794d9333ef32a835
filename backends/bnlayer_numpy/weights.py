"""Example weights and masks, in NumPy: checked, and as proportions of their total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnlayer.call import CallPlan
from bnlayer.errors import InputError

NDArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one call.

    Attributes:
        values: the weights, float64, in the plan's `weights_shape`.
        proportions: w/W, so that they sum to 1 over all positions of a channel; all 0 where W is 0.
        total: W, over all positions of a channel.
        concentration: Q/W^2, that is 1/n: exactly 1 where a single position has weight; 0 where W is 0.
        real: whether a gradient flows to them: floating-point weights, not masks.
    """

    values: NDArray
    proportions: NDArray
    total: float
    concentration: float
    real: bool


def read_weights(weights: NDArray, plan: CallPlan) -> Weights:
    """Check the weights' values and relate them to their total.

    Raises:
        InputError: a weight is negative, not finite, or not a real number.
    """
    assert plan.weights_shape is not None and plan.count is not None
    if weights.dtype.kind not in "biuf" and weights.dtype.name != "bfloat16":
        raise InputError(f"weights must be real or boolean; got {weights.dtype}.")
    values = weights.astype(np.float64).reshape([int(length or 0) for length in plan.weights_shape])
    refused = ~((values >= 0) & (values < np.inf))
    if bool(refused.any()):
        raise InputError(f"weights must be finite and not negative; got {values[refused][0]}.")
    real = weights.dtype.kind not in "biu"
    largest = float(values.max(initial=0.0))
    if largest == 0.0:
        return Weights(values, np.zeros_like(values), 0.0, 0.0, real)
    spread = plan.count // values.size  # positions of x that one weight stands for
    # Relative to the largest, neither the total nor the squares can overflow or vanish.
    relative = values / largest
    proportions = relative / (relative.sum() * spread)
    single = int(np.count_nonzero(values)) * spread == 1
    concentration = 1.0 if single else float(np.square(proportions).sum() * spread)
    return Weights(values, proportions, float(values.sum() * spread), concentration, real)
