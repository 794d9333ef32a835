"""Ghost batches one after the other, each in adjacent memory: on the CPU, where a folding would have to copy all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function

from .fused import LEAST_EPSILON, RATIO_CHECKED
from .orders import Order
from .sums import measured_in_rows
from .surroundings import are_many


@dataclass(frozen=True)
class Pieces:
    """How x is cut into ghost batches, as (N, C, L) or (n, C) each.

    Attributes:
        order: x's, whose first axis in memory is the batch axis.
        shape: x's.
        sizes: rows of each ghost batch.
        strided: ghost g has rows g, g + G, ..., and all have as many; else they are consecutive.
    """

    order: Order
    shape: torch.Size
    sizes: tuple[int, ...]
    strided: bool

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """The ghost batches of a tensor of x's shape: consecutive ones are no copies."""
        if self.strided:
            return [part.reshape(-1, *self.order.merged[1:]) for part in self.places(x)]
        merged = self.order.merge(x)
        in_row = len(merged) // self.shape[0]
        return torch.split(merged, [rows * in_row for rows in self.sizes])

    def one_by_one(self, x: Tensor) -> Iterator[Tensor]:
        """The same; a strided one lies where the last one lay."""
        if not self.strided:
            yield from self.cut(x)
            return
        room = None
        for place in self.places(x):
            room = torch.empty_like(place) if room is None else room
            yield room.copy_(place).view(-1, *self.order.merged[1:])

    def places(self, x: Tensor) -> Sequence[Tensor]:
        """Where strided ghost batches of a tensor of x's shape lie: (rows, L, C), or (rows, C, L)."""
        return self.grid(x).unbind(1)

    def grid(self, x: Tensor) -> Tensor:
        """A tensor of x's shape by strided ghost batches: (rows, G, L, C), or (rows, G, C, L)."""
        lengths = (-1,) if self.order.innermost else ()
        return self.order.merge(x).view(self.sizes[0], len(self.sizes), *lengths, *self.order.merged[1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What `cut` returned, back in x's shape and order."""
        if self.strided:
            joined = torch.stack([part.reshape(self.sizes[0], -1) for part in parts], 1)
        else:
            joined = torch.cat(list(parts))
        return self.order.split(joined.reshape(self.order.merged), self.shape)

    @cached_property
    def even(self) -> bool:
        """Whether all ghost batches have as many rows."""
        return self.strided or len(set(self.sizes)) == 1

    @cached_property
    def counts(self) -> list[int]:
        """Elements a channel of each ghost batch."""
        row = math.prod(self.order.merged) // (self.order.merged[1] * self.shape[0])
        return [rows * row for rows in self.sizes]


def by_pieces(
    x: Tensor, pieces: Pieces, gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """gamma (x - m)/sqrt(v + epsilon) + beta by each ghost batch's own m and v, and these, (G, C) without gradient.

    None where they are not to be had in few operations, or those would not be accurate.

    Args:
        x: float32 or float64 on the CPU.
        pieces: how it is cut, into pieces of at least two elements a channel.
        gamma, beta: (C,) of x's dtype, or None; no beta without a gamma.
        epsilon: of the spec.
    """
    if epsilon < LEAST_EPSILON or x.dtype is not torch.float32:
        return None
    number, counts, features = len(pieces.sizes), pieces.counts, pieces.order.merged[1]
    if not pieces.order.innermost:
        if pieces.strided or not pieces.even:
            return None
        rows = pieces.order.merge(x.detach()).view(number, -1, *pieces.order.merged[1:])
        found = measured_in_rows(rows.transpose(0, 1), counts[0])
        gammas, betas = (None if t is None else t.expand(number, -1) for t in (gamma, beta))
        return None if found is None else (by_known_pieces(x, pieces, gammas, betas, *found, epsilon), *found)
    y = torch.empty_like(x)
    with torch.no_grad():
        if pieces.strided:
            means, variances, rstds = _strided(x, y, pieces, gamma, beta, epsilon)
        else:
            moments = x.new_zeros(4, number, features)
            means, variances, _, rstds = moments.unbind()
            cut = pieces.cut(y), pieces.cut(x), *(t.unbind() for t in moments.unbind())
            for target, part, mean, variance, saved, rstd in zip(*cut, strict=True):
                out = target, saved, rstd
                torch.native_batch_norm(part, gamma, beta, mean, variance, True, 1.0, epsilon, out=out)
            biased = [(count - 1) / count for count in counts]
            variances.mul_(biased[0] if pieces.even else variances.new_tensor(biased).unsqueeze(1))
    if not torch.square(means).sub_(variances, alpha=RATIO_CHECKED).max().item() <= 0:
        return None
    if _learn(x, gamma, beta):
        gammas, betas = (None if t is None else t.expand(number, -1) for t in (gamma, beta))
        y = _by_pieces(x, gammas, betas, [y], pieces, means, rstds, epsilon)
    return y, means, variances


def _strided(
    x: Tensor, y: Tensor, pieces: Pieces, gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills y, and gives m, v and 1/sqrt(v + epsilon): what is gathered of x is written where it belongs in passing."""
    found = []
    for target, part in zip(pieces.places(y), pieces.one_by_one(x), strict=True):
        mean, variance = torch.ops.aten.batch_norm_update_stats(part, None, None, 0.0)
        rstd = torch.rsqrt(variance + epsilon)
        scale = rstd if gamma is None else rstd * gamma
        offset = (mean * scale).neg_() if beta is None else torch.addcmul(beta, mean, scale, value=-1.0)
        torch.addcmul(offset, part.view(target.shape), scale, out=target)
        found.append((mean, variance, rstd))
    means, variances, rstds = map(torch.stack, zip(*found, strict=True))
    return means, variances, rstds


def by_known_pieces(
    x: Tensor,
    pieces: Pieces,
    gammas: Tensor | None,
    betas: Tensor | None,
    means: Tensor,
    variances: Tensor,
    epsilon: float,
) -> Tensor:
    """gamma (x - m)/sqrt(v + epsilon) + beta of each ghost batch, where m and v are its own: gradients go through them.

    Args:
        x: float32 or float64 on the CPU.
        pieces: how it is cut.
        gammas, betas: (G, C) of x's dtype, or None; no betas without gammas.
        means, variances: (G, C) of x's dtype, without gradient.
        epsilon: above 0.
    """
    y, unused = torch.empty_like(x), x.new_empty(0)
    rstds = torch.rsqrt(variances.double() + epsilon).to(x.dtype)
    with torch.no_grad():
        if pieces.strided:
            scales = rstds if gammas is None else rstds * gammas
            offsets = (means * scales).neg_() if betas is None else torch.addcmul(betas, means, scales, value=-1.0)
            scales, offsets = (t.unsqueeze(1 if pieces.order.innermost else 2) for t in (scales, offsets))
            torch.addcmul(offsets, pieces.grid(x), scales, out=pieces.grid(y))
        else:
            cut = pieces.cut(y), pieces.cut(x), _each(gammas, pieces), _each(betas, pieces), means, variances
            for target, part, gamma, beta, mean, variance in zip(*cut, strict=True):
                out = target, unused, unused
                torch.native_batch_norm(part, gamma, beta, mean, variance, False, 0.0, epsilon, out=out)
    return _by_pieces(x, gammas, betas, [y], pieces, means, rstds, epsilon) if _learn(x, gammas, betas) else y


def _learn(*given: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)


def _each(values: Tensor | None, pieces: Pieces) -> Sequence[Tensor | None]:
    return [None] * len(pieces.sizes) if values is None else values.unbind()


class _ByPieces(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gammas: Tensor | None,
        betas: Tensor | None,
        found: list[Tensor],  # y alone: as an argument of its own what is returned would be a view of it
        pieces: Pieces,
        means: Tensor,
        rstds: Tensor,
        epsilon: float,
    ) -> Tensor:
        ctx.save_for_backward(x, gammas, means, rstds)
        ctx.pieces, ctx.epsilon = pieces, epsilon
        return found.pop()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, gammas, means, rstds = ctx.saved_tensors
        pieces, needs = ctx.pieces, ctx.needs_input_grad[:3]
        dx: Tensor | None = None
        if not (torch.is_grad_enabled() or are_many(gradients[0])):
            if pieces.strided:
                return *_strided_gradients(pieces, x, gradients[0], gammas, means, rstds, needs), *[None] * 5
            if needs[0]:
                dx = torch.empty_like(x)
        targets: Sequence[Tensor | None] = [None] * len(pieces.sizes) if dx is None else pieces.cut(dx)
        cut = pieces.cut(gradients[0]), pieces.cut(x), _each(gammas, pieces), means, rstds, targets
        found = []
        for dy, part, gamma, mean, rstd, target in zip(*cut, strict=True):
            # The kernel has a derivative of its own, for a second order: it knows that m and v come from x.
            its_dx, *rest = torch.ops.aten.native_batch_norm_backward(
                dy, part, gamma, None, None, mean, rstd, True, ctx.epsilon, needs
            )
            found.append((its_dx if target is None else target.copy_(its_dx), *rest))
        dxs, dgammas, dbetas = zip(*found, strict=True)
        if dx is None and needs[0]:
            dx = pieces.join(dxs)
        return (
            dx,
            torch.stack(dgammas) if needs[1] else None,
            torch.stack(dbetas) if needs[2] else None,
            None, None, None, None, None,
        )  # fmt: skip


def _strided_gradients(
    pieces: Pieces,
    x: Tensor,
    dy: Tensor,
    gammas: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """gamma/sd (dy - (S1 + xhat S2)/n), S2 and S1, for S1 = sum dy and S2 = sum dy xhat of each ghost batch."""
    dx = torch.empty_like(x) if needs[0] else None
    targets: Sequence[Tensor | None] = [None] * len(pieces.sizes) if dx is None else pieces.places(dx)
    scales = rstds if gammas is None else rstds * gammas
    shares = scales / -pieces.counts[0]
    places = 0 if pieces.order.innermost else 1
    cut = targets, pieces.one_by_one(x), pieces.one_by_one(dy), means, rstds, scales, shares, shares * rstds
    found = []
    for target, part, its_dy, mean, rstd, scale, share, slope in zip(*cut, strict=True):
        _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            its_dy, part, None, None, None, mean, rstd, True, 0.0, (False, True, True)
        )
        found.append((dgamma, dbeta))
        if target is not None:
            of_x = dgamma * slope
            offset = (dbeta * share).addcmul_(of_x, mean, value=-1.0)
            offset, of_x, of_dy = (t.unsqueeze(places) for t in (offset, of_x, scale))
            part, its_dy = part.view(target.shape), its_dy.view(target.shape)
            torch.addcmul(torch.addcmul(offset, part, of_x, out=part), its_dy, of_dy, out=target)
    dgammas, dbetas = map(torch.stack, zip(*found, strict=True))
    return dx, dgammas if needs[1] else None, dbetas if needs[2] else None


_by_pieces: Final[Callable[..., Tensor]] = _ByPieces.apply
