"""Compare what came out with what must: kind, dtype, shape, then every element against its own tolerance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from .vector import Expected


@dataclass(frozen=True)
class Finding:
    """One observable, compared.

    Attributes:
        observable: its name, such as "dx".
        ratio: the worst error in tolerances: at most 1 passes; infinite for a wrong kind, dtype, shape or finiteness.
        error, tolerance: of the worst element; None where there is no number to give.
        reason: what differs, for people; "" where nothing does.
        short: the same in a word, where no number says it: "NaN", "dtype float32", "refuses".
    """

    observable: str
    ratio: float
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""
    short: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is within tolerance."""
        return self.ratio <= 1.0


def compare(observable: str, got: Any, want: Expected | None) -> Finding:
    """Compare one observable; `want` None means that there must be none."""
    if want is None or got is None:
        if want is None and got is None:
            return Finding(observable, 0.0)
        expected = "nothing" if want is None else "an array"
        return _wrong(observable, f"{expected} was expected, got {_kind(got)}", _kind(got))
    if not isinstance(got, np.ndarray):
        return _wrong(observable, f"a numpy array was expected, got {_kind(got)}", _kind(got))
    if got.dtype.name != want.dtype:
        return _wrong(observable, f"dtype {want.dtype} was expected, got {got.dtype.name}", f"dtype {got.dtype.name}")
    if got.shape != want.values.shape:
        return _wrong(observable, f"shape {want.values.shape} was expected, got {got.shape}", f"shape {got.shape}")
    if got.size == 0:
        return Finding(observable, 0.0, 0.0, 0.0)
    return _elements(observable, got.astype(np.float64), want)


def compare_counter(got: Any, want: int | None) -> Finding:
    """Compare num_updates."""
    try:
        same = want is None or (got is not None and int(got) == want)
    except (TypeError, ValueError):
        same = False
    if same:
        return Finding("num_updates", 0.0)
    return _wrong("num_updates", f"{want} was expected, got {got!r}", f"{got!r} for {want}")


def worst(findings: Iterable[Finding]) -> Finding:
    """The finding furthest beyond its tolerance."""
    return max(findings, key=lambda finding: finding.ratio, default=Finding("", 0.0))


def _elements(observable: str, got: np.ndarray[Any, Any], want: Expected) -> Finding:
    values, tolerance = want.values, want.tolerance
    with np.errstate(all="ignore"):
        error = np.abs(got - values)
        if (error < tolerance).all():  # most are; NaN is not
            ratio = error / tolerance
            at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
            return Finding(observable, float(ratio[at]), float(error[at]), float(tolerance[at]))
    wrong_kind = np.where(
        want.nonfinite,
        np.isfinite(got),
        np.where(np.isfinite(values), ~np.isfinite(got), (got != values) & ~(np.isnan(got) & np.isnan(values))),
    )
    if wrong_kind.any():
        place = _first(wrong_kind)
        wanted = "NaN or an infinity" if want.nonfinite[place] else f"{values[place]:.9g}"
        return _wrong(
            observable,
            f"element {_shown(place)}: {wanted} was expected, got {got[place]:.9g}",
            _word(got[place], wanted),
        )
    with np.errstate(all="ignore"):
        error = np.where(np.isfinite(values), np.abs(got - values), 0.0)
        ratio = np.where(error == 0.0, 0.0, error / tolerance)  # a tolerance of 0 asks for the exact value
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    reason = (
        "" if ratio[place] <= 1 else f"element {_shown(place)}: {values[place]:.9g} was expected, got {got[place]:.9g}"
    )
    return Finding(observable, float(ratio[place]), float(error[place]), float(tolerance[place]), reason)


def _wrong(observable: str, reason: str, short: str) -> Finding:
    return Finding(observable, inf, reason=reason, short=short)


def _word(got: float, wanted: str) -> str:
    return "NaN" if np.isnan(got) else "an infinity" if np.isinf(got) else f"{got:.3g} for {wanted}"


def _first(where: np.ndarray[Any, Any]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])


def _shown(place: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, place))}]"


def _kind(got: Any) -> str:
    return "nothing" if got is None else f"a {type(got).__name__}"
