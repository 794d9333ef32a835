"""Why two batch norms differ: each known mistake and conversion, tried on their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..checkpoint.batch_norms import StoredBatchNorm
from ..state import BatchNormState
from .edits import NDArray

_CLOSE: Final = 1e-5  # of the largest value: float32 and the order of a sum
_LARGEST_COUNT: Final = 100_000  # values per channel, above which float32 does not show n/(n-1)
_HALVES: Final = ("bfloat16", "float16")


@dataclass(frozen=True)
class Cause:
    """One reason. `code` is stable, for programs; `message` has the numbers."""

    code: str
    message: str


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two: what it is, its arrays in float64, and the bias of the layer before it, where there is one."""

    stored: StoredBatchNorm
    state: BatchNormState[NDArray]
    bias: NDArray | None

    def __getitem__(self, role: str) -> NDArray | None:
        array = getattr(self.state, role)
        return None if array is None else np.asarray(array).astype(np.float64)


def causes_of(a: Side, b: Side) -> list[Cause]:
    """Every reason that fits, of what they are and of what they hold."""
    return [*_settings(a.stored, b.stored), *(cause for rule in _RULES for cause in rule(a, b))]


def alike(a: NDArray | None, b: NDArray | None) -> bool:
    """Whether two arrays are the same but for rounding."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return bool(np.max(np.abs(a - b), initial=0.0) <= _CLOSE * np.max(np.abs(b), initial=1e-30))


def _settings(a: StoredBatchNorm, b: StoredBatchNorm) -> Iterator[Cause]:
    known = all(one.sources["epsilon"] != "assumed" for one in (a, b))
    if a.spec.epsilon != b.spec.epsilon and known:
        yield Cause("epsilon", f"epsilon is {a.spec.epsilon:g} and {b.spec.epsilon:g}")
    x, y = a.spec.decay, b.spec.decay
    if x != y and all(one.sources["decay"] != "assumed" for one in (a, b)):
        if not isinstance(x, str) and not isinstance(y, str) and abs(x + y - 1) < 1e-9:
            yield Cause("momentum-inverted", f"decay is {x:g} and {y:g}: the momentum of one was read as the other's")
        else:
            yield Cause("decay", f"decay is {x} and {y}")


def _initial(a: Side, b: Side) -> Iterator[Cause]:
    def new(one: Side) -> bool:
        return bool(np.all(one["moving_mean"] == 0) and np.all(one["moving_variance"] == 1))

    if new(a) != new(b):
        yield Cause("at-start", f"the statistics of the {'first' if new(a) else 'second'} are a new layer's, 0 and 1")


def _exchanged(a: Side, b: Side) -> Iterator[Cause]:
    for x, y, code, text in (
        ("moving_mean", "moving_variance", "mean-and-variance-swapped", "mean and variance are exchanged"),
        ("gamma", "beta", "gamma-and-beta-swapped", "gamma and beta are exchanged"),
        ("beta", "moving_mean", "beta-and-mean-swapped", "beta and the moving mean are exchanged"),
    ):
        if _differ(a, b, x) and alike(a[x], b[y]) and alike(a[y], b[x]):
            yield Cause(code, text)
    taken = alike(a["beta"], b["gamma"]), alike(a["gamma"], b["beta"])
    if _differ(a, b, "gamma") and any(taken) and not all(taken):
        yield Cause("beta-read-as-gamma", "gamma of one is beta of the other")


def _signs(a: Side, b: Side) -> Iterator[Cause]:
    for role, text in (("moving_mean", "the moving mean"), ("beta", "beta"), ("gamma", "gamma")):
        x, y = a[role], b[role]
        if x is not None and y is not None and np.any(x) and alike(x, -y):
            yield Cause("sign", f"{text} has the other sign")


def _variance(a: Side, b: Side) -> Iterator[Cause]:
    x, y = a["moving_variance"], b["moving_variance"]
    if x is None or y is None or x.shape != y.shape or not _differ(a, b, "moving_variance"):
        return
    if alike(np.sqrt(np.maximum(x, 0)), y) or alike(x, np.sqrt(np.maximum(y, 0))):
        yield Cause("stddev", "the variance of one is the standard deviation of the other")
        return
    change = x - y
    if np.ptp(change) <= 1e-6 * np.abs(x).max() and 0 < abs(change.mean()) < 0.1:
        yield Cause(
            "epsilon-shifted", f"the variance differs by {change.mean():.3g} in every channel, as an epsilon does"
        )
    if (x <= 0).any() or (y <= 0).any():
        return
    ratio = float(np.median(x / y))
    larger = max(ratio, 1 / ratio)
    if len(x) > 1 and np.ptp(x / y) <= 1e-5 and larger > 1:
        count = larger / (larger - 1)
        near = abs(count - round(count)) <= max(1e-5 * count * count, 1e-6)
        if near and 2 <= round(count) <= _LARGEST_COUNT:
            which = "first" if ratio > 1 else "second"
            yield Cause("bessel", f"the variance differs by n/(n-1) for n = {round(count)}: the {which} is unbiased")
        else:
            yield Cause("variance-factor", f"the variance differs by a factor of {ratio:.6g} in every channel")


def _bias(a: Side, b: Side) -> Iterator[Cause]:
    x, y = a["moving_mean"], b["moving_mean"]
    if x is None or y is None or x.shape != y.shape or not _differ(a, b, "moving_mean"):
        return
    zero = np.zeros_like(x)
    p, q = (zero if one.bias is None else one.bias.reshape(-1).astype(np.float64) for one in (a, b))
    if p.shape == q.shape == x.shape and not alike(p, q) and alike(x - p, y - q):
        yield Cause("bias-absorbed", "the moving means differ by the bias of the layer before, which one has not")


def _rounded(a: Side, b: Side) -> Iterator[Cause]:
    import ml_dtypes

    held: list[tuple[NDArray, NDArray]] = [
        (x, y) for role in a.state.arrays() if (x := getattr(a.state, role)) is not None
        and (y := getattr(b.state, role)) is not None and x.shape == y.shape
    ]  # fmt: skip
    unequal = [(x, y) for x, y in held if not np.array_equal(x, y, equal_nan=True)]
    for name in _HALVES:
        dtype: Any = ml_dtypes.bfloat16 if name == "bfloat16" else np.float16
        with np.errstate(over="ignore"):
            if unequal and all(np.array_equal(x.astype(dtype), y.astype(dtype)) for x, y in unequal):
                yield Cause("rounding", f"they are the same in {name}")
                return
    if held and unequal and all(alike(x.astype(np.float64), y.astype(np.float64)) for x, y in unequal):
        yield Cause("rounding", "they are the same but for rounding")


def _differ(a: Side, b: Side, role: str) -> bool:
    x, y = a[role], b[role]
    return x is not None and y is not None and not alike(x, y)


_RULES: Final[tuple[Callable[[Side, Side], Iterator[Cause]], ...]] = (
    _initial, _exchanged, _signs, _variance, _bias, _rounded,
)  # fmt: skip
