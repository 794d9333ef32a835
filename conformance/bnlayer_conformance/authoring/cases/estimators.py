"""Which variance enters the moving variance."""

from ..case import evaluate, train, valid

PURPOSE = "biased or unbiased moving variance, where n counts every reduced element, at every rank"

_SHAPES = [(2, 3), (3, 3), (8, 3), (2, 3, 5), (4, 3, 2, 5), (2, 3, 2, 1, 2), (1, 3, 2, 2), (2, 3, 1, 1)]

CASES = [
    *(
        valid(
            f"{estimator}-{'x'.join(map(str, shape))}",
            "The normalization is biased whatever enters the moving variance; n is not the batch size alone.",
            {"axis": 1, "moving_variance_estimator": estimator, "decay": decay},
            train(shape=shape),
            evaluate(shape=shape),
        )
        for estimator, decay in (("biased", 0.5), ("unbiased", 0.75))
        for shape in _SHAPES
    ),
    valid("n-2-doubles", "x = [[1, 2, 3], [4, 6, 9]]: the two estimators differ by a factor of 2.",
          {"moving_variance_estimator": "unbiased", "decay": 0.9}, train(x=[[1, 2, 3], [4, 6, 9]]), state="initial"),
    valid("last-axis-unbiased", "The same on the last axis of an image.",
          {"moving_variance_estimator": "unbiased"}, train(shape=(2, 3, 2, 3)), evaluate(shape=(2, 3, 2, 3))),
]  # fmt: skip
