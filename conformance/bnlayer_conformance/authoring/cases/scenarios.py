"""Several steps, as in a life."""

from ..case import call_twice, evaluate, rebuild, set_state, train, valid

PURPOSE = "whole scenarios: rebuild in the middle, the same layer twice, parameters that an optimizer moves"

CASES = [
    *(
        valid(
            f"rebuild-{name}",
            "Export, build anew, go on: nothing may be lost on the way.",
            spec,
            train(dy=False),
            train(dy=False),
            rebuild(),
            train(),
            evaluate(),
        )
        for name, spec in (
            ("plain", {}),
            ("unbiased", {"moving_variance_estimator": "unbiased"}),
            ("cumulative", {"decay": "cumulative"}),
            ("decay-0.5-affineless", {"decay": 0.5, "center": False, "scale": False}),
        )
    ),
    valid("rebuild-untracked", "Without statistics there are only parameters to carry.", {"track_moving_stats": False}, train(), rebuild(), evaluate()),
    valid("rebuild-float64", "In float64 the export must not round.", {"param_dtype": "float64", "stats_dtype": "float64"},
          train(dtype="float64"), rebuild(), train(dtype="float64"), evaluate(dtype="float64")),
    valid("rebuild-after-nan", "A poisoned channel is exported as it is.", {}, train(poison={(0, 1): float("nan")}, dy=False), rebuild(), evaluate(dy=False)),
    valid("call-twice", "Two calls before the backward pass: two updates, in order, gradients of both.", {}, call_twice({}, {"mean": -2.0}), evaluate()),
    valid("call-twice-cumulative", "The second call counts on from the first.", {"decay": "cumulative"}, call_twice({}, {"mean": -2.0}), evaluate()),
    valid("call-twice-decay-0.5", "One update must not overwrite the other.", {"decay": 0.5, "moving_variance_estimator": "unbiased"},
          call_twice({}, {"mean": 3.0, "std": 0.5}), evaluate()),
    valid("call-twice-shapes", "Two calls of different sizes.", {}, call_twice({"shape": (4, 3)}, {"shape": (9, 3)}), evaluate()),
    valid("call-twice-image", "Two calls on images, channels first.", {"axis": 1}, call_twice({"shape": (2, 3, 2, 2)}, {"shape": (2, 3, 2, 2)})),
    valid("call-twice-one-masked", "A masked call and a plain one.", {},
          call_twice({"weights": [True, False, True, True, False, True, True, False]}, {})),
    valid("eval-and-train-then-backward", "Kept apart in memory: an eval between two trainings does not see what comes after it.",
          {"axis": 1, "moving_variance_estimator": "unbiased"}, train(shape=(4, 3, 2, 2)), evaluate(shape=(4, 3, 2, 2)),
          call_twice({"shape": (4, 3, 2, 2)}, {"shape": (2, 3, 2, 2), "mean": 5.0}), evaluate(shape=(4, 3, 2, 2))),
    valid("optimizer-step", "Parameters move between steps; statistics go on.", {}, train(), set_state(gamma=[0.9, 1.1, -0.3], beta=[0.1, 0.0, -0.2]),
          train(), evaluate()),
    valid("statistics-set", "Statistics set between steps are what the next average starts from.", {}, train(dy=False),
          set_state(moving_mean=[1.0, 2.0, 3.0], moving_variance=[4.0, 5.0, 6.0]), train(dy=False), evaluate()),
    valid("ten-steps", "Ten steps, each of another size.", {"decay": 0.75, "moving_variance_estimator": "unbiased"},
          *[train(shape=(2 + k, 3), dy=False) for k in range(10)], evaluate()),
    valid("dense-unit-in-tensorflow", "A Dense unit with weight 1.4059724 before the layer, one training step, Adam moves "
          "all three weights, eval: the numbers a TensorFlow tutorial user would see.",
          {"num_features": 1, "decay": 0.5, "epsilon": 1e-3}, train(x=[[0.0], [1.4059724]]),
          set_state(gamma=[0.999], beta=[-0.001]), evaluate(x=[[0.0], [1.404974]]), state="initial"),
]  # fmt: skip
