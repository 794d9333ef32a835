"""gamma and beta: there or not, negative, zero, large."""

from ..case import evaluate, train, valid

PURPOSE = "gamma and beta: present or absent, of either sign, at every rank"

CASES = [
    *(
        valid(
            f"center-{center}-scale-{scale}-rank-{len(shape)}".lower(),
            "The four combinations of center and scale, in training and in eval.",
            {"center": center, "scale": scale},
            train(shape=shape),
            evaluate(shape=shape),
        )
        for center in (True, False)
        for scale in (True, False)
        for shape in ((6, 3), (4, 2, 5, 3))
    ),
    valid("negative-gamma", "A negative gamma mirrors the output; its sign must reach dx.", {},
          train(), evaluate(), state={"gamma": [-1.25, 0.75, -0.5]}),
    valid("zero-gamma", "gamma 0, as in the last batch norm of a fresh residual block: y = beta, dx = 0.", {},
          train(), evaluate(), state={"gamma": [0.0, 1.0, 0.0]}),
    valid("large-gamma-small-beta", "gamma 100 against beta 0.01.", {}, train(), evaluate(),
          state={"gamma": [100.0, -100.0, 1.0], "beta": [0.01, 0.01, -0.01]}),
    valid("large-beta", "beta 1000 must not cost y more than its own rounding.", {}, train(), evaluate(),
          state={"beta": [1000.0, -1000.0, 0.0]}),
    valid("one-channel", "A single channel.", {"num_features": 1}, train(shape=(7, 1)), evaluate(shape=(7, 1))),
    valid("many-channels", "More channels than rows.", {"num_features": 37}, train(shape=(5, 37)), evaluate(shape=(3, 37))),
]  # fmt: skip
