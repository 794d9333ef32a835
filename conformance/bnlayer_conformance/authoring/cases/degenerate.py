"""One value per channel, and none."""

from ..case import evaluate, train, valid

PURPOSE = "batches of one value per channel (allowed), of one row with several values, and empty ones"

_ALLOW = {"single_value": "allow"}

CASES = [
    *(
        valid(
            f"one-value-{'x'.join(map(str, shape))}-{estimator}",
            "One value per channel, allowed: y = beta, variance 0 enters the average, also where Bessel would say 0/0.",
            {**_ALLOW, "axis": 1, "moving_variance_estimator": estimator},
            train(shape=shape),
            evaluate(shape=shape),
        )
        for estimator in ("biased", "unbiased")
        for shape in ((1, 3), (1, 3, 1, 1))
    ),
    valid("one-row-many-values", "One row of an image is several values per channel: never refused.", {"axis": 1},
          train(shape=(1, 3, 2, 2)), evaluate(shape=(1, 3, 2, 2))),
    valid("one-row-eval", "Eval of one row is always allowed.", {}, evaluate(shape=(1, 3))),
    *(
        valid(
            f"empty-{'x'.join(map(str, shape))}-{estimator}",
            "An empty batch: empty results, zero parameter gradients, statistics and counter untouched.",
            {"axis": 1, "moving_variance_estimator": estimator},
            train(shape=shape),
            evaluate(shape=shape),
            train(shape=(4, *shape[1:]) if 0 not in shape[1:] else (4, 3, 2, 2)),
        )
        for shape, estimator in (((0, 3), "biased"), ((0, 3, 4, 4), "unbiased"), ((2, 3, 0, 4), "biased"))
    ),
    valid("empty-cumulative", "An empty batch does not count in a cumulative average.", {"decay": "cumulative"},
          train(shape=(4, 3)), train(shape=(0, 3)), train(shape=(4, 3)), evaluate()),
    valid("empty-weighted", "An empty batch with weights for none.", {},
          train(shape=(0, 3), weights=[], weights_dtype="float32")),
    valid("empty-untracked", "An empty batch without moving statistics.", {"track_moving_stats": False},
          train(shape=(0, 3)), evaluate(shape=(0, 3))),
]  # fmt: skip
