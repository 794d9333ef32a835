"""A model and batches; run as a script, one process of three that share the batches: RANK FOLDER."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import nn

import bnlayer_torch
from bnlayer.surgery.recalibrate import recalibrate

X = np.random.default_rng(3).normal(size=(13, 5, 5, 3)).astype("f4")
BATCHES = [X[:4], X[4:5], X[5:]]


def build() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), bnlayer_torch.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4)
    )


def main(rank: int, folder: str) -> None:
    from bnlayer_torch.populations import all_reduce

    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    mine = ([], BATCHES[:1], BATCHES[1:])[rank]  # the first has no data at all
    model = recalibrate(build(), mine, reduce=all_reduce)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
