"""The same values, elsewhere in memory."""

from ..case import evaluate, train, valid

PURPOSE = "memory layouts: transposed, strided, offset and channels-last inputs and gradients, forward and backward"

CASES = [
    *(
        valid(
            f"{view}-rank-{len(shape)}-dy-{dy_view}",
            "Where the values lie in memory changes no number.",
            {"axis": 1},
            train(shape=shape, view=view, dy_view=dy_view),
            evaluate(shape=shape, view=view, dy_view=dy_view),
        )
        for view, dy_view, shape in (
            ("transposed", "contiguous", (4, 3)),
            ("strided", "transposed", (4, 3)),
            ("offset", "strided", (4, 3)),
            ("transposed", "contiguous", (2, 3, 4)),
            ("channels_last", "contiguous", (2, 3, 4)),
            ("channels_last", "channels_last", (2, 3, 4, 5)),
            ("channels_last", "contiguous", (2, 3, 4, 5)),
            ("contiguous", "channels_last", (2, 3, 4, 5)),
            ("offset", "transposed", (2, 3, 4, 5)),
            ("strided", "offset", (2, 3, 4, 5)),
            ("channels_last", "strided", (2, 3, 2, 3, 2)),
        )
    ),
    *(
        valid(
            f"length-1-{'x'.join(map(str, shape))}-{view}-dy-{dy_view}",
            "With a length of 1 an array can be contiguous and channels-last at once: x and dy must not be mixed up.",
            {"axis": 1, "num_features": shape[1], "moving_variance_estimator": "unbiased"},
            train(shape=shape, view=view, dy_view=dy_view),
            evaluate(shape=shape, view=view, dy_view=dy_view),
        )
        for shape in ((4, 3, 1, 1), (1, 3, 1, 5), (1, 3, 5, 1), (1, 3, 5, 1, 1))
        for view, dy_view in (("contiguous", "transposed"), ("transposed", "contiguous"))
    ),
    valid("channels_last-mean-1e3", "Accuracy does not depend on the layout.", {"axis": 1, "decay": 0.0},
          train(shape=(2, 3, 8, 8), mean=1e3, view="channels_last", dy_view="channels_last")),
    valid("transposed-last-axis", "Channels last in shape, first in memory.", {}, train(shape=(2, 4, 5, 3), view="transposed")),
    valid("transposed-weighted", "Views and weights.", {"axis": 1},
          train(shape=(2, 3, 4), view="transposed", dy_view="strided", weights=[[1.0, 0.0, 2.0, 0.5], [1.0, 1.0, 0.0, 0.5]],
                weights_dtype="float32")),
    valid("transposed-bfloat16", "Views of a dtype that numpy does not have.", {"axis": 1},
          train(shape=(2, 3, 4), dtype="bfloat16", view="transposed", dy_view="offset")),
]  # fmt: skip
