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
* hvp = -dx q/sd - F p (xhat' S2 + xhat S2'), F = gamma/sd: the same; q and xhat' = (t - sum(pt) - xhat q)/sd get the
  errors of xhat, of their sums and of 1/sd.
* renorm: r = sd/den is off by rho and den's own error, relatively; d = (m - renorm_mean)/den by both means' errors over
  den; a clip passes on what it gets, or nothing where it holds by a margin. (xhat r + d) s + b: term by term.
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
    rounding: Rounding, n: int, m: Number, v: Number, mean_error: float, variance_error: float, eps: Number
) -> Errors:
    """Bounds where the moving statistics normalize, with the errors they have brought along."""
    ku = 8.0 * rounding.u
    var = _f(v + eps)
    kappa = sqrt(_f(m * m + v)) / sqrt(var) if var > 0 else 0.0
    shift = ku * kappa + (mean_error / sqrt(var) if var > 0 else 0.0)
    slope = ku + (variance_error / (2 * var) if var > 0 else 0.0)
    sums = (8.0 + sqrt(n)) * rounding.u  # the gradients' sums run over the batch here too
    return Errors(sums, mean_error, variance_error, variance_error, kappa, slope, shift, slope)


def joined_errors(
    parts: Sequence[Errors],
    shares: Sequence[float],
    moments: Sequence[tuple[Number, Number, Number]],
    rounding: Rounding,
) -> Errors:
    """Of the weighted means of several ghosts' m, v and u: theirs, and the rounding of the means."""

    def mean(values: Sequence[float]) -> float:
        return fsum(share * value for share, value in zip(shares, values, strict=True))

    def size(which: int) -> float:
        return mean([abs(_f(values[which])) for values in moments])

    ku = (8.0 + sqrt(len(parts))) * rounding.u
    return Errors(
        ku=max(part.ku for part in parts),
        mean=mean([part.mean for part in parts]) + ku * size(0),
        variance=mean([part.variance for part in parts]) + ku * size(1),
        unbiased=mean([part.unbiased for part in parts]) + ku * size(2),
        kappa=max(part.kappa for part in parts),
        rho=max(part.rho for part in parts) + ku,
        xhat_shift=max(part.xhat_shift for part in parts),
        xhat_slope=max(part.xhat_slope for part in parts),
    )


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


def debiased_error(rounding: Rounding, hidden_error: float, started: Number, value: Number) -> float:
    """Of h/(1 - d^t): h's, and a few roundings, as 1 - d^t can be had to full accuracy."""
    return hidden_error / _f(started) + (8.0 * rounding.u + rounding.stats) * abs(_f(value)) + rounding.stats_floor


def squared_error(rounding: Rounding, stddev: Number, stddev_error: float, eps: Number) -> float:
    """Of max(stddev^2 - eps, 0)."""
    s = _f(stddev)
    value = max(s * s - _f(eps), 0.0)
    return (
        (2.0 * s + stddev_error) * stddev_error
        + 4.0 * rounding.u * (s * s + _f(eps))
        + rounding.stats * value
        + rounding.stats_floor
    )


def renorm_errors(
    errors: Errors,
    rounding: Rounding,
    m: Number,
    mean: Number,
    mean_error: float,
    den: Number,
    den_error: float,
    d: Number,
) -> tuple[float, float]:
    """Of r = sd/den, relative, and of d = (m - mean)/den, before they are clipped."""
    below = _f(den)
    relative = den_error / below + 4.0 * rounding.u
    of_mean = errors.mean + mean_error + 2.0 * rounding.u * (abs(_f(m)) + abs(_f(mean)))
    return errors.rho + relative, of_mean / below + relative * abs(_f(d))


def xhat_error(errors: Errors, xhat: Number) -> float:
    """Of xhat."""
    return errors.xhat_shift + errors.xhat_slope * abs(_f(xhat))


def corrected_error(
    errors: Errors, rounding: Rounding, xhat: Number, r: Number, r_error: float, d: Number, d_error: float, s: Number,
    b: Number,
) -> float:  # fmt: skip
    """Of z = (xhat r + d) s + b: each factor's own error, and a rounding for each operation."""
    h, ar, ad, scale = abs(_f(xhat)), abs(_f(r)), abs(_f(d)), abs(_f(s))
    inner = ar * xhat_error(errors, xhat) + ar * h * r_error + d_error + 2.0 * rounding.u * (ar * h + ad)
    return scale * inner + 2.0 * rounding.u * (scale * (ar * h + ad) + abs(_f(b)))


def output_error(rounding: Rounding, gamma: Number, beta: Number, z_error: float, y: Number) -> float:
    """Of y = gamma z + beta, where z is xhat or what it became."""
    return abs(_f(gamma)) * z_error + rounding.u * abs(_f(beta)) + rounding.out * abs(_f(y)) + rounding.out_floor


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


def product_sum_error(errors: Errors, dy: Sequence[Number], z: Sequence[Number], z_error: Sequence[float]) -> float:
    """Of sum dy z: z's errors, and the roundings of the products and their sum."""
    return fsum(abs(_f(d)) * (e + errors.ku * abs(_f(value))) for d, value, e in zip(dy, z, z_error, strict=True))


def dx_error(
    errors: Errors, rounding: Rounding, sums: Sums, factor: Number, factor_error: float, dy: Number, xhat: Number,
    p: Number, s2: Number, dx: Number,
) -> float:  # fmt: skip
    """Of dx = factor (dy - p (S1 + xhat S2)), factor = gamma r/sd, where r has the relative error `factor_error`."""
    h, share, product = abs(_f(xhat)), _f(p), abs(_f(s2))
    terms = errors.ku * abs(_f(dy)) + share * (
        errors.ku * sums.dy + h * sums.s2_error + (errors.xhat_shift + errors.xhat_slope * h) * product
    )
    relative = errors.rho + factor_error + rounding.out
    return abs(_f(factor)) * terms + relative * abs(_f(dx)) + rounding.out_floor


def dbeta_error(rounding: Rounding, dy: Sequence[Number]) -> float:
    """Of dbeta = sum dy."""
    ku = (8.0 + sqrt(len(dy))) * rounding.u
    return rounded(rounding.param, rounding.param_floor, ku * fsum(abs(_f(d)) for d in dy), fsum(_f(d) for d in dy))


def rounded(unit: float, floor: float, error: float, value: Number) -> float:
    """An error, and the last rounding of the result."""
    return error + unit * abs(_f(value)) + floor


def dweight_error(
    errors: Errors, rounding: Rounding, sums: Sums, factor: Number, factor_error: float, xhat: Number, ratio: Number,
    s1: Number, s2: Number,
) -> float:  # fmt: skip
    """Of one position's part of dw = -factor (xhat S1 + (xhat^2 - v/(v+eps))/2 S2), factor = gamma r/W."""
    h, r = abs(_f(xhat)), _f(ratio)
    a1, a2 = abs(_f(s1)), abs(_f(s2))
    at = xhat_error(errors, xhat)
    half = (h * h + r) / 2
    return abs(_f(factor)) * (
        at * a1 + h * errors.ku * sums.dy + (h * at + errors.rho * r / 2) * a2 + half * sums.s2_error
        + (errors.ku + factor_error) * (h * a1 + half * a2)
    )  # fmt: skip


def second_order_errors(
    errors: Errors, rounding: Rounding, sums: Sums, factor: Number, factor_error: float, sd: Number,
    g: Sequence[Number], xhat: Sequence[Number], p: Sequence[Number], t: Sequence[Number], mean: Number, q: Number,
    moved: Sequence[Number], s2: Number, s2_moved: Number, dx: Sequence[Number], dx_errors: Sequence[float],
    values: Sequence[Number],
) -> list[float]:  # fmt: skip
    """Of hvp = -dx q/sd - factor p (xhat' S2 + xhat S2'), element by element; `moved` is xhat', `mean` is sum(pt).

    The gradient of <dx, t>, which reverse mode takes twice, adds up the same products in another order: with
    G = -factor (g q + p t S2) it is (G - p sum(G) - p xhat sum(G xhat))/sd less p xhat factor (sum(gt) - S1 sum(pt) -
    S2 q)/sd. Each of them is in the bound by its size: ku |dy| and ku sum|dy| in dx's error, sum|g t| in that of S2'.
    """
    ku, deviation = errors.ku, abs(_f(sd)) or 1.0
    of_xhat = [xhat_error(errors, h) for h in xhat]
    sizes = [(abs(_f(h)), abs(_f(pi)), abs(_f(ti))) for h, pi, ti in zip(xhat, p, t, strict=True)]
    mean_error = ku * fsum(share * at for _, share, at in sizes)
    q_error = fsum(share * at * (e + ku * h) for (h, share, at), e in zip(sizes, of_xhat, strict=True))
    size_q, size_mean = abs(_f(q)), abs(_f(mean))
    moved_errors = [
        (ku * (at + size_mean + h * size_q) + mean_error + e * size_q + h * q_error) / deviation
        + errors.rho * abs(_f(d))
        for (h, _, at), e, d in zip(sizes, of_xhat, moved, strict=True)
    ]
    s2_moved_error = fsum(abs(_f(gi)) * (e + ku * abs(_f(d))) for gi, e, d in zip(g, moved_errors, moved, strict=True))
    size_s2, size_s2_moved = abs(_f(s2)), abs(_f(s2_moved))
    relative = errors.rho + factor_error + rounding.out
    return [
        (size_q * dx_error + (q_error + (errors.rho + ku) * size_q) * abs(_f(dxi))) / deviation
        + abs(_f(factor)) * share * (
            e_moved * size_s2 + abs(_f(d)) * sums.s2_error + e_xhat * size_s2_moved + h * s2_moved_error
            + 2.0 * ku * (abs(_f(d)) * size_s2 + h * size_s2_moved)
        )
        + relative * abs(_f(value))
        + rounding.out_floor
        for (h, share, _), e_xhat, e_moved, d, dxi, dx_error, value in zip(
            sizes, of_xhat, moved_errors, moved, dx, dx_errors, values, strict=True)
    ]  # fmt: skip


def _f(value: Number) -> float:
    """A number for a bound: what is not finite has no error, it is compared by kind."""
    number = float(value)
    return number if isfinite(number) else 0.0
