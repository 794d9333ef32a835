"""A scale and a bias of the normalized values, given with the call."""

import numpy as np

from ..case import evaluate, train, valid

PURPOSE = "adjustment: in training only, before gamma and beta, never in the statistics, in every gradient"

_PER_ROW = ([[1.0 + 0.25 * k] for k in range(8)], [[0.5 - 0.125 * k] for k in range(8)])
_PER_CHANNEL = ([1.5, 0.5, -2.0], [0.25, -0.5, 1.0])
_SCALAR = (2.0, -0.5)
_FULL = (1.0 + np.arange(24).reshape(8, 3) % 5 / 4, np.arange(24).reshape(8, 3) % 7 / 8 - 0.25)
_RENORM = {"r_max": 1.5, "r_min": 0.5, "d_max": 0.75, "decay": 0.75}
_IMAGE = (np.array([0.75, 1.25]).reshape(2, 1, 1, 1), np.array([0.5, -0.5]).reshape(2, 1, 1, 1))

CASES = [
    *(
        valid(f"{name}", "y = gamma (xhat s + b) + beta; statistics and averages do not see it.", {}, train(adjustment=adjustment), evaluate())
        for name, adjustment in (("per-row", _PER_ROW), ("per-channel", _PER_CHANNEL), ("scalar", _SCALAR), ("full", _FULL))
    ),
    valid("eval-ignores", "In eval it is ignored.", {}, evaluate(adjustment=_PER_ROW)),
    valid("frozen-ignores", "And where the statistics are frozen.", {}, train(adjustment=_PER_ROW, frozen_statistics=True)),
    valid("renorm", "After r and d.", {"renorm": _RENORM}, train(adjustment=_PER_ROW), evaluate()),
    valid("image", "One pair for each image, channels first.", {"axis": 1}, train(shape=(2, 3, 2, 2), adjustment=_IMAGE)),
    valid("weighted", "Weights in the statistics, the adjustment after them; the weights' gradient has s in it.", {},
          train(adjustment=_PER_ROW, weights=[1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 0.125, 1.5], weights_dtype="float32"), evaluate()),
    valid("nothing-weighted", "Without weight y comes by the eval formula, without the adjustment.", {}, train(adjustment=_PER_ROW, weights=[False] * 8)),
    valid("negative-gamma", "gamma scales what is adjusted.", {}, train(adjustment=_PER_CHANNEL), state={"gamma": [-1.0, 2.0, -0.5]}),
    valid("scale-only", "dgamma is the sum of dy (xhat s + b).", {"center": False}, train(adjustment=_PER_ROW)),
    valid("no-update", "With update_stats=False.", {}, train(adjustment=_PER_ROW, update_stats=False)),
    valid("untracked-eval", "Eval without statistics uses the batch's, but no adjustment.", {"track_moving_stats": False}, evaluate(adjustment=_PER_ROW)),
    valid("zero-debias", "With debiased averages.", {"zero_debias": "all"}, train(adjustment=_PER_ROW), evaluate(), state="initial"),
    valid("float16", "Half data, half adjustment.", {}, train(dtype="float16", adjustment=_PER_ROW)),
    valid("float64", "In float64.", {"param_dtype": "float64", "stats_dtype": "float64"}, train(dtype="float64", adjustment=_FULL)),
    valid("empty", "An empty batch.", {}, train(shape=(0, 3), adjustment=_PER_CHANNEL)),
]  # fmt: skip
