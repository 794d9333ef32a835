"""Ghost batches as channels of their own: k ghost batches of b rows and C channels are b rows of k C channels.

So each gets its statistics, its y and its gradients from what serves a whole batch. Ghost batches' sizes differ by one
row at most, so there are two such foldings at most, and they are made of reshaping and slicing only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from bnlayer.call import CallPlan, RenormClips
from bnlayer.spec import BatchNormSpec

from .fused import paired
from .normalization import Channels, by_batch, known, parameters_of
from .orders import order_of
from .paths import PATHS, can_look
from .pieces import Pieces, by_known_pieces, by_pieces
from .statistics import Moments
from .surroundings import around
from .weights import Weights, read_weights

# Elements of a ghost batch from which on copying all into foldings takes longer than the operations of each: the two
# cross between 2^15 and 2^17 (measured), by layout.
_LARGE: Final = 1 << 16


@dataclass(frozen=True)
class Ghosts:
    """The ghost batches of one call.

    Attributes:
        strided: ghost g has rows g, g + number, ...; else they are consecutive. The larger ones come first.
        axis: x's channel axis.
        number: of ghost batches.
        rows: of each ghost batch, without the row more that the larger ones have.
        larger: how many have a row more; fewer than `number`.
    """

    strided: bool
    axis: int
    number: int
    rows: int
    larger: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """How many ghost batches of how many rows are in each folding."""
        every = [(self.larger, self.rows + 1), (self.number - self.larger, self.rows)]
        return [(k, rows) for k, rows in every if k]

    def split(self, x: Tensor) -> list[Tensor]:
        """x of shape (N, ..., C, ...) as foldings (b, ..., k C, ...): the larger ones' if any, then the others'."""
        grids = self._strided_grids(x) if self.strided else self._consecutive_grids(x)
        return [grid.movedim(1, self.axis).flatten(self.axis, self.axis + 1) for grid in grids]

    def join(self, foldings: Sequence[Tensor]) -> Tensor:
        """What `split` returned, back in x's shape."""
        grids = [
            torch.unflatten(folding, self.axis, (k, folding.shape[self.axis] // k)).movedim(self.axis, 1)
            for folding, (k, _) in zip(foldings, self.sizes, strict=True)
        ]
        if not self.strided:
            return torch.cat([grid.transpose(0, 1).flatten(0, 1) for grid in grids])
        if not self.larger:
            return grids[0].flatten(0, 1)
        larger, rest = grids
        return torch.cat([torch.cat([larger[:-1], rest], 1).flatten(0, 1), larger[-1]])

    def plans(self, plan: CallPlan) -> list[CallPlan]:
        """The plan of each folding: that of a whole batch with more channels."""
        assert plan.count is not None
        in_row = plan.count // (self.number * self.rows + self.larger)
        features = plan.channel_shape[plan.axis]
        return [
            replace(
                plan,
                count=rows * in_row,
                channel_shape=tuple(k * features if i == plan.axis else 1 for i in range(len(plan.channel_shape))),
                ghosted=False,
                ghosts=None,
            )
            for k, rows in self.sizes
        ]

    def _strided_grids(self, x: Tensor) -> list[Tensor]:
        """(rows, ghosts, ...) each."""
        whole = self.rows * self.number
        grid = torch.unflatten(x[:whole], 0, (self.rows, self.number))
        if not self.larger:
            return [grid]
        return [torch.cat([grid[:, : self.larger], x[whole:].unsqueeze(0)]), grid[:, self.larger :]]

    def _consecutive_grids(self, x: Tensor) -> list[Tensor]:
        cut = self.larger * (self.rows + 1)
        grids = [torch.unflatten(x[cut:], 0, (self.number - self.larger, self.rows)).transpose(0, 1)]
        if self.larger:
            grids.insert(0, torch.unflatten(x[:cut], 0, (self.larger, self.rows + 1)).transpose(0, 1))
        return grids


def ghosts_of(rows: int, plan: CallPlan, spec: BatchNormSpec) -> Ghosts:
    """The ghost batches of this call's rows, of which there is at least one."""
    assert spec.virtual_batch_size is not None
    number = -(-rows // spec.virtual_batch_size)
    return Ghosts(spec.virtual_batch_layout == "strided", plan.axis, number, rows // number, rows % number)


def fold_evenly(x: Tensor, number: int, strided: bool) -> Tensor | None:
    """x's ghost batches as channels of their own, (rows, ghosts C, ...); None where `Ghosts.split` has more to do, or
    pieces are the better way.

    Args:
        x: with channels on axis 1.
        number: of ghost batches.
        strided: as the spec's.
    """
    shape = x.shape
    if shape[0] % number or not x.is_contiguous() or not (strided or x.numel() < _LARGE * number):
        return None
    if not strided:
        x = torch.unflatten(x, 0, (number, -1)).transpose(0, 1)
    return x.reshape(-1, number * shape[1], *shape[2:])


def unfold_evenly(folded: Tensor, number: int, strided: bool) -> Tensor:
    """What `fold_evenly` folded, back in x's shape."""
    features = folded.shape[1] // number
    if strided:
        return folded.reshape(-1, features, *folded.shape[2:])
    return torch.unflatten(folded, 1, (number, features)).transpose(0, 1).reshape(-1, features, *folded.shape[2:])


def by_ghosts(
    x: Tensor, channels: Channels, spec: BatchNormSpec, plan: CallPlan, weights: Tensor | None, clips: RenormClips
) -> tuple[Tensor, Moments, Tensor | None]:
    """y by each ghost batch's own statistics, what enters the averages for all, and whether anything does after all.

    `weights` have the plan's `weights_shape`.
    """
    ghosts = ghosts_of(x.shape[0], plan, spec)
    if weights is None and around() in ("nothing", "recomputation"):
        pieces = pieces_of(x, ghosts)
        found = None if pieces is None else _by_pieces(x, pieces, channels, spec, clips)
        if found is not None:
            return *found, None
    plans, foldings = ghosts.plans(plan), ghosts.split(x)
    given: list[Weights | None] = [None] * len(plans)
    shares = [x.new_full((k,), rows / x.shape[0], dtype=channels.arithmetic) for k, rows in ghosts.sizes]
    entered = None
    if weights is not None:
        rows = ghosts.split(weights.expand(x.shape[0], *weights.shape[1:]))
        read = [read_weights(folding, its_plan) for folding, its_plan in zip(rows, plans, strict=True)]
        shares, entered = _shares(read)
        given = [w.for_channels(spec.num_features, plan.axis) for w in read]
    ys, parts = [], []
    for folding, its_plan, w, (k, _) in zip(foldings, plans, given, ghosts.sizes, strict=True):
        y, part = by_batch(folding, replace(channels, times=k), spec, its_plan, w, clips, None)
        ys.append(y)
        parts.append(part)
    return ghosts.join(ys), _combined(parts, torch.cat(shares), spec.num_features), entered


def pieces_of(x: Tensor, ghosts: Ghosts) -> Pieces | None:
    """How to cut x, where that is the path to take."""
    sizes = tuple(rows for k, rows in ghosts.sizes for _ in range(k))
    in_row = x.numel() // (x.shape[0] * x.shape[ghosts.axis])
    if ghosts.rows * in_row <= 1 or (ghosts.strided and ghosts.larger) or not can_look(x):
        return None
    order = order_of(x, ghosts.axis)
    if order is None:
        return None
    # Strided foldings of channels that are not innermost are views.
    copied = order.innermost and in_row > 1 if ghosts.strided else True
    fastest = "pieces" if copied and x.numel() >= _LARGE * len(sizes) else "foldings"
    if PATHS.chosen(fastest, ("pieces", "foldings")) == "foldings":
        return None
    return Pieces(order, x.shape, sizes, ghosts.strided)


def averaged(means: Tensor, variances: Tensor, pieces: Pieces) -> Moments:
    """What enters the averages for pieces with these statistics, (G, C): their means by shares of the batch."""
    counts = pieces.counts
    if pieces.even:
        variance = variances.mean(0)
        return Moments(means.mean(0), variance, variance * (counts[0] / (counts[0] - 1)))
    by_ghost = means.new_tensor(counts).unsqueeze(1)
    shares = by_ghost / by_ghost.sum()
    return Moments(
        (shares * means).sum(0),
        (shares * variances).sum(0),
        (shares * (by_ghost / (by_ghost - 1.0)) * variances).sum(0),
    )


def _by_pieces(
    x: Tensor, pieces: Pieces, channels: Channels, spec: BatchNormSpec, clips: RenormClips
) -> tuple[Tensor, Moments] | None:
    """As `by_ghosts`; None where a ghost batch's statistics come as those of its folding only."""
    wide = x.to(channels.arithmetic)  # once, so that a half x's gradients add up in float32
    if spec.renorm is None:
        given = by_pieces(wide, pieces, paired(channels.gamma, channels.beta), channels.beta, spec.epsilon)
        if given is not None:
            y, means, variances = given
            return y.to(x.dtype), averaged(means, variances, pieces)
    found = []
    for part in pieces.one_by_one(wide.detach()):
        its = known(part, 1, part.numel() // spec.num_features, spec.epsilon)
        if its is None:
            return None
        _, batch = its
        found.append((batch, *parameters_of(channels, spec, batch, clips)))
    batches, *parameters = zip(*found, strict=True)
    means, variances = (torch.stack([getattr(batch, name) for batch in batches]) for name in ("mean", "variance"))
    gammas, betas = (None if each[0] is None else torch.stack(each) for each in parameters)
    y = by_known_pieces(wide, pieces, gammas, betas, means, variances, spec.epsilon)
    return y.to(x.dtype), averaged(means, variances, pieces)


def _shares(weights: Sequence[Weights]) -> tuple[list[Tensor], Tensor]:
    """Each ghost batch's share of the total weight, and whether there is any."""
    largest = torch.cat([w.largest for w in weights]).amax()
    present = largest != 0
    totals = [w.total * (w.largest / torch.where(present, largest, 1.0)) for w in weights]
    total = torch.cat(totals).sum()
    return [part / torch.where(present, total, 1.0) for part in totals], present


def _combined(parts: Sequence[Moments], share: Tensor, features: int) -> Moments:
    """What enters the averages: the means of the ghost batches' statistics by their shares of the total weight."""

    def mean(values: Sequence[Tensor]) -> Tensor:
        every = torch.cat([value.detach().reshape(-1, features) for value in values])
        # What has no weight takes no part, whatever its statistics are.
        by_ghost = share.unsqueeze(1).to(every.dtype)
        return (by_ghost * torch.where(by_ghost == 0, 0.0, every)).sum(0)

    return Moments(
        mean([part.mean for part in parts]),
        mean([part.variance for part in parts]),
        mean([part.unbiased for part in parts]),
    )
