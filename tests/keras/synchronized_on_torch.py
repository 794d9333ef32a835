"""One of several processes against the batch that they share; `test_synchronized.py` starts them."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist

from bnlayer_keras import BatchNormalization

ROWS = (2, 6, 0)
X = (np.random.default_rng(46).normal(size=(8, 4)) + np.arange(8)[:, None]).astype("f4")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def step(layer, rows):
    x = torch.tensor(X[rows], requires_grad=True)
    y = layer(x, training=True)
    (y**3).sum().backward()
    return y.detach(), x.grad


def one_of_them(rank, file):
    whole = BatchNormalization(synchronized=True, momentum=0.5)  # one replica, while there are no others
    y, dx = step(whole, slice(None))
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(ROWS))
    layer = BatchNormalization(synchronized=True, momentum=0.5)
    start = sum(ROWS[:rank])
    mine = slice(start, start + ROWS[rank])
    own_y, own_dx = step(layer, mine)
    close(own_y, y[mine])
    close(own_dx, dx[mine])
    close(layer.moving_mean.value, whole.moving_mean.value)
    close(layer.moving_variance.value, whole.moving_variance.value)
    assert int(layer.num_updates.value) == 1
    dist.destroy_process_group()


if __name__ == "__main__":
    one_of_them(int(sys.argv[1]), sys.argv[2])
