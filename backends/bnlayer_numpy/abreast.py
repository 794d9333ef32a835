"""Strided ghost batches side by side: where channels follow the batch axis, G of them are one batch of G times the
channels.

Row i G + g is ghost g's row i. So x of shape (N, C, ...), read as (N/G, G C, ...), has the channels of ghost g from g C
on, and everything that holds per channel holds for each ghost's own: one pass over adjacent memory, not G over rows
that are not adjacent (2.2 of the time without ghosts at (65536, 64)).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .cache import Cache, NDArray
from .statistics import Moments, completed


def ghosts_abreast(x: NDArray, spec: BatchNormSpec, plan: CallPlan) -> int:
    """How many ghost batches of x can be read side by side; 0 where they cannot, or are not worth it."""
    if plan.ghosts is None or spec.virtual_batch_layout != "strided" or plan.axis != 1 or not x.flags.c_contiguous:
        return 0
    ghosts = len(plan.ghosts)
    return ghosts if ghosts > 1 and len(x) % ghosts == 0 else 0


def widened(x: NDArray, state: BatchNormState[NDArray], spec: BatchNormSpec, ghosts: int) -> tuple[
    NDArray, BatchNormState[NDArray], BatchNormSpec
]:  # fmt: skip
    """x, what of the state normalizes a batch by its own statistics, and the spec: with the ghosts' channels."""

    def repeated(values: NDArray | None) -> NDArray | None:
        return None if values is None else np.concatenate([values] * ghosts)

    wide = BatchNormState(
        gamma=repeated(state.gamma),
        beta=repeated(state.beta),
        moving_mean=None,
        moving_variance=None,
        renorm_mean=repeated(state.renorm_mean),
        renorm_stddev=repeated(state.renorm_stddev),
    )
    return x.reshape(len(x) // ghosts, ghosts * x.shape[1], *x.shape[2:]), wide, _widened_spec(spec, ghosts)


@lru_cache(maxsize=256)
def _widened_spec(spec: BatchNormSpec, ghosts: int) -> BatchNormSpec:
    return replace(spec, num_features=ghosts * spec.num_features, axis=1, virtual_batch_size=None)


def narrowed(cache: Cache, ghosts: int, plan: CallPlan) -> Moments:
    """The means of the ghosts' moments, which enter the averages."""
    (part,) = cache.parts
    count = cache.x.size // part.mean.size
    mean, variance = (
        each.reshape(ghosts, -1).mean(0).reshape(plan.channel_shape) for each in (part.mean, part.variance)
    )
    return completed(mean, variance, None, count)
