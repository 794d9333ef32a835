"""Training, eval, and what lies between."""

from ..case import evaluate, train, valid

PURPOSE = "which statistics normalize and whether they move: frozen, update_stats, no tracking, eval first"

_FAR = {"moving_mean": [5.0, -3.0, 0.5], "moving_variance": [4.0, 0.25, 9.0]}

CASES = [
    valid("eval-before-training", "From the initial statistics, eval divides by sqrt(1 + epsilon).", {}, evaluate(), state="initial"),
    valid("eval-uses-moving", "Moving statistics far from the batch's: eval must use them, and only them.", {}, evaluate(mean=-4.0, std=0.5), state=_FAR),
    valid("eval-moves-nothing", "Two evals leave the same statistics and counter.", {}, evaluate(), evaluate(), state=_FAR),
    valid("train-uses-batch", "Moving statistics far from the batch's: training must not use them.", {}, train(mean=-4.0, std=0.5), state=_FAR),
    valid("train-ignores-weights-of-eval", "Train, eval, train: a call leaves nothing behind but its update.", {},
          train(), evaluate(), train(), state=_FAR),
    valid("frozen-train", "Frozen statistics in training: the eval formula and its gradients, nothing moves.", {},
          train(frozen_statistics=True), state=_FAR),
    valid("frozen-then-thawed", "Freezing does not survive its end.", {}, train(frozen_statistics=True), train(), evaluate(), state=_FAR),
    valid("frozen-eval", "Frozen in eval is eval.", {}, evaluate(frozen_statistics=True), state=_FAR),
    valid("frozen-cumulative", "Frozen steps do not count.", {"decay": "cumulative"}, train(), train(frozen_statistics=True), train(), evaluate()),
    valid("frozen-one-row", "Frozen statistics take a single row.", {}, train(shape=(1, 3), frozen_statistics=True), state=_FAR),
    valid("frozen-weighted", "Frozen statistics ignore weights.", {},
          train(frozen_statistics=True, weights=[1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 0.125, 1.5], weights_dtype="float32"), state=_FAR),
    valid("no-update", "update_stats=False: batch statistics normalize, nothing moves.", {}, train(update_stats=False), evaluate(), state=_FAR),
    valid("no-update-cumulative", "Nor does the counter.", {"decay": "cumulative"}, train(), train(update_stats=False), train(), evaluate()),
    valid("no-update-eval", "update_stats means nothing in eval.", {}, evaluate(update_stats=False), state=_FAR),
    valid("no-update-unbiased", "The estimator has no say in y.", {"moving_variance_estimator": "unbiased"}, train(update_stats=False, shape=(2, 3)), state=_FAR),
    valid("untracked-train", "No moving statistics: training as ever.", {"track_moving_stats": False}, train()),
    valid("untracked-eval", "No moving statistics: batch statistics in eval, with their gradients.", {"track_moving_stats": False}, evaluate()),
    valid("untracked-affineless", "Nothing at all to keep.", {"track_moving_stats": False, "center": False, "scale": False}, train(), evaluate()),
    valid("untracked-image", "In an image, channels first, unbiased estimator without meaning.",
          {"track_moving_stats": False, "axis": 1, "moving_variance_estimator": "unbiased"}, evaluate(shape=(2, 3, 2, 2))),
    valid("eval-channels-first", "Eval of images, channels first.", {"axis": 1}, evaluate(shape=(2, 3, 4, 2)), state=_FAR),
]  # fmt: skip
