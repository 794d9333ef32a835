"""Second-order gradients: the derivative of dx along a direction, where a stopped gradient or a missing term shows."""

from ..case import call_twice, evaluate, train, valid

PURPOSE = "second order: the derivative of dx along a direction, plain, weighted, renormalized, in ghosts, in eval"

_GHOSTS = {"virtual_batch_size": 4, "virtual_batch_layout": "consecutive"}
_RENORM = {"r_max": 1.5, "r_min": None, "d_max": 0.5, "decay": 0.9}

CASES = [
    valid("random", "Ordinary data: a variance whose mean is taken for a constant is right to first order, not here.", {},
          train(shape=(16, 3), direction=True)),
    valid("image", "Channels first.", {"axis": 1, "moving_variance_estimator": "unbiased"}, train(shape=(4, 3, 2, 5), direction=True)),
    valid("image-channels-last", "Channels last.", {}, train(shape=(4, 2, 5, 3), direction=True)),
    valid("image-channels-last-unbiased", "The same, as a fused kernel of images has it.", {"moving_variance_estimator": "unbiased"},
          train(shape=(4, 2, 5, 3), direction=True)),
    valid("two-rows", "Two rows: dx nearly 0, its derivative too.", {"moving_variance_estimator": "unbiased", "axis": 1}, train(shape=(2, 3), direction=True)),
    valid("constant-direction", "Along a constant x only shifts: 0.", {},
          train(shape=(8, 3), direction=[[1.0, -2.0, 0.5]] * 8)),
    valid("offset", "A mean ten deviations away.", {}, train(shape=(16, 3), mean=10.0, std=1.0, direction=True)),
    valid("small-variance", "1/sd enters three times.", {"epsilon": 1e-5}, train(shape=(16, 3), std=0.05, direction=True, direction_std=0.05)),
    valid("eval", "In eval y is linear in x: 0.", {}, evaluate(shape=(8, 3), direction=True)),
    valid("no-scale", "Without gamma.", {"scale": False}, train(shape=(16, 3), direction=True)),
    valid("no-tracking", "Batch statistics in eval too.", {"track_moving_stats": False}, evaluate(shape=(16, 3), direction=True)),
    valid("masked", "Masked rows follow the statistics, which do not follow them.", {},
          train(shape=(12, 3), weights=[1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1], direction=True)),
    valid("weighted", "Real weights.", {}, train(shape=(6, 3), weights=[0.5, 2.0, 0.0, 1.0, 0.25, 3.0], weights_dtype="float32", direction=True)),
    valid("ghosts", "Each ghost its own.", _GHOSTS, train(shape=(12, 3), direction=True)),
    valid("renorm", "r and d are constants of the second order too.", {"renorm": _RENORM}, train(shape=(16, 3), direction=True)),
    valid("adjustment", "The adjustment scales dy.", {}, train(shape=(8, 3), direction=True, adjustment=([[1.5]], [[0.25]]))),
    valid("call-twice", "Two calls of one layer, each along its own direction.", {},
          call_twice({"shape": (8, 3), "direction": True}, {"shape": (5, 3), "direction": True})),
    valid("float64", "In float64.", {"param_dtype": "float64", "stats_dtype": "float64"}, train(shape=(16, 3), dtype="float64", direction=True)),
]  # fmt: skip
