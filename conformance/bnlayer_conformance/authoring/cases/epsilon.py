"""epsilon inside the square root, never floored."""

from ..case import evaluate, train, valid

PURPOSE = "epsilon against variances of its own size, in training and in eval"

_SMALL = {"moving_mean": [0.0, 1e-3, -1e-3], "moving_variance": [1e-6, 4e-6, 2.5e-7]}

CASES = [
    *(
        valid(
            f"{epsilon:g}-variance-1e-6",
            "Variance 1e-6: epsilon decides the output, outside the root or floored it shows.",
            {"epsilon": epsilon},
            train(shape=(16, 3), mean=0.0, std=1e-3),
            evaluate(shape=(4, 3), mean=0.0, std=1e-3),
            state=_SMALL,
        )
        for epsilon in (1e-8, 1e-5, 1e-3, 0.1)
    ),
    *(
        valid(
            f"{epsilon:g}-variance-1",
            "Ordinary variance, with the epsilon of another framework.",
            {"epsilon": epsilon},
            train(shape=(16, 3)),
            evaluate(shape=(4, 3)),
        )
        for epsilon in (1e-12, 1e-5, 1e-3, 0.1, 1.0)
    ),
    valid("0", "epsilon 0 is allowed where the variance is not 0.", {"epsilon": 0.0},
          train(), evaluate()),
    valid("ported", "Moving variances .04 and 9e-4, where 1e-3 read as 1e-5 shows in eval.", {"epsilon": 1e-3, "num_features": 2},
          evaluate(shape=(4, 2), mean=0.0, std=0.1), state={"moving_variance": [0.04, 9e-4]}),
    valid("eval-variance-0", "A moving variance of exactly 0 leaves epsilon alone under the root.", {"epsilon": 1e-3},
          evaluate(), state={"moving_variance": [0.0, 1.0, 0.0]}),
    valid("1e-5-float64", "In float64, where nothing of epsilon may be lost to rounding.", {"epsilon": 1e-5,
          "param_dtype": "float64", "stats_dtype": "float64"}, train(dtype="float64", std=1e-4), evaluate(dtype="float64")),
]  # fmt: skip
