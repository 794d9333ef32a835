"""Data on which careless arithmetic shows."""

import numpy as np

from ..case import evaluate, train, valid

PURPOSE = "large means, tiny and huge variances, constant channels: accuracy by a forward error bound"

_ALTERNATING = np.where(np.arange(64).reshape(64, 1) % 2 == 0, np.float32(1000.25), np.float32(1000.0))

CASES = [
    *(
        valid(
            f"mean-{mean:g}-std-{std:g}-n-{n}",
            "E[x^2]-E[x]^2 loses mean^2 times the rounding here; two-pass and shifted formulas do not.",
            {"num_features": 2, "epsilon": 1e-5, "decay": 0.0},
            train(shape=(n, 2), mean=[mean, -mean], std=std),
            evaluate(shape=(3, 2), mean=[mean, -mean], std=std),
        )
        for mean, std in ((1e2, 0.1), (1e3, 1.0), (1e3, 0.1), (1e4, 1.0))
        for n in (16, 256)
    ),
    valid("mean-1e3-n-4096", "The same over 4096 values a channel.", {"num_features": 2, "decay": 0.5},
          train(shape=(4096, 2), mean=1e3, std=1.0)),
    valid("mean-1e4-n-4096-float32", "Mean 1e4 over 4096 values a channel.", {"num_features": 1, "decay": 0.5},
          train(shape=(4096, 1), mean=1e4, std=1.0)),
    valid("mean-1e3-image", "Channels first, as images are.", {"axis": 1, "decay": 0.0},
          train(shape=(4, 3, 5, 7), mean=[1e3, -1e3, 5e2], std=1.0), evaluate(shape=(2, 3, 2, 2), mean=[1e3, -1e3, 5e2])),
    valid("mean-1e3-image-channels-last", "Channels last.", {"decay": 0.0},
          train(shape=(4, 5, 7, 3), mean=[1e3, -1e3, 5e2], std=1.0)),
    valid("mean-1e6-float64", "Mean 1e6 in float64.", {"param_dtype": "float64", "stats_dtype": "float64", "decay": 0.0},
          train(shape=(32, 3), mean=1e6, dtype="float64"), evaluate(shape=(4, 3), mean=1e6, dtype="float64")),
    valid("weighted-mean-1e3", "A mask must not bring the careless formula back.", {"decay": 0.0},
          train(shape=(32, 3), mean=1e3, weights=[True, False] * 16)),
    valid("weighted-mean-1e4", "Nor real weights.", {"decay": 0.0},
          train(shape=(32, 3), mean=1e4, weights=[0.5, 2.0] * 16, weights_dtype="float32")),
    valid("alternating", "1000 and 1000.25 in turn: variance 1/64 exactly.", {"num_features": 1, "decay": 0.0, "epsilon": 1e-5},
          train(x=_ALTERNATING)),
    valid("constant", "Constant channels: variance 0, y = beta.", {"epsilon": 1e-3},
          train(x=np.broadcast_to(np.array([100.0, -0.1, 0.0], np.float32), (9, 3)).copy()), evaluate()),
    valid("constant-not-representable", "A constant whose sums are not exact, n not a power of two.", {"epsilon": 1e-5, "decay": 0.0},
          train(x=np.broadcast_to(np.array([0.1, 12345.678, 3.3], np.float32), (11, 3)).copy())),
    valid("constant-long", "0.1 a thousand times: a running float32 sum drifts.", {"num_features": 1, "decay": 0.0},
          train(x=np.full((1000, 1), 0.1, np.float32))),
    valid("tiny-variance", "Variance 1e-12 against epsilon 1e-12.", {"epsilon": 1e-12, "decay": 0.0},
          train(shape=(16, 3), mean=0.0, std=1e-6)),
    valid("tiny-values", "Values of 1e-15: their squares are far below epsilon, and below float16.", {"epsilon": 1e-5, "decay": 0.0},
          train(shape=(16, 3), mean=0.0, std=1e-15)),
    valid("huge-values", "Values of 1e12: their squares still fit float32, their fourth powers do not.", {"decay": 0.5},
          train(shape=(16, 3), mean=0.0, std=1e12)),
    valid("spread-channels", "Channels twelve orders of magnitude apart do not touch each other.", {"epsilon": 1e-12, "decay": 0.0},
          train(shape=(16, 3), mean=0.0, std=[1e-6, 1.0, 1e6])),
]  # fmt: skip
