"""Statistics over several replicas: whatever rows each has, the result is that of the one big batch."""

from ..case import call_twice, evaluate, invalid, train, valid

PURPOSE = "synchronized: the rows of one batch on three replicas, evenly or not, empty, masked and weighted"

_SYNC = {"synchronized": True}
_UNBIASED = {**_SYNC, "moving_variance_estimator": "unbiased"}

CASES = [
    valid("uneven-and-empty", "2, 6 and 0 rows: the means count by rows, and n of the unbiased variance is 8.", _UNBIASED,
          train(shape=(8, 3), shards=(2, 6, 0)), evaluate(shape=(8, 3), shards=(2, 6, 0))),
    valid("uneven-biased", "The same, biased.", _SYNC, train(shape=(8, 3), shards=(2, 6, 0))),
    valid("even", "As many rows on each.", _UNBIASED, train(shape=(9, 3), shards=(3, 3, 3)), train(shape=(9, 3), shards=(3, 3, 3))),
    valid("single-rows", "One row each: three values a channel are enough.", _UNBIASED, train(shape=(3, 3), shards=(1, 1, 1))),
    valid("one-row-in-all", "One row on one replica, and one value is allowed.", {**_UNBIASED, "single_value": "allow"},
          train(shape=(1, 3), shards=(0, 1, 0))),
    invalid("one-row-in-all-raise", "One row on one replica is one value per channel.", _UNBIASED,
            train(shape=(1, 3), shards=(0, 1, 0)), error="InputError", at=0, state="drawn"),
    valid("all-empty", "No rows anywhere: nothing enters, nothing is counted.", _UNBIASED,
          train(shape=(0, 3), shards=(0, 0, 0)), train(shape=(8, 3), shards=(4, 0, 4))),
    valid("one-replica", "One replica is a plain batch norm.", _UNBIASED, train(shape=(8, 3), shards=(8,))),
    valid("no-replicas", "Outside of any engine: one replica.", _UNBIASED, train(shape=(8, 3)), evaluate(shape=(8, 3))),
    valid("apart", "Replicas far apart: the variance is mostly that between them.", _UNBIASED,
          train(shape=(8, 3), shards=(4, 3, 1), x=[[100.0, -3.0, 0.5]] * 4 + [[-100.0, 7.0, 0.25], [-101.0, 6.0, 0.75], [-99.5, 5.0, 1.0], [0.0, 0.5, 9.0]])),
    valid("offset", "A mean far from 0: no sums of squares.", _SYNC, train(shape=(8, 3), mean=1000.0, std=1.0, shards=(3, 3, 2))),
    valid("image", "Channels first; n counts pixels.", {**_UNBIASED, "axis": 1}, train(shape=(5, 3, 2, 2), shards=(1, 4, 0))),
    valid("masked", "By the rows that count: 1 of 4 here, 4 of 4 there.", _UNBIASED,
          train(shape=(8, 3), weights=[1, 0, 0, 0, 1, 1, 1, 1], shards=(4, 4, 0))),
    valid("masked-away", "One replica's rows are all masked.", _UNBIASED,
          train(shape=(8, 3), weights=[0, 0, 0, 1, 1, 1, 0, 1], shards=(3, 3, 2))),
    valid("all-masked", "No weight anywhere: the moving statistics normalize.", _UNBIASED,
          train(shape=(6, 3), weights=[0] * 6, shards=(2, 4, 0))),
    valid("weighted", "Real weights and their gradient.", _UNBIASED,
          train(shape=(6, 3), weights=[0.5, 2.0, 0.0, 1.0, 0.25, 3.0], weights_dtype="float32", shards=(2, 4, 0))),
    valid("steps-masked", "Masked sequences: weights per row and time.", {**_UNBIASED},
          train(shape=(3, 4, 3), weights=[[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], shards=(1, 2, 0))),
    valid("cumulative", "The plain average of all updates.", {**_UNBIASED, "decay": "cumulative"},
          train(shape=(8, 3), shards=(2, 6, 0)), train(shape=(4, 3), shards=(1, 1, 2))),
    valid("call-twice", "Two calls, then one backward pass.", _UNBIASED,
          call_twice({"shape": (8, 3)}, {"shape": (8, 3)}, shards=(5, 3, 0))),
    valid("no-update", "update_stats=False: global statistics normalize, and nothing enters.", _UNBIASED,
          train(shape=(8, 3), shards=(2, 6, 0), update_stats=False)),
    valid("frozen", "Frozen statistics need no replica.", _UNBIASED, train(shape=(8, 3), shards=(2, 6, 0), frozen_statistics=True)),
    valid("keep-nonfinite", "A NaN on one replica keeps that channel's statistics on all.", {**_SYNC, "nonfinite": "keep"},
          train(shape=(8, 3), shards=(2, 6, 0), poison={(1, 2): float("nan")}, dy=False)),
    valid("no-tracking", "Without moving statistics.", {**_SYNC, "track_moving_stats": False}, train(shape=(8, 3), shards=(2, 6, 0))),
    valid("second-order", "The second order goes through the statistics of all replicas as well.", _UNBIASED,
          train(shape=(8, 3), shards=(2, 4, 2), direction=True)),
    valid("renorm", "Renormalization against the averages that all replicas share.",
          {**_SYNC, "renorm": {"r_max": 1.5, "r_min": None, "d_max": 0.5, "decay": 0.9}}, train(shape=(8, 3), shards=(2, 6, 0))),
    valid("zero-debias", "The averages from zero, over all replicas.", {**_UNBIASED, "zero_debias": "all"},
          train(shape=(8, 3), shards=(2, 6, 0)), train(shape=(8, 3), shards=(4, 2, 2))),
    valid("half", "Half inputs, float32 statistics.", _UNBIASED, train(shape=(8, 3), dtype="float16", shards=(2, 6, 0))),
    valid("float64", "In float64.", {**_UNBIASED, "param_dtype": "float64", "stats_dtype": "float64"},
          train(shape=(8, 3), dtype="float64", shards=(2, 6, 0))),
]  # fmt: skip
