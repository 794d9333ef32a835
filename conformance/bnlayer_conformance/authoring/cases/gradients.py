"""First-order gradients, with random dy: a constant dy would hide the batch's part in them."""

import numpy as np

from ..case import evaluate, train, valid

PURPOSE = "gradients: random, constant, one-hot and large dy, small and large variances, every mode"

_ONE_HOT = np.zeros((8, 3), np.float32)
_ONE_HOT[2, 1] = 1.0

CASES = [
    valid("random", "Random dy, ordinary data.", {}, train(shape=(32, 3)), evaluate(shape=(32, 3))),
    valid("constant", "dy = 1 everywhere: dx = 0 in training, the batch takes it all back.", {}, train(dy=np.ones((8, 3), np.float32)),
          evaluate(dy=np.ones((8, 3), np.float32))),
    valid("one-hot", "dy at one place: through the statistics it reaches every row of its channel, and no other.", {},
          train(dy=_ONE_HOT), evaluate(dy=_ONE_HOT)),
    valid("zero", "dy = 0.", {}, train(dy=np.zeros((8, 3), np.float32))),
    valid("large", "dy of 1e6 beside dy of 1e-6.", {},
          train(dy=np.linspace(-1e6, 1e6, 24, dtype=np.float32).reshape(8, 3))),
    valid("small-variance", "dx grows by 1/sd.", {"epsilon": 1e-8}, train(std=1e-3), evaluate(std=1e-3),
          state={"moving_variance": [1e-6, 1e-4, 1.0]}),
    valid("large-variance", "dgamma is in units of xhat, not of x.", {}, train(std=1e3), evaluate(std=1e3),
          state={"moving_variance": [1e6, 1e4, 1.0]}),
    valid("parallel-to-xhat", "dy along xhat: all of it goes through the variance.", {"epsilon": 1e-5, "num_features": 1},
          train(x=[[-2.0], [-1.0], [1.0], [2.0]], dy=[[-2.0], [-1.0], [1.0], [2.0]])),
    valid("image", "N, H and W are summed alike.", {"axis": 1}, train(shape=(4, 3, 2, 5)), evaluate(shape=(4, 3, 2, 5))),
    valid("image-channels-last", "The same, channels last.", {}, train(shape=(4, 2, 5, 3)), evaluate(shape=(4, 2, 5, 3))),
    valid("eval-far-statistics", "Eval's dx does not see the batch.", {}, evaluate(mean=50.0, std=0.1),
          state={"moving_mean": [-5.0, 0.0, 7.0], "moving_variance": [1e-2, 1.0, 1e4]}),
    valid("two-rows", "Two rows: xhat is +-1 nearly, dx nearly 0.", {"epsilon": 1e-5}, train(shape=(2, 3))),
    valid("scale-only", "beta absent: only dgamma.", {"center": False}, train(shape=(16, 3))),
    valid("center-only", "gamma absent: only dbeta, dx without gamma.", {"scale": False}, train(shape=(16, 3))),
]  # fmt: skip
