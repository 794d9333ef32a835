"""Example weights and masks, in torch: checked, and as proportions of their total."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from bnlayer.call import CallPlan
from bnlayer.errors import InputError

from .dtypes import DTYPES, dtype_name
from .orders import Order


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one call, or of each of k ghost batches; k is 1 for a whole batch.

    Attributes:
        positive: where there is weight: boolean, broadcastable to x.
        proportions: w/W in the plan's arithmetic, so that they sum to 1 over all positions of a channel; all 0 where
            W is 0. A gradient flows through them to real weights.
        present: whether W > 0: boolean, (k,) or for each channel.
        bessel: what makes the biased variance unbiased, 1/(1 - Q/W^2), like `present`; 0 where a single position has
            weight.
        largest: the largest weight, (k,).
        total: W over `largest`, (k,).
        real: whether they are floating-point weights, and not a mask.
    """

    positive: Tensor
    proportions: Tensor
    present: Tensor
    bessel: Tensor
    largest: Tensor
    total: Tensor
    real: bool

    def for_channels(self, features: int, axis: int) -> Weights:
        """The weights of k ghost batches with `features` channels each, for the k C channels of their folding."""
        return replace(
            self,
            positive=self.positive.repeat_interleave(features, axis),
            proportions=self.proportions.repeat_interleave(features, axis),
            present=self.present.repeat_interleave(features),
            bessel=self.bessel.repeat_interleave(features),
        )


def read_weights(weights: Tensor, plan: CallPlan) -> Weights:
    """Check the weights' values and relate them to their total.

    While torch.compile or torch.export traces, no value can be looked at: there a negative or non-finite weight makes
    every statistic NaN instead of raising.

    Args:
        weights: of x's rank, 1 on the channel axis; with k on it they are those of k ghost batches.
        plan: of the call, or of the ghost batches' folding.

    Raises:
        InputError: a weight is negative, not finite, or not a real number.
    """
    assert plan.count is not None
    _refuse_complex(weights)
    # In double precision 1 - Q/W^2 survives one weight that outweighs the rest; Apple's GPU has none.
    values = weights.to(torch.float32 if weights.device.type == "mps" else torch.float64)
    if torch.compiler.is_compiling():
        values = torch.where(_valid(values), values, torch.nan)
    else:
        _refuse_invalid(values)
    groups = values.shape[plan.axis]
    spread = plan.count // (values.numel() // groups)  # positions of x that one weight stands for

    def total(values: Tensor) -> Tensor:
        return values.sum(plan.reduced, keepdim=True) * spread

    largest = values.detach().amax(plan.reduced, keepdim=True)
    present = ~(largest == 0)  # an invalid weight, NaN while tracing, has to show
    # Relative to the largest, neither the total nor the squares can overflow or vanish. w/W does not depend on what
    # both are divided by, so no gradient is lost with the largest held constant.
    relative = values / torch.where(present, largest, 1.0)
    sum_of_relative = total(relative)
    proportions = relative / torch.where(present, sum_of_relative, 1.0)
    rest = 1.0 - total(torch.square(proportions.detach()))
    single = (rest <= 0) | (torch.count_nonzero(values, plan.reduced).reshape(rest.shape) * spread == 1)
    return Weights(
        positive=values > 0,
        proportions=proportions.to(DTYPES[plan.arithmetic]),
        present=present.reshape(-1),
        bessel=torch.where(single, 0.0, 1.0 / torch.where(single, 1.0, rest)).reshape(-1),
        largest=largest.reshape(-1),
        total=sum_of_relative.detach().reshape(-1),
        real=weights.dtype.is_floating_point,
    )


# Between these the squares of all weights can be added up as they are.
_NO_SMALLER: Final = 1e-3
_NO_LARGER: Final = 1e3
# Below it a variance hangs on roundings of the largest weight.
_LEAST_REST: Final = 0.25


@dataclass(frozen=True, eq=False)
class Shares:
    """Weights that carry no gradient, as few numbers as a batch's sums need.

    Attributes:
        relative: w, over the largest where that is far from 1, of the arithmetic's dtype: (N, 1, L) or (n, 1), as the
            order has x's positions.
        total: their sum.
        bessel: what makes the biased variance unbiased.
        hides: whether there are positions without weight.
        boolean: whether all are 0 or 1.
        order: x's.
    """

    relative: Tensor
    total: float
    bessel: float
    hides: bool
    boolean: bool
    order: Order

    @property
    def first(self) -> int:
        """The first position that has weight."""
        return int(torch.argmax((self.relative > 0).flatten().byte()))


def read_shares(weights: Tensor, x: Tensor, axis: int, order: Order) -> Shares | None:
    """Check the weights' values and relate them to the largest, with few operations; None where there is next to none
    but one position's.

    Args:
        weights: of x's rank, 1 on the channel axis; without gradient, and to be looked at.
        x: its shape and dtype count.
        axis: the channel axis.
        order: x's.

    Raises:
        InputError: as `read_weights`.
    """
    _refuse_complex(weights)
    shape, dtype = x.shape, torch.float64 if x.dtype is torch.float64 else torch.float32
    spread = x.numel() // (shape[axis] * weights.numel())
    relative = weights.detach()
    boolean = weights.dtype is torch.bool
    if boolean:
        seen = int(torch.count_nonzero(relative))
        relative = relative.to(dtype)
        total = squares = float(seen * spread)
        hides = seen < weights.numel()
    else:
        low, high = _bounds(weights)
        if high == 0:
            return None
        if weights.dtype is not dtype or not _NO_SMALLER < high < _NO_LARGER:
            wide = relative.to(torch.promote_types(weights.dtype, dtype))
            relative, low = (wide / high).to(dtype), low / high
        # Of what was rounded, so that the mean lies between the values.
        every = relative.double().reshape(-1)
        total, squares = every.sum().item() * spread, torch.dot(every, every).item() * spread
        hides = low < torch.finfo(dtype).tiny
    rest = 1.0 - squares / total**2 if total else 0.0
    if rest < _LEAST_REST:
        return None
    if spread > 1:
        relative = relative.expand([1 if i == axis else length for i, length in enumerate(shape)])
    return Shares(order.positions(relative), total, 1.0 / rest, hides, boolean, order)


def hide_too_much(shares: Shares, x: Tensor) -> bool:
    """Whether a gradient could come out wrong by what lies where no weight is: it has 0 times xhat times another's."""
    if not shares.hides or not torch.is_grad_enabled():
        return False
    low, high = torch.aminmax(shares.order.merge(x.detach()))  # in the order of memory it is ten times as fast
    return not max(-low.item(), high.item()) < torch.finfo(x.dtype).max ** 0.25


def fits(weights: Tensor, x: Tensor) -> bool:
    """Whether weights have a value for each position of x, with channels on axis 1."""
    given, shape = weights.shape, x.shape
    return len(given) == len(shape) - 1 and given[0] == shape[0] and (len(given) == 1 or given[1:] == shape[2:])


def check_weights(weights: Tensor) -> None:
    """Check the values of weights that nothing depends on, where they can be looked at.

    Raises:
        InputError: a weight is negative, not finite, or not a real number.
    """
    _refuse_complex(weights)
    if weights.dtype is not torch.bool and weights.numel():
        _bounds(weights)


def _bounds(weights: Tensor) -> tuple[float, float]:
    """The smallest and the largest of real weights.

    Raises:
        InputError: a weight is negative or not finite.
    """
    least, most = torch.aminmax(weights)
    low, high = least.item(), most.item()
    if not (low >= 0 and high < torch.inf):
        _refuse_invalid(weights)
    return low, high


def _refuse_complex(weights: Tensor) -> None:
    if weights.dtype.is_complex:
        raise InputError(f"weights must be real or boolean; got {dtype_name(weights.dtype)}.")


def _valid(values: Tensor) -> Tensor:
    return (values >= 0) & (values < torch.inf)


def _refuse_invalid(values: Tensor) -> None:
    valid = _valid(values)
    if not bool(valid.all()):
        raise InputError(f"weights must be finite and not negative; got {values[~valid][0].item()}.")
