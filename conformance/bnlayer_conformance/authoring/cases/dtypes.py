"""Every float dtype, of data, parameters and statistics."""

from ..case import evaluate, train, valid

PURPOSE = "dtypes: y and dx have x's, gradients of parameters and statistics their own, half inputs sum in float32"

CASES = [
    *(
        valid(
            f"{dtype}-rank-{len(shape)}",
            "y and dx in x's dtype; parameters, statistics and their gradients in float32.",
            {},
            train(shape=shape, dtype=dtype),
            evaluate(shape=shape, dtype=dtype),
        )
        for dtype in ("float16", "bfloat16", "float32", "float64")
        for shape in ((8, 3), (2, 3, 2, 3))
    ),
    *(
        valid(
            f"{dtype}-unbiased-affineless",
            "Without gamma and beta, where mixed dtypes take another path in some frameworks.",
            {"center": False, "scale": False, "moving_variance_estimator": "unbiased"},
            train(dtype=dtype),
            evaluate(dtype=dtype),
        )
        for dtype in ("float16", "bfloat16", "float64")
    ),
    *(
        valid(
            f"{dtype}-weighted",
            "Masks and weights in half precision and float64.",
            {},
            train(dtype=dtype, weights=[True, True, False, True, True, False, True, True]),
            train(dtype=dtype, weights=[1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.25, 1.0], weights_dtype="float32"),
        )
        for dtype in ("float16", "bfloat16", "float64")
    ),
    *(
        valid(
            f"{dtype}-all",
            "Data, parameters and statistics all of this dtype.",
            {"param_dtype": dtype, "stats_dtype": dtype},
            train(dtype=dtype),
            evaluate(dtype=dtype),
        )
        for dtype in ("float16", "bfloat16", "float64")
    ),
    valid("float32-data-float64-statistics", "Statistics may be kept more exactly than the data.",
          {"stats_dtype": "float64"}, train(), evaluate()),
    valid("float16-squares-overflow", "|x| about 300: the squares overflow float16.", {"decay": 0.5},
          train(shape=(16, 3), mean=300.0, std=8.0, dtype="float16"), evaluate(shape=(4, 3), mean=300.0, std=8.0, dtype="float16")),
    valid("float16-variance-overflows", "Variance above 65504 in a float32 moving variance.", {"decay": 0.5},
          train(shape=(16, 3), mean=0.0, std=3000.0, dtype="float16"), evaluate(shape=(4, 3), std=3000.0, dtype="float16")),
    valid("float16-long-sum", "2048 ones and twos: a float16 sum stops growing at 2048.", {"num_features": 1, "decay": 0.0},
          train(shape=(2048, 1), mean=1.5, std=0.1, dtype="float16", dy=False)),
    valid("bfloat16-mean-100", "bfloat16 data on a grid of one half around 100.", {"decay": 0.0},
          train(shape=(64, 3), mean=100.0, std=2.0, dtype="bfloat16")),
    valid("float16-small-moving-variance", "A moving variance of 1e-8, which float16 cannot hold, with epsilon 1e-12.",
          {"epsilon": 1e-12}, evaluate(dtype="float16", mean=0.0, std=1e-3), state={"moving_variance": [1e-8, 1e-7, 1e-6]}),
    valid("float64-mean-1e3", "float64 is computed in float64, not in float32 under its name.", {"decay": 0.0},
          train(shape=(16, 3), mean=1e3, std=1e-3, dtype="float64"), evaluate(shape=(4, 3), mean=1e3, std=1e-3, dtype="float64")),
]  # fmt: skip
