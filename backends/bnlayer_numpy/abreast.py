"""Ghost batches side by side: where channels follow the batch axis, G of them are one batch of G times the channels.

In the strided layout row i G + g is ghost g's row i. So x of shape (N, C, ...), read as (N/G, G C, ...), has the
channels of ghost g from g C on, and everything that holds per channel holds for each ghost's own: one pass over
adjacent memory, not G over rows that are not adjacent (2.2 of the time without ghosts at (65536, 64)).

Consecutive ghosts are brought into that order by a copy, where x is so small that NumPy's operations, and not its
numbers, take the time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .layout import BLOCK_BYTES, NDArray
from .statistics import Moments, completed


class Abreast(NamedTuple):
    """How arrays of one shape are read with their ghost batches side by side.

    Attributes:
        shape: of the arrays, (N, C, ...).
        ghosts: how many there are, all of one size.
        strided: which rows a ghost has: every `ghosts`-th, or the ones that follow each other.
    """

    shape: tuple[int, ...]
    ghosts: int
    strided: bool

    def widened(self, array: NDArray) -> NDArray:
        """(N, C, ...) as (N/G, G C, ...)."""
        n, c, *rest = self.shape
        rows = n // self.ghosts
        if not self.strided:
            array = array.reshape(self.ghosts, rows, -1).swapaxes(0, 1)
        return array.reshape(rows, self.ghosts * c, *rest)

    def narrowed(self, array: NDArray) -> NDArray:
        """The inverse."""
        if not self.strided:
            array = array.reshape(self.shape[0] // self.ghosts, self.ghosts, -1).swapaxes(0, 1)
        return array.reshape(self.shape)

    def added(self, values: NDArray) -> NDArray:
        """The sums over all ghosts, (C,), of what is there for each, (G C,)."""
        return np.asarray(values.reshape(self.ghosts, -1).sum(0))


def ghosts_abreast(x: NDArray, spec: BatchNormSpec, plan: CallPlan) -> Abreast | None:
    """How x can be read; None where it cannot, or it is not worth it."""
    if plan.ghosts is None or plan.axis != 1 or not x.flags.c_contiguous:
        return None
    ghosts, strided = len(plan.ghosts), spec.virtual_batch_layout == "strided"
    size = len(x) // ghosts
    worth_it = strided or (size == spec.virtual_batch_size and x.nbytes <= BLOCK_BYTES)
    return Abreast(x.shape, ghosts, strided) if worth_it and ghosts > 1 and size * ghosts == len(x) else None


def wide_call(
    x: NDArray, state: BatchNormState[NDArray], spec: BatchNormSpec, abreast: Abreast
) -> tuple[NDArray, BatchNormState[NDArray], BatchNormSpec]:
    """x, what of the state normalizes a batch by its own statistics, and the spec: with the ghosts' channels."""

    def repeated(values: NDArray | None) -> NDArray | None:
        return None if values is None else np.concatenate([values] * abreast.ghosts)

    wide = BatchNormState(
        gamma=repeated(state.gamma),
        beta=repeated(state.beta),
        moving_mean=None,
        moving_variance=None,
        renorm_mean=repeated(state.renorm_mean),
        renorm_stddev=repeated(state.renorm_stddev),
    )
    return abreast.widened(x), wide, _wide_spec(spec, abreast.ghosts)


@lru_cache(maxsize=256)
def _wide_spec(spec: BatchNormSpec, ghosts: int) -> BatchNormSpec:
    return replace(spec, num_features=ghosts * spec.num_features, axis=1, virtual_batch_size=None)


def entering(mean: NDArray, variance: NDArray, abreast: Abreast, plan: CallPlan) -> Moments:
    """The means of the ghosts' moments, which enter the averages, from those of `wide_call`."""
    ghosts = abreast.ghosts
    count = (plan.count or 0) // ghosts
    mean, variance = (abreast.added(each) / ghosts for each in (mean, variance))
    return completed(mean.reshape(plan.channel_shape), variance.reshape(plan.channel_shape), None, count)
