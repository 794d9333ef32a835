"""NaN and infinities in the data."""

from math import inf, nan

from ..case import evaluate, train, valid

PURPOSE = "NaN and Inf in one channel, under both policies: the other channels never notice"

CASES = [
    *(
        valid(
            f"{word}-{policy}-{estimator}",
            "One bad value in one channel; a clean step and an eval after it.",
            {"nonfinite": policy, "moving_variance_estimator": estimator},
            train(poison={(2, 1): value}),
            train(),
            evaluate(),
        )
        for word, value in (("nan", nan), ("inf", inf), ("minus-inf", -inf))
        for policy, estimator in (("propagate", "unbiased"), ("keep", "biased"))
    ),
    valid("nan-keep-image", "The same in an image, channels first.", {"nonfinite": "keep", "axis": 1},
          train(shape=(2, 3, 2, 2), poison={(0, 2, 1, 1): nan}), evaluate(shape=(2, 3, 2, 2))),
    valid("nan-keep-decay-0", "Kept means kept, also where nothing else of the old statistics would be left.",
          {"nonfinite": "keep", "decay": 0.0}, train(poison={(0, 0): nan}), evaluate()),
    valid("inf-cumulative", "A bad value propagates into a cumulative average.", {"decay": "cumulative"},
          train(poison={(1, 2): inf}), train()),
    valid("nan-eval", "In eval a bad value stays where it is.", {}, evaluate(poison={(2, 1): nan}, dy=False)),
    valid("inf-eval", "An infinity in eval stays where it is.", {}, evaluate(poison={(2, 1): inf}, dy=False)),
]  # fmt: skip
