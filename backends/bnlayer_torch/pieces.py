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
from .orders import Order, in_blocks
from .sums import measured_by_samples, measured_in_rows, products_by_samples
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

    def samples(self, x: Tensor) -> Tensor:
        """A tensor of x's shape with its positions in one axis: (N, L, C), or (N, C, L)."""
        lengths = (self.shape[0], -1) if self.order.innermost else (self.shape[0],)
        return self.order.merge(x).view(*lengths, *self.order.merged[1:])

    def grid(self, x: Tensor) -> Tensor:
        """The samples of a tensor whose ghost batches are strided, by these: (N/G, G, L, C) or (N/G, G, C, L)."""
        samples = self.samples(x)
        return samples.view(self.sizes[0], len(self.sizes), *samples.shape[1:])

    @property
    def positions(self) -> int:
        """The axis of the positions in `samples`."""
        return 1 if self.order.innermost else 2

    @property
    def even(self) -> bool:
        """Whether all ghost batches have as many rows."""
        return self.strided or len(set(self.sizes)) == 1

    @property
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
    number, counts = len(pieces.sizes), pieces.counts
    gammas, betas = (None if t is None else t.expand(number, -1) for t in (gamma, beta))
    if pieces.strided or not pieces.order.innermost:
        if pieces.strided:
            found = measured_by_samples(pieces.samples(x.detach()), pieces.positions, number, counts[0])
        elif pieces.even:
            rows = pieces.order.merge(x.detach()).view(number, -1, *pieces.order.merged[1:])
            found = measured_in_rows(rows.transpose(0, 1), counts[0])
        else:
            return None
        return None if found is None else (by_known_pieces(x, pieces, gammas, betas, *found, epsilon), *found)
    y = torch.empty_like(x)
    moments = x.new_zeros(4, number, pieces.order.merged[1])
    means, variances, saved, rstds = moments.unbind()
    with torch.no_grad():
        for target, part, *its in zip(pieces.cut(y), pieces.cut(x.detach()), *(t.unbind() for t in moments), strict=True):
            its_mean, its_variance, its_saved, its_rstd = its
            out = target, its_saved, its_rstd
            torch.native_batch_norm(part, gamma, beta, its_mean, its_variance, True, 1.0, epsilon, out=out)
    biased = [(count - 1) / count for count in counts]
    variances.mul_(biased[0] if pieces.even else variances.new_tensor(biased).unsqueeze(1))
    if not torch.square(means).sub_(variances, alpha=RATIO_CHECKED).max().item() <= 0:
        return None
    return _with_gradients(x, pieces, gammas, betas, y, means, rstds, epsilon), means, variances


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
            offsets = -means * scales if betas is None else torch.addcmul(betas, means, scales, value=-1.0)
            scales, offsets = (t.unsqueeze(pieces.positions) for t in (scales, offsets))
            torch.addcmul(offsets, pieces.grid(x.detach()), scales, out=pieces.grid(y))
        else:
            cut = pieces.cut(y), pieces.cut(x.detach()), _each(gammas, pieces), _each(betas, pieces), means, variances
            for target, part, gamma, beta, mean, variance in zip(*cut, strict=True):
                out = target, unused, unused
                torch.native_batch_norm(part, gamma, beta, mean, variance, False, 0.0, epsilon, out=out)
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
        dx: Tensor | None = None
        if not (torch.is_grad_enabled() or are_many(gradients[0])):
            if pieces.strided:
                return *_strided_gradients(pieces, x, gradients[0], gammas, means, rstds, needs), *[None] * 5
            if needs[0]:
                dx = torch.empty_like(x)
        targets = [None] * len(pieces.sizes) if dx is None else pieces.cut(dx)
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
    axis, count = pieces.positions, pieces.counts[0]
    total, products = products_by_samples(pieces.samples(x), pieces.samples(dy), means, axis)
    dgammas, scales = products * rstds, rstds if gammas is None else rstds * gammas
    dx = None
    if needs[0]:
        slopes = dgammas * rstds * scales / -count
        offsets = total * scales / -count - slopes * means
        scales, slopes, offsets = (t.to(x.dtype).unsqueeze(axis) for t in (scales, slopes, offsets))
        dx = torch.empty_like(x)
        for target, its_x, its_dy in zip(*(in_blocks(pieces.grid(t)) for t in (dx, x, dy)), strict=True):
            torch.addcmul(offsets, its_x, slopes, out=target)
            torch.addcmul(target, its_dy, scales, out=target)
    return dx, dgammas.to(x.dtype) if needs[1] else None, total.to(x.dtype) if needs[2] else None


_by_pieces: Final[Callable[..., Tensor]] = _ByPieces.apply
