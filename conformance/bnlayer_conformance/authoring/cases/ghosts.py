"""Ghost batches."""

import numpy as np

from ..case import call_twice, evaluate, train, valid

PURPOSE = "ghost batches, strided and consecutive: their rows, what enters the averages, with every other option"

_STRIDED = {"virtual_batch_size": 4, "virtual_batch_layout": "strided"}
_CONSECUTIVE = {"virtual_batch_size": 4, "virtual_batch_layout": "consecutive"}
_WEIGHTS = [1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 0.125, 1.5, 0.0, 1.0, 2.0, 0.5]
_RENORM = {"r_max": 1.5, "r_min": 0.5, "d_max": 0.75, "decay": 0.75}

# Rows far apart, so that a row in the wrong ghost shows.
_ROWS = np.array([[k * k, -3.0 * k, 10.0 * (k % 3)] for k in range(12)], np.float32)

CASES = [
    *(
        valid(f"{name}-rows-{rows}", "G = ceil(N/B) ghosts, sizes differing by one at most; each normalizes on its own.",
              layout, train(x=_ROWS[:rows]), evaluate(x=_ROWS[:rows]))
        for name, layout in (("strided", _STRIDED), ("consecutive", _CONSECUTIVE))
        for rows in (3, 4, 8, 10, 12)
    ),
    *(
        valid(f"{name}-unbiased", "Each ghost's own unbiased variance enters.", {**layout, "moving_variance_estimator": "unbiased"},
              train(x=_ROWS[:10]), evaluate())
        for name, layout in (("strided", _STRIDED), ("consecutive", _CONSECUTIVE))
    ),
    *(
        valid(f"{name}-weighted", "Ghosts enter by their total weights.", {**layout, "moving_variance_estimator": estimator},
              train(shape=(12, 3), weights=_WEIGHTS, weights_dtype="float32"), evaluate())
        for name, layout, estimator in (("strided", _STRIDED, "biased"), ("consecutive", _CONSECUTIVE, "unbiased"))
    ),
    *(
        valid(f"{name}-renorm", "r and d for each ghost; the combined variance's deviation enters.", {**layout, "renorm": _RENORM},
              train(shape=(10, 3)), train(shape=(10, 3)), evaluate())
        for name, layout in (("strided", _STRIDED), ("consecutive", _CONSECUTIVE))
    ),
    valid("consecutive-renorm-weighted", "All of it.", {**_CONSECUTIVE, "renorm": _RENORM}, train(shape=(12, 3), weights=_WEIGHTS, weights_dtype="float32"), evaluate()),
    valid("strided-masked", "A mask that leaves ghosts of different sizes.", _STRIDED, train(shape=(10, 3), weights=[True, True, False, True, False, True, True, True, False, True]), evaluate()),
    valid("consecutive-nothing-in-one", "A ghost without weight enters nothing; its rows are normalized as in eval.", _CONSECUTIVE,
          train(shape=(8, 3), weights=[False] * 4 + [True] * 4), evaluate()),
    valid("consecutive-nothing-at-all", "No ghost has weight: no update.", _CONSECUTIVE, train(shape=(8, 3), weights=[False] * 8), evaluate()),
    valid("strided-one-weighted", "A ghost with a single weighted row enters a variance of 0.", {**_STRIDED, "moving_variance_estimator": "unbiased"},
          train(shape=(8, 3), weights=[True, True, False, True, False, True, False, True]), evaluate()),
    valid("strided-pixel-mask", "A mask over pixels, spread over rows.", {**_STRIDED, "axis": 1}, train(shape=(8, 3, 4), weights=[[True, False, True, True]]), evaluate(shape=(2, 3, 4))),
    valid("strided-image", "Ghosts of images, channels first.", {**_STRIDED, "axis": 1, "virtual_batch_size": 2}, train(shape=(5, 3, 2, 2)), evaluate(shape=(5, 3, 2, 2))),
    valid("consecutive-image", "The same, consecutive, channels last.", {**_CONSECUTIVE, "virtual_batch_size": 2}, train(shape=(5, 2, 2, 3)), evaluate(shape=(5, 2, 2, 3))),
    valid("size-1-image", "Ghosts of one row with several pixels: instance statistics.", {**_STRIDED, "axis": 1, "virtual_batch_size": 1}, train(shape=(3, 3, 2, 2))),
    valid("size-1-allowed", "Ghosts of one value, allowed: y = beta.", {**_STRIDED, "virtual_batch_size": 1, "single_value": "allow"}, train(shape=(4, 3)), evaluate()),
    valid("larger-than-batch", "A ghost size beyond the batch is the whole batch.", {**_STRIDED, "virtual_batch_size": 100}, train(), evaluate()),
    valid("cumulative", "One update, whatever the number of ghosts.", {**_STRIDED, "decay": "cumulative"}, train(shape=(8, 3)), train(shape=(12, 3)), evaluate()),
    valid("zero-debias", "One step of a debiased average.", {**_CONSECUTIVE, "zero_debias": "all"}, train(shape=(8, 3)), train(shape=(12, 3)), evaluate(), state="initial"),
    valid("empty", "An empty batch has no ghosts.", _STRIDED, train(shape=(0, 3)), train(shape=(8, 3)), evaluate()),
    valid("frozen", "Frozen statistics need none.", _STRIDED, train(shape=(8, 3), frozen_statistics=True)),
    valid("no-update", "update_stats=False: ghosts normalize, nothing moves.", _CONSECUTIVE, train(shape=(8, 3), update_stats=False), evaluate()),
    valid("untracked", "Without statistics: ghosts in training, the whole batch in eval.", {**_STRIDED, "track_moving_stats": False}, train(shape=(8, 3)), evaluate(shape=(8, 3))),
    valid("nan-keep", "A bad value spoils its ghost's channel, and that channel keeps its averages.", {**_CONSECUTIVE, "nonfinite": "keep"},
          train(shape=(8, 3), poison={(1, 1): float("nan")}, dy=False), evaluate()),
    valid("call-twice", "Two calls.", _STRIDED, call_twice({"shape": (8, 3)}, {"shape": (5, 3)}), evaluate()),
    valid("affineless", "Without gamma and beta.", {**_STRIDED, "center": False, "scale": False}, train(shape=(8, 3)), evaluate()),
    valid("float16", "Half data.", _STRIDED, train(shape=(8, 3), dtype="float16"), evaluate(dtype="float16")),
    valid("float64", "In float64.", {**_CONSECUTIVE, "param_dtype": "float64", "stats_dtype": "float64"}, train(shape=(10, 3), dtype="float64"), evaluate(dtype="float64")),
    valid("mean-1e3", "Large means in small ghosts.", {**_STRIDED, "decay": 0.0}, train(shape=(16, 3), mean=1e3, std=1.0)),
]  # fmt: skip
