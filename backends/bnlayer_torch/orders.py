"""The order in which a tensor's elements lie in memory, as one of the two that batch norm's passes are written for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_BLOCK: Final = 1 << 19


@dataclass(frozen=True)
class Order:
    """How a tensor without gaps becomes (N, C, L), or (n, C) where the channels are innermost, without a copy.

    Attributes:
        axis: the channel axis.
        place: where the channels have to be moved to, for the axes to be in the order of memory.
        merged: (N, C, L) or (n, C).
    """

    axis: int
    place: int
    merged: tuple[int, ...]

    @property
    def innermost(self) -> bool:
        """Whether the channels are."""
        return len(self.merged) == 2

    def merge(self, x: Tensor) -> Tensor:
        """A tensor of the same shape as one of `merged`, contiguous; copied where it lies in another order."""
        moved = x if self.axis == self.place else x.movedim(self.axis, self.place)
        return moved.reshape(self.merged).contiguous()

    def positions(self, values: Tensor) -> Tensor:
        """Values of x's rank, 1 long on the channel axis and broadcastable to x, as (N, 1, L) or (n, 1)."""
        moved = values if self.axis == self.place else values.movedim(self.axis, self.place)
        return moved.reshape(self.merged[0], 1, *self.merged[2:])

    def split(self, merged: Tensor, shape: torch.Size) -> Tensor:
        """One of `merged` back in the shape and the order of memory that it came from."""
        if self.axis == self.place:
            return merged.reshape(shape)
        lengths = [length for i, length in enumerate(shape) if i != self.axis]
        lengths.insert(self.place % len(shape), shape[self.axis])
        return merged.reshape(lengths).movedim(self.place, self.axis)


def in_blocks(values: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """A tensor cut along its first axis into blocks of about half a million elements.

    What is computed of one in passing then stays in the processor's caches, and finds room that the last left: fresh
    memory takes the processor longer than what is written into it.

    Args:
        values: of (N, C, L) or (n, C).
        like: cut at the same places as this one.
    """
    return torch.split(values, _rows(values if like is None else like))


def room_for_block(x: Tensor) -> Tensor:
    """Memory for what is computed of one of `in_blocks(x)`, or of the last: of its shape but for the first axis."""
    return torch.empty_like(x[: _rows(x)])


def _rows(x: Tensor) -> int:
    return max(1, len(x) * _BLOCK // max(1, x.numel()))


def order_of(x: Tensor, axis: int) -> Order | None:
    """The order of x with its channels on `axis`; None where there are gaps, or another order."""
    shape = x.shape
    features = shape[axis]
    if x.is_contiguous():
        before, behind = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        return Order(axis, axis, (before, features, behind) if behind > 1 else (before, features))
    if x.movedim(axis, -1).is_contiguous():
        return Order(axis, -1, (x.numel() // features, features))
    if x.movedim(axis, 1).is_contiguous():
        return Order(axis, 1, (shape[0], features, x.numel() // (shape[0] * features)))
    return None
