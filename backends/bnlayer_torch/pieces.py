"""Ghost batches one after the other, each in adjacent memory: on the CPU, where a folding would have to copy all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function

from .orders import Order


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
        return [part.reshape(-1, *self.order.merged[1:]) for part in self.views(self.order.merge(x))]

    def views(self, merged: Tensor) -> Sequence[Tensor]:
        """The ghost batches of x in the order of memory, as (rows, L C) each."""
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


def by_pieces(
    x: Tensor,
    parts: Sequence[Tensor],
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
        parts: x, cut, without gradient.
        pieces: how.
        gammas, betas: (G, C) of x's dtype, or None; no betas without gammas.
        means, variances: (G, C) of x's dtype, without gradient.
        epsilon: above 0.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gammas, betas)):
        return _by_pieces(x, gammas, betas, parts, pieces, means, variances, epsilon)
    return _applied(parts, pieces, gammas, betas, means, variances, epsilon)


def _applied(
    parts: Sequence[Tensor],
    pieces: Pieces,
    gammas: Tensor | None,
    betas: Tensor | None,
    means: Tensor,
    variances: Tensor,
    epsilon: float,
) -> Tensor:
    y = parts[0].new_empty(pieces.order.merged)
    unused = y.new_empty(0)
    for target, part, gamma, beta, mean, variance in zip(
        pieces.views(y), parts, _each(gammas, parts), _each(betas, parts), means, variances, strict=True
    ):
        if pieces.strided:
            its_y = torch.batch_norm(part, gamma, beta, mean, variance, False, 0.0, epsilon, False)
            target.copy_(its_y.view(target.shape))
        else:
            out = target.view(part.shape), unused, unused
            torch.native_batch_norm(part, gamma, beta, mean, variance, False, 0.0, epsilon, out=out)
    return pieces.order.split(y, pieces.shape)


def _each(values: Tensor | None, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return [None] * len(parts) if values is None else values.unbind()


class _ByPieces(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gammas: Tensor | None,
        betas: Tensor | None,
        parts: Sequence[Tensor],
        pieces: Pieces,
        means: Tensor,
        variances: Tensor,
        epsilon: float,
    ) -> Tensor:
        ctx.save_for_backward(x, gammas, means, torch.rsqrt(variances.double() + epsilon).to(x.dtype))
        ctx.pieces, ctx.epsilon = pieces, epsilon
        return _applied(parts, pieces, gammas, betas, means, variances, epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, gammas, means, rstds = ctx.saved_tensors
        parts, needs = ctx.pieces.cut(x), ctx.needs_input_grad[:3]
        # The kernel has a derivative of its own, for a second order: it knows that m and v come from x.
        found = [
            torch.ops.aten.native_batch_norm_backward(dy, part, gamma, None, None, mean, rstd, True, ctx.epsilon, needs)
            for dy, part, gamma, mean, rstd in zip(
                ctx.pieces.cut(gradients[0]), parts, _each(gammas, parts), means, rstds, strict=True
            )
        ]
        dx, dgammas, dbetas = zip(*found, strict=True)
        return (
            ctx.pieces.join(dx) if needs[0] else None,
            torch.stack(dgammas) if needs[1] else None,
            torch.stack(dbetas) if needs[2] else None,
            None, None, None, None, None,
        )  # fmt: skip


_by_pieces: Final[Callable[..., Tensor]] = _ByPieces.apply
