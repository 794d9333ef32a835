"""The plain cases once more with Bessel's correction, in rows and in both layouts of images.

The other groups' base is the biased estimator on the last axis, which the layers that correct the moving variance
(torch's, TensorFlow's fused kernel) cannot say; these cases show what they do. A few are biased on axis 1, as ONNX has
it.
"""

from collections.abc import Iterator
from math import inf, nan
from typing import Any, Final

import numpy as np

from ..case import Case, call_twice, evaluate, invalid, rebuild, train, valid

PURPOSE = "plain cases with the unbiased moving variance, as rows, channels first and last; a few biased on axis 1"

_SHAPES: Final = {"rows": (8, 3), "first": (4, 3, 2, 5), "last": (4, 2, 5, 3)}
_EMPTY: Final = {"rows": (0, 3), "first": (0, 3, 4, 4), "last": (0, 4, 4, 3)}
_ONE: Final = {"rows": (1, 3), "first": (1, 3, 1, 1), "last": (1, 1, 1, 3)}
_AXES: Final = {"rows": 1, "first": 1, "last": -1}
_PLACES: Final = {"rows": (2, 1), "first": (2, 1, 0, 3), "last": (2, 0, 3, 1)}  # one of channel 1
_FAR: Final = {"moving_mean": [-5.0, 0.0, 7.0], "moving_variance": [1e-2, 1.0, 1e4]}
_BIASED: Final = {"axis": 1, "moving_variance_estimator": "biased"}
_FLOAT64: Final = {"param_dtype": "float64", "stats_dtype": "float64"}


def _fields(layout: str, **fields: Any) -> dict[str, Any]:
    return {"axis": _AXES[layout], "moving_variance_estimator": "unbiased", **fields}


def _in_every_layout(layout: str) -> Iterator[Case]:
    shape, place = _SHAPES[layout], _PLACES[layout]
    one_hot = np.zeros(shape, np.float32)
    one_hot[place] = 1.0

    def case(name: str, comment: str, *steps: Any, state: Any = "drawn", **fields: Any) -> Case:
        return valid(f"{name}-{layout}", comment, _fields(layout, **fields), *steps, state=state)

    yield case("ordinary", "Ordinary data; n counts every reduced element.", train(shape=shape), evaluate(shape=shape))
    yield case("mean-1e3", "A mean a thousand deviations away: E[x^2]-E[x]^2 loses the variance.",
               train(shape=shape, mean=1e3, std=1.0), evaluate(shape=shape, mean=1e3, std=1.0), epsilon=1e-5, decay=0.5)  # fmt: skip
    yield case("mean-1e4", "Ten thousand deviations.", train(shape=shape, mean=[1e4, -1e4, 1e4], std=1.0), epsilon=1e-5, decay=0.0)  # fmt: skip
    yield case("small-variance", "A variance of 1e-8 beside an epsilon of 1e-8, which is not floored.",
               train(shape=shape, mean=0.0, std=1e-4), evaluate(shape=shape, mean=0.0, std=1e-4), epsilon=1e-8, decay=0.5)  # fmt: skip
    yield case("one-hot", "dy at one place reaches every position of its channel, and no other channel.",
               train(shape=shape, dy=one_hot))  # fmt: skip
    yield case("float16", "Half x, float32 parameters and statistics.",
               train(shape=shape, dtype="float16"), evaluate(shape=shape, dtype="float16"))  # fmt: skip
    yield case("empty", "An empty batch: empty results, no gradient, statistics and counter untouched.",
               train(shape=_EMPTY[layout]), evaluate(shape=_EMPTY[layout]), train(shape=shape))  # fmt: skip
    yield case("nan-one-channel", "A NaN in one channel; the others never notice.",
               train(shape=shape, poison={place: nan}, dy=False))  # fmt: skip
    yield case("constant-channel", "A constant channel: variance 0, y = beta.",
               train(shape=shape, mean=[100.1, 0.0, 0.1], std=[0.0, 1.0, 0.0]), evaluate(shape=shape))  # fmt: skip
    yield case("second-order", "The derivative of dx along a direction.", train(shape=shape, direction=True))


def _plain(name: str, comment: str, layout: str, *steps: Any, state: Any = "drawn", **fields: Any) -> Case:
    return valid(f"{name}-{layout}", comment, _fields(layout, **fields), *steps, state=state)


CASES = [
    *(case for layout in _SHAPES for case in _in_every_layout(layout)),
    _plain("large-variance", "Values of 1e6: dgamma is in units of xhat, not of x.", "rows", train(mean=0.0, std=1e6)),
    _plain("large-dy", "dy of 1e6 beside dy near 0.", "last",
           train(shape=(4, 2, 1, 3), dy=np.linspace(-1e6, 1e6, 24, dtype=np.float32).reshape(4, 2, 1, 3))),
    _plain("eval-far-statistics", "Eval's y and dx do not see the batch.", "first", evaluate(shape=(2, 3, 2, 2), mean=50.0, std=0.1), state=_FAR),
    _plain("eval-far-statistics", "The same, channels last.", "last", evaluate(shape=(2, 2, 2, 3), mean=50.0, std=0.1), state=_FAR),
    _plain("eval-second-order", "In eval y is linear in x: 0.", "first", evaluate(shape=(2, 3, 2, 2), direction=True)),
    _plain("bfloat16", "bfloat16 x, float32 parameters and statistics.", "first",
           train(shape=(4, 3, 2, 5), dtype="bfloat16"), evaluate(shape=(4, 3, 2, 5), dtype="bfloat16")),
    _plain("bfloat16", "The same, channels last.", "last",
           train(shape=(4, 2, 5, 3), dtype="bfloat16"), evaluate(shape=(4, 2, 5, 3), dtype="bfloat16")),
    _plain("float64", "In float64.", "rows", train(dtype="float64"), evaluate(dtype="float64"), **_FLOAT64),
    _plain("no-affine", "Neither gamma nor beta.", "first", train(shape=(4, 3, 2, 5)), evaluate(shape=(4, 3, 2, 5)), scale=False, center=False),
    _plain("no-beta", "gamma without beta.", "rows", train(), evaluate(), center=False),
    _plain("decay-0", "Only the last batch counts.", "rows", train(), train(), evaluate(), decay=0.0),
    _plain("decay-0.999", "Hardly moved.", "last", train(shape=(4, 2, 5, 3)), evaluate(shape=(4, 2, 5, 3)), decay=0.999),
    _plain("cumulative", "The plain average of all updates.", "rows", train(), train(), train(), evaluate(), decay="cumulative"),
    _plain("steps", "Two updates, a new layer from what was exported, one more, eval.", "first",
           train(shape=(4, 3, 2, 5)), train(shape=(2, 3, 2, 5)), rebuild(), train(shape=(4, 3, 2, 5)), evaluate(shape=(2, 3, 2, 5)), decay=0.75),
    _plain("steps", "The same, channels last.", "last",
           train(shape=(4, 2, 5, 3)), train(shape=(2, 2, 5, 3)), rebuild(), train(shape=(4, 2, 5, 3)), evaluate(shape=(2, 2, 5, 3)), decay=0.75),
    _plain("two-rows", "Two values a channel: Bessel doubles.", "rows", train(shape=(2, 3)), epsilon=1e-5),
    _plain("two-values", "Two values a channel, in an image.", "last", train(shape=(1, 2, 1, 3)), epsilon=1e-5),
    _plain("mean-1e3-n-2048", "Many values a channel.", "first", train(shape=(8, 1, 16, 16), mean=1e3, std=1.0), num_features=1, decay=0.5),
    _plain("infinity", "An infinity in one channel, clean data after it.", "last",
           train(shape=(4, 2, 5, 3), poison={(2, 0, 3, 1): inf}, dy=False), train(shape=(4, 2, 5, 3)), evaluate(shape=(4, 2, 5, 3))),
    *(
        _plain("one-value-allowed", "One value per channel, allowed: y = beta, variance 0 enters, never 0/0.", layout,
               train(shape=_ONE[layout]), evaluate(shape=_ONE[layout]), single_value="allow")
        for layout in _ONE
    ),
    *(
        invalid(f"one-value-raise-{layout}", "One value per channel must be refused.", _fields(layout), train(shape=_ONE[layout]),
                error="InputError", at=0, state="drawn")
        for layout in _ONE
    ),
    invalid("wrong-channels-first", "Four channels for a layer of three.", _fields("first"), train(shape=(2, 4, 2, 2)), error="InputError", at=0),
    invalid("wrong-channels-last", "The same, channels last.", _fields("last"), evaluate(shape=(2, 2, 2, 4)), error="InputError", at=0),
    invalid("rank-1", "No batch axis.", _fields("rows"), train(shape=(3,)), error="InputError", at=0),
    valid("biased-rows", "Biased, two updates, eval.", _BIASED, train(), train(), evaluate()),
    valid("biased-image", "Biased, channels first.", _BIASED, train(shape=(4, 3, 2, 5)), evaluate(shape=(4, 3, 2, 5))),
    valid("biased-mean-1e3", "A mean a thousand deviations away.", {**_BIASED, "epsilon": 1e-5, "decay": 0.5},
          train(shape=(4, 3, 2, 5), mean=1e3, std=1.0), evaluate(shape=(4, 3, 2, 5), mean=1e3, std=1.0)),
    valid("biased-float16", "Half x, float32 parameters and statistics.", _BIASED,
          train(shape=(4, 3, 2, 5), dtype="float16"), evaluate(shape=(4, 3, 2, 5), dtype="float16")),
    valid("biased-eval-small-variance", "Eval with variances beside epsilon.", {**_BIASED, "epsilon": 1e-8},
          evaluate(shape=(4, 3, 2, 2), mean=0.0, std=1e-4), state={"moving_mean": [0.0, 1e-4, -1e-4], "moving_variance": [1e-8, 0.0, 1.0]}),
    valid("biased-call-twice", "Two calls of one layer.", _BIASED, call_twice({"shape": (8, 3)}, {"shape": (5, 3)})),
]  # fmt: skip
