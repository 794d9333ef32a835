"""The forward error bounds behind every tolerance.

A tolerance says what a stable implementation may lose, in the arithmetic that the spec prescribes: promote(x, float32).
It is derived from the case's exact numbers, never from what some backend reaches.

With u the arithmetic's unit roundoff, n the number of summed elements and K = 8 + sqrt(n) (a few operations each, and
sums whose rounding errors grow like a random walk, Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.,
section 4.2), A = sqrt(m^2+v) the root mean square of x, sd = sqrt(v+eps), kappa = A/sd:

* mean: K u A. The mean is a sum of numbers of size A.
* variance: K u v + (K u A)^2. The two-pass or shifted formula: relative rounding, and the square of the mean's error
  (Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983). E[x^2]-E[x]^2 would lose K u A^2.
* 1/sd, relative: rho = K u + (K u kappa)^2/2, from the variance's.
* xhat: K u (kappa + |xhat|).
* y: K u |gamma| (kappa + |xhat|) + u |beta| + u_out |y|. The term in beta is the rounding of beta - m gamma/sd, where
  an implementation folds the layer into one scale and one shift.
* dbeta: K u sum|dy|; dgamma: K u sum|dy|(kappa + 2|xhat|), since both dy xhat and its sum are rounded.
* dx = gamma/sd (dy - p (S1 + xhat S2)): each term's own error, and rho |dx|.
* dweights: the same, term by term.
* an average d s + (1-d) b: 4 u (d|s| + (1-d)|b|), the errors that s and b bring, and u_stats times the result.

In eval the moving statistics are given: K = 8, and their accumulated errors enter as those of m and v.
Every result also gets the smallest number its dtype can tell from 0, so that underflow is not a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt
from typing import Any, Final

Number = Any  # anything that float() takes

UNIT_ROUNDOFF: Final = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
# float16: the spacing of its subnormals; the others: the smallest normal, for arithmetic that flushes subnormals to 0.
UNDERFLOW: Final = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


def unit_roundoff(dtype: str) -> float:
    """Half the distance from 1 to the next larger number."""
    return UNIT_ROUNDOFF[dtype]


class Rounding:
    """The dtypes a case rounds to: x's (y, dx), the arithmetic's, the parameters', the statistics'."""

    def __init__(self, x: str, param: str, stats: str) -> None:
        self.u = UNIT_ROUNDOFF["float64" if x == "float64" else "float32"]
        self.out, self.out_floor = UNIT_ROUNDOFF[x], UNDERFLOW[x]
        self.param, self.param_floor = UNIT_ROUNDOFF[param], UNDERFLOW[param]
        self.stats, self.stats_floor = UNIT_ROUNDOFF[stats], UNDERFLOW[stats]


@dataclass(frozen=True)
class Errors:
    """One channel's bounds: absolute ones on m, v, u; `ku` = K u; what xhat and 1/sd lose."""

    ku: float
    mean: float
    variance: float
    unbiased: float
    kappa: float
    rho: float
    xhat_shift: float  # error of xhat that does not grow with xhat
    xhat_slope: float  # and the part that does


def batch_errors(
    rounding: Rounding, n: int, m: Number, v: Number, u: Number, one_over_n: Number, eps: Number
) -> Errors:
    """Bounds where the batch's own statistics normalize."""
    ku = (8.0 + sqrt(n)) * rounding.u
    rms = sqrt(_f(m * m + v))
    mean = ku * rms
    variance = ku * _f(v) + mean * mean
    bessel = 1.0 / _f(1 - one_over_n) if one_over_n < 1 else 0.0
    # 1 - Q/W^2 cancels where one weight dominates: its rounding error is u, relative to what is left.
    unbiased = bessel * variance + 4.0 * rounding.u * bessel * _f(u) if bessel else 0.0
    kappa = rms / sqrt(_f(v + eps)) if v + eps > 0 else 0.0
    return Errors(ku, mean, variance, unbiased, kappa, ku + (ku * kappa) ** 2 / 2, ku * kappa, ku)


def moving_errors(
    rounding: Rounding, m: Number, v: Number, mean_error: float, variance_error: float, eps: Number
) -> Errors:
    """Bounds where the moving statistics normalize, with the errors they have brought along."""
    ku = 8.0 * rounding.u
    var = _f(v + eps)
    kappa = sqrt(_f(m * m + v)) / sqrt(var) if var > 0 else 0.0
    shift = ku * kappa + (mean_error / sqrt(var) if var > 0 else 0.0)
    slope = ku + (variance_error / (2 * var) if var > 0 else 0.0)
    return Errors(ku, mean_error, variance_error, variance_error, kappa, slope, shift, slope)


def average_error(
    rounding: Rounding, decay: Number, old: Number, old_error: float, new: Number, new_error: float
) -> float:
    """Of decay*old + (1-decay)*new."""
    d, e = _f(decay), _f(1 - decay)
    brought = d * old_error + e * new_error
    return (
        brought
        + 4.0 * rounding.u * (d * abs(_f(old)) + e * abs(_f(new)))
        + rounding.stats * abs(_f(decay * old + (1 - decay) * new))
        + rounding.stats_floor
    )


def output_error(errors: Errors, rounding: Rounding, gamma: Number, beta: Number, xhat: Number, y: Number) -> float:
    """Of y = gamma xhat + beta."""
    return (
        abs(_f(gamma)) * (errors.xhat_shift + errors.xhat_slope * abs(_f(xhat)))
        + rounding.u * abs(_f(beta))
        + rounding.out * abs(_f(y))
        + rounding.out_floor
    )


@dataclass(frozen=True)
class Sums:
    """sum|dy|, and the bound on the error of sum dy xhat."""

    dy: float
    s2_error: float


def gradient_sums(errors: Errors, dy: Sequence[Number], xhat: Sequence[Number]) -> Sums:
    """The sums over one channel that the gradients' bounds share."""
    ad = [abs(_f(d)) for d in dy]
    per_element = [errors.xhat_shift + (errors.xhat_slope + errors.ku) * abs(_f(h)) for h in xhat]
    return Sums(fsum(ad), fsum(a * e for a, e in zip(ad, per_element, strict=True)))


def dx_error(
    errors: Errors, rounding: Rounding, sums: Sums, factor: Number, dy: Number, xhat: Number, p: Number, s2: Number,
    dx: Number,
) -> float:  # fmt: skip
    """Of dx = factor (dy - p (S1 + xhat S2)), factor = gamma/sd."""
    h, share, product = abs(_f(xhat)), _f(p), abs(_f(s2))
    terms = errors.ku * abs(_f(dy)) + share * (
        errors.ku * sums.dy + h * sums.s2_error + (errors.xhat_shift + errors.xhat_slope * h) * product
    )
    return abs(_f(factor)) * terms + (errors.rho + rounding.out) * abs(_f(dx)) + rounding.out_floor


def dgamma_error(errors: Errors, rounding: Rounding, sums: Sums, dgamma: Number) -> float:
    """Of dgamma = sum dy xhat."""
    return sums.s2_error + rounding.param * abs(_f(dgamma)) + rounding.param_floor


def dbeta_error(errors: Errors, rounding: Rounding, sums: Sums, dbeta: Number) -> float:
    """Of dbeta = sum dy."""
    return errors.ku * sums.dy + rounding.param * abs(_f(dbeta)) + rounding.param_floor


def dweight_error(
    errors: Errors, rounding: Rounding, sums: Sums, factor: Number, xhat: Number, ratio: Number, s1: Number, s2: Number
) -> float:
    """Of one position's part of dw = -factor (xhat S1 + (xhat^2 - v/(v+eps))/2 S2), factor = gamma/W."""
    h, r = abs(_f(xhat)), _f(ratio)
    a1, a2 = abs(_f(s1)), abs(_f(s2))
    xhat_error = errors.xhat_shift + errors.xhat_slope * h
    half = (h * h + r) / 2
    return abs(_f(factor)) * (
        xhat_error * a1 + h * errors.ku * sums.dy + (h * xhat_error + errors.rho * r / 2) * a2 + half * sums.s2_error
        + errors.ku * (h * a1 + half * a2)
    )  # fmt: skip


def _f(value: Number) -> float:
    """A number for a bound: what is not finite has no error, it is compared by kind."""
    number = float(value)
    return number if isfinite(number) else 0.0
