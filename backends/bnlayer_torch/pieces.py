"""Ghost batches one after the other, each in adjacent memory: on the CPU, where a folding would have to copy all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

    def cut(self, x: Tensor) -> list[Tensor]:
        """The ghost batches of a tensor of x's shape: consecutive ones are no copies."""
        return [part.reshape(-1, *self.order.merged[1:]) for part in self.places(x)]

    def one_by_one(self, x: Tensor) -> Iterator[Tensor]:
        """The same; a strided one lies where the last one lay."""
        room = None
        for place in self.places(x):
            if self.strided:
                room = torch.empty_like(place) if room is None else room
                place = room.copy_(place)
            yield place.view(-1, *self.order.merged[1:])

    def places(self, x: Tensor) -> Sequence[Tensor]:
        """Where the ghost batches of a tensor of x's shape lie, as (rows, L C) each."""
        merged = self.order.merge(x)
        if not self.strided:
            return torch.split(merged.view(self.shape[0], -1), list(self.sizes))
        return merged.view(self.sizes[0], len(self.sizes), -1).unbind(1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What `cut` returned, back in x's shape and order."""
        if self.strided:
            joined = torch.stack([part.reshape(self.sizes[0], -1) for part in parts], 1)
        else:
            joined = torch.cat(list(parts))
        return self.order.split(joined.reshape(self.order.merged), self.shape)

    @property
    def counts(self) -> Tensor:
        """Elements a channel of each ghost batch, (G, 1)."""
        row = math.prod(self.order.merged) // (self.order.merged[1] * self.shape[0])
        return torch.tensor([[rows * row] for rows in self.sizes], dtype=torch.float64)


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
    number = len(pieces.sizes)
    gammas, betas = (None if t is None else t.expand(number, -1) for t in (gamma, beta))
    if not pieces.order.innermost:
        if pieces.strided or len(set(pieces.sizes)) > 1:
            return None
        rows = pieces.order.merge(x.detach()).view(number, -1, *pieces.order.merged[1:])
        found = measured_in_rows(rows.transpose(0, 1), x.numel() // (number * x.shape[pieces.order.axis]))
        if found is None:
            return None
        return by_known_pieces(x, pieces, gammas, betas, *found, epsilon), *found
    y = torch.empty_like(x)
    moments = x.new_zeros(2, number, pieces.order.merged[1])
    saved = torch.empty_like(moments)
    with torch.no_grad():
        for g, (target, part) in enumerate(zip(pieces.places(y), pieces.one_by_one(x.detach()), strict=True)):
            out = part if pieces.strided else target.view(part.shape)
            torch.native_batch_norm(
                part, gamma, beta, moments[0, g], moments[1, g], True, 1.0, epsilon, out=(out, saved[0, g], saved[1, g])
            )
            if pieces.strided:
                target.copy_(out.view(target.shape))
    counts = pieces.counts
    means, variances = moments[0], moments[1].mul_((counts - 1.0).div_(counts))
    if not torch.square(means).sub_(variances, alpha=RATIO_CHECKED).max().item() <= 0:
        return None
    return _with_gradients(x, pieces, gammas, betas, y, means, saved[1], epsilon), means, variances


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
    each = zip(
        pieces.places(y), pieces.one_by_one(x.detach()), _each(gammas, pieces), _each(betas, pieces), means, variances,
        strict=True,
    )  # fmt: skip
    with torch.no_grad():
        for target, part, gamma, beta, mean, variance in each:
            if pieces.strided:
                its_y = torch.batch_norm(part, gamma, beta, mean, variance, False, 0.0, epsilon, False)
                target.copy_(its_y.view(target.shape))
            else:
                out = target.view(part.shape), unused, unused
                torch.native_batch_norm(part, gamma, beta, mean, variance, False, 0.0, epsilon, out=out)
    rstds = torch.rsqrt(variances.double() + epsilon).to(x.dtype)
    return _with_gradients(x, pieces, gammas, betas, y, means, rstds, epsilon)


def _with_gradients(
    x: Tensor,
    pieces: Pieces,
    gammas: Tensor | None,
    betas: Tensor | None,
    y: Tensor,
    means: Tensor,
    rstds: Tensor,
    epsilon: float,
) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gammas, betas)):
        return _by_pieces(x, gammas, betas, [y], pieces, means, rstds, epsilon)
    return y


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
        dx, targets = None, [None] * len(pieces.sizes)
        if torch.is_grad_enabled() or are_many(gradients[0]):
            dys, parts = pieces.cut(gradients[0]), pieces.cut(x)
        else:
            dys, parts = pieces.one_by_one(gradients[0]), pieces.one_by_one(x)
            if needs[0]:
                dx = torch.empty_like(x)
                targets = pieces.places(dx)
        found = []
        for dy, part, gamma, mean, rstd, target in zip(
            dys, parts, _each(gammas, pieces), means, rstds, targets, strict=True
        ):
            # The kernel has a derivative of its own, for a second order: it knows that m and v come from x.
            its_dx, *rest = torch.ops.aten.native_batch_norm_backward(
                dy, part, gamma, None, None, mean, rstd, True, ctx.epsilon, needs
            )
            found.append((its_dx if target is None else target.copy_(its_dx.view(target.shape)), *rest))
        dxs, dgammas, dbetas = zip(*found, strict=True)
        if dx is None and needs[0]:
            dx = pieces.join(dxs)
        return (
            dx,
            torch.stack(dgammas) if needs[1] else None,
            torch.stack(dbetas) if needs[2] else None,
            None, None, None, None, None,
        )  # fmt: skip


_by_pieces: Final[Callable[..., Tensor]] = _ByPieces.apply
