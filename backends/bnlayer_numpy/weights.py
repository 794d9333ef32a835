"""Example weights and masks, in NumPy: checked, and as proportions of their total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from bnlayer.call import CallPlan
from bnlayer.errors import InputError

NDArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one batch, or of one ghost batch.

    Attributes:
        values: the weights, float64, with 1 on the channel axis and wherever they are spread.
        proportions: w/W, so that they sum to 1 over all positions of a channel; all 0 where W is 0.
        total: W, over all positions of a channel.
        concentration: Q/W^2, that is 1/n: exactly 1 where a single position has weight; 0 where W is 0.
    """

    values: NDArray
    proportions: NDArray
    total: float
    concentration: float


def read_weights(weights: NDArray, plan: CallPlan) -> NDArray:
    """The weights' values, checked: float64, in the plan's `weights_shape`.

    Raises:
        InputError: a weight is negative, not finite, or not a real number.
    """
    return checked(weights, plan).astype(np.float64)


def checked(weights: NDArray, plan: CallPlan) -> NDArray:
    """Weights in the plan's `weights_shape`, of the dtype that they came in, or float64.

    Raises:
        InputError: as `read_weights`.
    """
    kind = weights.dtype.kind
    if kind not in "biuf" and weights.dtype.name != "bfloat16":
        raise InputError(f"weights must be real or boolean; got {weights.dtype}.")
    if kind == "V" or weights.dtype.itemsize > 8:
        weights = weights.astype(np.float64)
    if kind not in "bu" and not (weights.min(initial=0) >= 0 and weights.max(initial=0) < np.inf):
        refused = ~((weights >= 0) & (weights < np.inf))
        raise InputError(f"weights must be finite and not negative; got {weights[refused][0]}.")
    assert plan.weights_shape is not None
    return weights.reshape(cast("tuple[int, ...]", plan.weights_shape))  # of an array no length is unknown


def of_rows(values: NDArray, rows: slice) -> NDArray:
    """The weights of these rows; those that are spread over all rows hold for any of them."""
    return values if values.shape[0] == 1 else values[rows]


def related(values: NDArray, count: int) -> Weights:
    """The weights in relation to their total, where each channel has `count` positions."""
    largest = float(values.max(initial=0.0))
    if largest == 0.0:
        return Weights(values, np.zeros_like(values), 0.0, 0.0)
    spread = count // values.size  # positions of x that one weight stands for
    # Relative to the largest, neither the total nor the squares can overflow or vanish.
    relative = values / largest
    proportions = relative / (relative.sum() * spread)
    single = int(np.count_nonzero(values)) * spread == 1
    concentration = 1.0 if single else float(np.square(proportions).sum() * spread)
    return Weights(values, proportions, float(values.sum() * spread), concentration)


def unrelated(values: NDArray) -> Weights:
    """The weights where no statistics are taken, and nothing but where they are 0 matters."""
    return Weights(values, values, 0.0, 0.0)


def is_real(weights: NDArray) -> bool:
    """Whether a gradient flows to these weights: floating-point ones, not masks."""
    return weights.dtype.kind not in "biu"


def summed(at_positions: NDArray, weights: Weights) -> NDArray:
    """The gradients of weights: those at each position, added up where one weight stands for many."""
    spread_over = tuple(i for i, length in enumerate(weights.values.shape) if length == 1)
    return np.asarray(at_positions.sum(axis=spread_over, keepdims=True))
