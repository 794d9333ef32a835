"""A population's moments over the processes of a torch.distributed group."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce as fold
from operator import add

import numpy as np
import torch
from torch import distributed

from bnlayer.contract import NDArray
from bnlayer.surgery.moments import Moments
from bnlayer.surgery.recalibrate import Population


def all_reduce(mine: Population, group: distributed.ProcessGroup | None = None) -> Population:
    """The population of all processes; the same bits on each. For `bnlayer.surgery.recalibrate.recalibrate(reduce=)`.

    The shards are added in the order of the ranks, in float64, so that the result does not depend on timing.

    Args:
        mine: this process's; every process must have the same batch norms, and may have had no batch.
        group: None: the default group, which must be initialized. Its backend must take tensors where
            `torch.get_default_device()` puts them.
    """
    layers = mine.layers
    rows = [np.concatenate([[one.count], one.mean, one.m2]) for one in layers.values()]
    flat = torch.as_tensor(np.concatenate([[float(mine.batches)], *rows]), device=torch.get_default_device())
    shards = [torch.empty_like(flat) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(shards, flat, group=group)
    return fold(add, (_population(shard.cpu().numpy(), layers) for shard in shards))


def _population(flat: NDArray, layers: Mapping[str, Moments]) -> Population:
    found, start = {}, 1
    for name, one in layers.items():
        size = len(one.mean)
        row = flat[start : start + 1 + 2 * size]
        found[name] = Moments(int(row[0]), row[1 : 1 + size], row[1 + size :])
        start += 1 + 2 * size
    return Population(found, int(flat[0]))
