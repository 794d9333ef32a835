"""Batch renormalization."""

from ..case import call_twice, evaluate, rebuild, train, valid

PURPOSE = "batch renormalization: r and d from the state before, every clip, their gradients, its own averages"

_WEIGHTS = [1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 0.125, 1.5]
_CLIPS = {"r_max": 1.5, "r_min": 0.5, "d_max": 0.75}


def _renorm(
    r_max: float | None = None, r_min: float | None = None, d_max: float | None = None, decay: float = 0.75
) -> dict[str, float | None]:
    return {"r_max": r_max, "r_min": r_min, "d_max": d_max, "decay": decay}


_FREE = {"renorm": _renorm()}
_CLIPPED = {"renorm": _renorm(**_CLIPS)}
_FAR = {"renorm_mean": [4.0, -3.0, 0.5], "renorm_stddev": [0.25, 4.0, 1.5]}

CASES = [
    *(
        valid(f"{name}-steps-{steps}", "r and d come from the averages before the update; then every average moves.",
              {"renorm": renorm, "decay": 0.9}, *[train() for _ in range(steps)], evaluate())
        for name, renorm in (
            ("free", _renorm()),
            ("r-max", _renorm(r_max=1.1)),
            ("r-min", _renorm(r_min=1.25)),
            ("d-max", _renorm(d_max=0.125)),
            ("clipped", _renorm(**_CLIPS)),
        )
        for steps in (1, 3)
    ),
    valid("from-initial", "From a fresh layer: renorm_mean 0, deviations sqrt(1 + epsilon).", _FREE, train(), train(), evaluate(), state="initial"),
    valid("off", "r fixed at 1, d at 0: plain batch normalization, but for eval's variance.", {"renorm": _renorm(r_max=1.0, r_min=1.0, d_max=0.0)}, train(), evaluate(), state=_FAR),
    valid("far", "Averages far from the batch, all clips at work.", _CLIPPED, train(), evaluate(), state=_FAR),
    valid("far-free", "Averages far from the batch, no clip.", _FREE, train(), evaluate(), state=_FAR),
    valid("small-deviation", "A renorm deviation below sqrt(epsilon) does not divide by nearly 0.", {**_FREE, "epsilon": 0.01}, train(), state={"renorm_stddev": [1e-3, 0.05, 0.2]}),
    *(
        valid(f"decay-{decay}-renorm-{own}", "Two decays: the moving averages' and renorm's own.", {"renorm": _renorm(**_CLIPS, decay=own), "decay": decay},
              train(), train(), evaluate())
        for decay, own in ((0.0, 0.9), (0.9, 0.0), (1.0, 0.5), (0.5, 1.0))
    ),
    valid("epsilon-0.1", "epsilon is in the averaged deviation, and out of the moving variance again.", {**_CLIPPED, "epsilon": 0.1}, train(std=0.3), evaluate(std=0.3)),
    valid("variance-at-0", "A constant channel: the moving variance is never negative.", {**_CLIPPED, "decay": 0.0}, train(shape=(8, 3), std=[0.0, 1.0, 0.0]), evaluate()),
    valid("step-clips", "Clips given for one step hold in that step alone.", _CLIPPED, train(renorm_clips={"r_max": 1.05, "d_max": 0.05}), train(), evaluate(), state=_FAR),
    valid("step-clips-none", "None lifts a clip for one step.", _CLIPPED, train(renorm_clips={"r_max": None, "r_min": None, "d_max": None}), train(), state=_FAR),
    valid("negative-gamma", "gamma's sign goes through r.", _CLIPPED, train(), evaluate(), state={"gamma": [-1.0, 2.0, -0.5]}),
    valid("scale-only", "dgamma is the sum of dy (xhat r + d).", {**_FREE, "center": False}, train(), state=_FAR),
    valid("center-only", "Without gamma.", {**_FREE, "scale": False}, train(), state=_FAR),
    valid("image", "In an image, channels first.", {**_CLIPPED, "axis": 1}, train(shape=(2, 3, 2, 4)), evaluate(shape=(2, 3, 2, 4))),
    valid("image-channels-last", "Channels last.", _CLIPPED, train(shape=(2, 2, 4, 3)), evaluate(shape=(2, 2, 4, 3))),
    valid("weighted", "Weighted moments feed r, d and the averages; the weights' gradient has r in it.", _FREE, train(weights=_WEIGHTS, weights_dtype="float32"), evaluate(), state=_FAR),
    valid("masked", "With a mask.", _CLIPPED, train(weights=[True, False, True, True, False, True, True, False]), evaluate()),
    valid("nothing-weighted", "Without weight there is no r and no d.", _FREE, train(weights=[False] * 8), evaluate(), state=_FAR),
    valid("empty", "An empty batch moves none of the five averages.", _FREE, train(shape=(0, 3)), train(), evaluate()),
    valid("no-update", "update_stats=False: corrected, but nothing moves.", _CLIPPED, train(update_stats=False), train(), state=_FAR),
    valid("frozen", "Frozen: eval's formula, no correction.", _FREE, train(frozen_statistics=True), train(), state=_FAR),
    valid("rebuild", "All five averages survive an export.", _CLIPPED, train(dy=False), rebuild(), train(), evaluate()),
    valid("call-twice", "The second call is corrected by what the first left.", _CLIPPED, call_twice({}, {"mean": -2.0}), evaluate()),
    valid("nan-keep", "A bad channel keeps all five.", {**_CLIPPED, "nonfinite": "keep"}, train(poison={(2, 1): float("nan")}, dy=False), train(), evaluate()),
    valid("one-value", "One value per channel, allowed: d alone moves y.", {**_CLIPPED, "single_value": "allow"}, train(shape=(1, 3)), evaluate()),
    valid("float64", "In float64.", {**_CLIPPED, "param_dtype": "float64", "stats_dtype": "float64"}, train(dtype="float64"), train(dtype="float64"), evaluate(dtype="float64")),
    valid("float16", "Half data.", _CLIPPED, train(dtype="float16"), evaluate(dtype="float16")),
    valid("mean-1e3", "A large mean: d is a small difference over a deviation.", {"renorm": _renorm(), "decay": 0.0}, train(shape=(16, 3), mean=1e3, std=1.0), state={"renorm_mean": [999.0, 1000.0, 1001.0]}),
]  # fmt: skip
