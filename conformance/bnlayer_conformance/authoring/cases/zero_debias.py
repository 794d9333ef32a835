"""Moving averages that start from 0 and are divided by the share of them that is data."""

from ..case import evaluate, rebuild, set_state, train, valid

PURPOSE = "zero-debiased averages: of the mean, of mean and variance, with every kind of update and of none"

_WEIGHTS = [1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 0.125, 1.5]
_FAR = {"moving_mean": [5.0, -3.0, 0.5], "moving_variance": [4.0, 0.25, 9.0]}

CASES = [
    *(
        valid(
            f"{kind}-{estimator}-steps-{steps}",
            "moving = hidden / (1 - decay**t) after every step; 'mean' leaves the variance a plain average.",
            {"zero_debias": kind, "moving_variance_estimator": estimator, "decay": 0.9},
            *[train(dy=False) for _ in range(steps)],
            evaluate(),
            state="initial",
        )
        for kind, estimator in (("mean", "biased"), ("all", "biased"), ("all", "unbiased"), ("mean", "unbiased"))
        for steps in (1, 3)
    ),
    *(
        valid(f"{kind}-decay-{decay}", "A decay near 1 leaves a small share after two steps; 0 leaves all.",
              {"zero_debias": kind, "decay": decay}, train(), train(dy=False), evaluate(), state="initial")
        for kind in ("mean", "all")
        for decay in (0.0, 0.5, 0.999, 0.99999)
    ),
    valid("all-ten-steps", "Ten steps.", {"zero_debias": "all", "decay": 0.99}, *[train(dy=False) for _ in range(10)], evaluate(), state="initial"),
    valid("eval-before-training", "At 0 updates eval uses the stored moving statistics.", {"zero_debias": "all"}, evaluate(), state=_FAR),
    valid("all-from-equinox", "A hidden variance that starts at 1 is carried on as it is.", {"zero_debias": "all", "decay": 0.99},
          train(dy=False), train(dy=False), evaluate(), state={"hidden_variance": [1.0, 1.0, 1.0]}),
    valid("all-goes-on", "Hidden averages and counter from another framework.", {"zero_debias": "all", "decay": 0.75}, train(), evaluate(),
          state={"num_updates": 3, "hidden_mean": [0.25, -0.5, 1.0], "hidden_variance": [0.5, 1.0, 2.0]}),
    valid("mean-goes-on", "The same for the mean alone.", {"zero_debias": "mean", "decay": 0.75}, train(), evaluate(),
          state={"num_updates": 3, "hidden_mean": [0.25, -0.5, 1.0]}),
    valid("all-rebuild", "Hidden averages survive an export.", {"zero_debias": "all"}, train(dy=False), train(dy=False), rebuild(),
          train(), evaluate(), state="initial"),
    valid("all-counter-set", "The counter set between steps is the next division's.", {"zero_debias": "all"}, train(dy=False),
          set_state(num_updates=9), train(dy=False), evaluate(), state="initial"),
    valid("all-empty", "An empty batch is no step.", {"zero_debias": "all"}, train(dy=False), train(shape=(0, 3)), train(dy=False), evaluate(), state="initial"),
    valid("all-no-update", "Nor is one with update_stats=False.", {"zero_debias": "all"}, train(dy=False), train(update_stats=False), train(dy=False), evaluate(), state="initial"),
    valid("all-frozen", "Nor a frozen one.", {"zero_debias": "all"}, train(dy=False), train(frozen_statistics=True), train(dy=False), evaluate(), state="initial"),
    valid("all-nothing-weighted", "Nor one without weight.", {"zero_debias": "all"}, train(dy=False), train(weights=[False] * 8), train(dy=False), evaluate(), state="initial"),
    valid("all-weighted", "A weighted batch is one step whatever its total.", {"zero_debias": "all", "moving_variance_estimator": "unbiased"},
          train(weights=_WEIGHTS, weights_dtype="float32"), train(weights=[0.125] * 8, weights_dtype="float32"), evaluate(), state="initial"),
    valid("mean-image", "In an image, channels first.", {"zero_debias": "mean", "axis": 1}, train(shape=(2, 3, 2, 2)), evaluate(shape=(2, 3, 2, 2)), state="initial"),
    valid("all-float64", "In float64.", {"zero_debias": "all", "param_dtype": "float64", "stats_dtype": "float64", "decay": 0.999},
          train(dtype="float64"), train(dtype="float64"), evaluate(dtype="float64"), state="initial"),
    valid("all-float16", "Half data, float32 averages.", {"zero_debias": "all"}, train(dtype="float16"), evaluate(dtype="float16"), state="initial"),
    valid("all-affineless", "Without gamma and beta.", {"zero_debias": "all", "center": False, "scale": False}, train(), evaluate(), state="initial"),
    valid("all-propagates-nan", "A bad value stays in the hidden averages.", {"zero_debias": "all"}, train(poison={(0, 1): float("nan")}, dy=False),
          train(dy=False), state="initial"),
]  # fmt: skip
