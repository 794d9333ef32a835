"""A batch's mean and variance from our own sums on the CPU: as fast as the kernel's, or faster, and they do not drift.

torch's kernel adds up one element after the other. Here sums in x's own precision are as short as the error bound of
the whole asks for. There are few operations beside the passes over x: after each of these their code is out of the
processor's caches, and ten of them would take as long as a pass over ten megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from .orders import Order, in_blocks, room_for_block
from .weights import Shares

# A sum over a row of this many elements, in vectors of 8 at the least, adds at most 2048 in a lane.
_LONGEST_ROW: Final = 1 << 14
# As many channels side by side torch's kernel still sums up at full speed: its sums stay in the first cache. (Twice as
# many take 1.2 times as long, four times as many twice as long.)
_WIDEST: Final = 1 << 10
# Rows are laid side by side for as many elements of a call of the kernel.
_SLAB: Final = 1 << 20

# Rows of a product of matrices with weights: it may add them one after the other.
_FEW_ROWS: Final = 64
# Up to so many elements what counts is the number of operations.
_SMALL: Final = 1 << 17

# Sums of squares lose m^2/v roundings in the variance. Up to these ratios the variance is as accurate as its bound,
# K = 8 + sqrt(n) roundings: in one pass it is off by about 2 (1 + m^2/v) of them, in two by the square of the mean's
# error, K^2 m^2/v squared roundings.
_RATIO_OF_ROWS: Final = 4.0
_RATIO_OF_COLUMNS: Final = 1e5


def measured(x: Tensor, order: Order, count: int, shares: Shares | None = None) -> tuple[Tensor, Tensor] | None:
    """The batch's mean and biased variance, (C,) of x's dtype, without gradient.

    None where x is not finite, or too large to be squared; with shares also what has none.

    Args:
        x: float32 or float64.
        order: x's.
        count: elements a channel, at least two.
        shares: of the positions; None: they are equal.
    """
    x = order.merge(x.detach())
    of: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    if shares is not None:
        of, most = partial(_of_shares, shares), _RATIO_OF_ROWS
    else:
        of, most = (_of_columns, _RATIO_OF_COLUMNS) if order.innermost else (_of_rows, _RATIO_OF_ROWS)
    mean, variance = of(x, count)
    if _accurate(mean, variance, most):
        return mean.to(x.dtype), variance.to(x.dtype)
    # About the mean; and about the one value where there is just one, so that its variance is 0 and not a rounding.
    first = (x if order.innermost else x.transpose(1, 2).flatten(0, 1))[0 if shares is None else shares.first]
    near = mean.to(x.dtype)
    same = (first - near).abs() <= math.isqrt(count) * torch.finfo(x.dtype).eps * near.abs()
    shift = torch.where(same, first, near)
    mean, variance = of(x - (shift if order.innermost else shift[:, None]), count)
    return ((mean + shift).to(x.dtype), variance.to(x.dtype)) if _accurate(mean, variance, most) else None


def measured_in_rows(x: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Mean and biased variance over the first and the last axis of (n, ..., L), of x's dtype, without gradient.

    None where one pass over x is not accurate, or x not finite, or too large to be squared.

    Args:
        x: float32 or float64, without gradient.
        count: elements that each is of, at least two.
    """
    mean, variance = _of_rows(x, count)
    return (mean.to(x.dtype), variance.to(x.dtype)) if _accurate(mean, variance, _RATIO_OF_ROWS) else None


def _accurate(mean: Tensor, variance: Tensor, most: float) -> bool:
    lowest, highest = torch.aminmax(torch.square(mean).sub_(variance, alpha=most))
    return highest.item() <= 0 and lowest.item() > -torch.inf  # and not, if one is no number


def _of_shares(shares: Shares, x: Tensor, _: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of (N, C, L) or (n, C), in double precision.

    There are no long sums: torch's along one axis are cascades, and products of matrices are taken of few rows each.
    What is not finite shows, as 0 times it is NaN.
    """
    of = _weighted_in_one if x.numel() <= _SMALL else _weighted_columns if x.dim() == 2 else _weighted_rows
    mean, square = of(x, shares).div_(shares.total).unbind()
    return mean, square.addcmul_(mean, mean, value=-1.0).clamp_(min=0.0)


def _weighted_in_one(x: Tensor, shares: Shares) -> Tensor:
    """The sums of x and of its squares, (2, C) of float64."""
    part = x * shares.relative
    along = 0 if x.dim() == 2 else (0, 2)
    total = part.sum(along)
    return torch.stack((total, part.mul_(x).sum(along))).double()


def _weighted_columns(x: Tensor, shares: Shares) -> Tensor:
    """The same of (n, C), by products of matrices: read as fast as memory gives them."""
    whole = len(x) - len(x) % _FEW_ROWS
    found = []
    for rows, weights in (
        (x[:whole].view(-1, _FEW_ROWS, x.shape[1]), shares.relative[:whole].view(-1, 1, _FEW_ROWS)),
        (x[whole:].unsqueeze(0), shares.relative[whole:].view(1, 1, -1)),
    ):
        if not rows.numel():
            continue
        sums = rows.new_empty(2, len(rows), 1, x.shape[1])
        torch.bmm(weights, rows, out=sums[0])
        room = room_for_block(rows)
        for some, its_weights, its_sums in zip(
            in_blocks(rows), in_blocks(weights, like=rows), in_blocks(sums[1], like=rows), strict=True
        ):
            square = torch.mul(some, some, out=room[: len(some)])
            torch.bmm(its_weights, square, out=its_sums)
        found.append(sums.sum((1, 2), dtype=torch.float64))
    return found[0] if len(found) == 1 else found[0].add_(found[1])


def _weighted_rows(x: Tensor, shares: Shares) -> Tensor:
    """The same of (N, C, L)."""
    total = x.new_empty(2, *x.shape[:2])
    room = room_for_block(x)
    for some, weights, its_total, its_squares in zip(
        in_blocks(x), in_blocks(shares.relative, like=x), *(in_blocks(t, like=x) for t in total), strict=True
    ):
        part = torch.mul(some, weights, out=room[: len(some)])
        torch.sum(part, -1, out=its_total)
        if shares.boolean:
            torch.linalg.vector_norm(part, dim=-1, out=its_squares).square_()
        else:
            torch.sum(part.mul_(some), -1, out=its_squares)
    return total.sum(1, dtype=torch.float64)


def _of_rows(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of (N, C, L), in double precision."""
    total, squares = _sums_of_rows(x[..., :_LONGEST_ROW])
    for start in range(_LONGEST_ROW, x.shape[-1], _LONGEST_ROW):
        more = _sums_of_rows(x[..., start : start + _LONGEST_ROW])
        total, squares = total + more[0], squares + more[1]
    mean = total / count
    return mean, (squares / count).addcmul_(mean, mean, value=-1.0).clamp_(min=0.0)


def _sums_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.linalg.vector_norm(x, dim=-1)
    return x.sum(-1).sum(0, dtype=torch.float64), rows.mul_(rows).sum(0, dtype=torch.float64)


def _of_columns(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of (n, C).

    b rows of C channels are one row of b C channels. So the kernel gives the statistics of every b-th row, by two
    passes; they are merged as in Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983.

    Adding up k equal numbers, or numbers of two values, one after the other is off by k/4 roundings at the worst, which
    few numbers reach (measured). With k up to 5 (8 + sqrt(n)) that stays within the bound of the whole. The kernel
    gives each thread as many rows.
    """
    features = x.shape[1]
    longest = int(5 * (8 + math.sqrt(count))) * torch.get_num_threads()
    fold = 1
    while count > longest * fold and longest * fold * features < _SLAB and 2 * fold * features <= _WIDEST:
        fold *= 2
    whole = count - count % fold
    folded = x[:whole].view(-1, fold * features)
    slabs = [*torch.split(folded, longest), *([x[whole:]] if whole < count else [])]
    found = [torch.ops.aten.batch_norm_update_stats(slab, None, None, 0.0) for slab in slabs]
    means, variances = (torch.cat([part.view(-1, features) for part in each]) for each in zip(*found, strict=True))
    if len(means) == 1:
        return means[0], variances[0]
    shares = [len(slab) / count for slab in slabs for _ in range(slab.shape[1] // features)]
    weights = means.new_tensor(shares)
    # Relative to one of them, so that a constant channel's mean is that value, and its variance 0.
    step = means - means[0]
    rest = weights @ step
    step -= rest
    return means[0] + rest, weights @ variances.addcmul_(step, step)
