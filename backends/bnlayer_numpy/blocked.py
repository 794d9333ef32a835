"""One batch, or ghost batch, block by block: the formulas of definition.py and statistics.py, with each block read from
memory once per sum and once per result, in place, in the plan's arithmetic; sums in float64 across blocks.

What that costs in accuracy, with u the unit roundoff, K = 8 + sqrt(n) the vectors' allowance (`bounds.py` of the
conformance suite) and s the shift:

* Sums of k numbers within a block are off by about sqrt(k) u/3 of their root mean square times k, as rounding errors
  grow like a random walk; blocks' errors are independent, and the additions across them are exact to float64.
* v = mean((x-s)^2) - (m-s)^2 is off by that, relative to mean((x-s)^2) = v + (m-s)^2. A result is trusted only where
  (m-s)^2 <= 4 v, which makes it at most five times the error of a sum of 32 squares: 9 u v, within K u v. Zero is tried
  first, as it costs nothing; then a sample's mean.
* y = (x-s) scale + offset, with offset = beta - (m-s) scale from float64, is off by u |gamma| (|xhat| + 2 |m-s|/sd),
  and |m-s| <= 2 sd, or 4 sd where moving statistics normalize.

Trusted numbers lie where neither squares nor scales can leave the range of float32; `moments`, `standardized_by`,
`scaled` and `gradients` say so by None where they do not, and the definition takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np

from bnlayer.spec import BatchNormSpec

from . import at_once
from .cache import Cache, NDArray, Part, PartGradients, Scaling
from .layout import ALL, BLOCK_BYTES, Cut, Layout, Panel, fitted, joined, long_rows, over, panels, put, side_by_side
from .sums import Sum, total
from .weights import Weights, summed

# Variances (plus epsilon) between these keep squares, products and scales of float32 far from its ends, 2**-126 and
# 2**128, also in a channel where one of 2**30 values is all the variance there is.
LEAST_VARIANCE: Final = 2.0**-60
LARGEST_VARIANCE: Final = 2.0**80
LARGEST_SCALE: Final = 2.0**60
# Beyond a total of the variances of this a scale may be so small, where gamma is, that float32 holds few of its digits.
# Below, what is lost, 2**-150 |x - m|, stays below 2**-126, the smallest normal number: |x - m| < 256 sd < 2**24.
COMMON_VARIANCE: Final = 2.0**32
LEAST_SCALE: Final = 2.0**-100
SQUARES: Final = 4.0  # variances that the square of a mean may be, relative to the shift
FARTHEST: Final = 4.0  # deviations from a moving mean to 0 within which x needs no shift
SAMPLE: Final = 32
# Where in the batch the sample's positions lie: one in each 32nd, at places that no period of the data follows.
_PLACES: Final = (np.arange(SAMPLE) + np.arange(SAMPLE) * 0.6180339887498949 % 1.0) / SAMPLE


class Standard(NamedTuple):
    """xhat = ((x - shift) - rest) rstd, as in `Scaling`; `wide`: some variance is so large that a scale may be too
    small for float32."""

    shift: NDArray | None
    rest: NDArray
    rstd: NDArray
    wide: bool


def moments(
    rows: NDArray, layout: Layout, weights: Weights | None, spec: BatchNormSpec, arithmetic: str
) -> tuple[NDArray, NDArray, Standard] | None:
    """Mean and biased variance, float64 (C,), and what standardizes x; None where they cannot be trusted.

    Args:
        rows: of a view of x, not empty.
        layout: which gave the view.
        weights: of these rows, their total above 0; or None.
    """
    dtype, view = np.dtype(arithmetic), joined(rows)
    at = None if weights is None else _positions(weights, layout, view, dtype)
    shift = None if view.nbytes <= BLOCK_BYTES else _shift(view, at, dtype, always=False)
    whole = prod(layout.shape)
    found = _moments(view, shift, at, spec, dtype, whole)
    if found is None and shift is None:
        found = _moments(view, _shift(view, at, dtype, always=True), at, spec, dtype, whole)
    return found


def standardized_by(mean: NDArray, variance: NDArray, epsilon: float, arithmetic: str) -> Standard | None:
    """What standardizes x by moving statistics, (C,) and float64; None where that is for the definition."""
    found = _standard(None, mean, variance, epsilon)
    if found is None:
        return None
    far = mean * found.rstd
    if far.dot(far) <= FARTHEST**2 or np.abs(far).max() <= FARTHEST:
        return found
    shift = mean.astype(arithmetic)
    return found._replace(shift=shift, rest=mean - shift) if np.isfinite(shift).all() else None


def scaled(
    standard: Standard, gamma: NDArray | None, beta: NDArray | None, correction: tuple[NDArray, NDArray] | None
) -> Scaling | None:
    """What is done to x in all; None where float32 may not hold its scale.

    Args:
        standard: what standardizes x.
        gamma, beta: (C,).
        correction: r and d of batch renormalization.
    """
    shift, rest, rstd, wide = standard
    scale: NDArray = rstd if gamma is None else rstd * gamma
    if correction is not None:
        r, d = (each.reshape(-1) for each in correction)
        beta_of_d = d if gamma is None else d * gamma
        beta = beta_of_d if beta is None else beta_of_d + beta
        scale = scale * r
    if not scale.dot(scale) <= LARGEST_SCALE**2:
        return None
    if wide and (np.abs(scale[scale != 0.0]) < LEAST_SCALE).any():
        return None
    offset = rest * scale
    return Scaling(shift, rest, rstd, scale, np.negative(offset, out=offset) if beta is None else beta - offset)


def normalize(x: NDArray, y: NDArray, cache: Cache, part: Part) -> bool:
    """Write the part's rows of y; False where that is for the definition. x and y are views of the cache's layout."""
    scaling, arithmetic = part.scaling, np.dtype(cache.plan.arithmetic)
    if scaling is None:
        return False
    view, target = joined(x[part.rows]), joined(y[part.rows])
    shift, scale, offset = scaling.shift, scaling.scale, scaling.offset
    rows = at_once.rows_of(arithmetic, view, target) if shift is None else None
    if rows is not None:
        at_once.apply(rows[0], rows[1], at_once.spread(scale, rows[0]), at_once.spread(offset, rows[0]))
        put(target, y[part.rows])
        return True
    side = side_by_side(view, target)
    view, target = long_rows(view, side), long_rows(target, side)
    cut = panels(view.shape, arithmetic.itemsize, shifted=shift is not None, whole=cache.x.size)
    values = _Values((shift, scale, offset), arithmetic, side, cut)
    over(cut, partial(_normalized, view, target, values, arithmetic), backward=True)
    put(target, y[part.rows])
    return True


def _normalized(
    view: NDArray, target: NDArray, values: _Values, arithmetic: np.dtype[Any], panel: Panel, cuts: Sequence[Cut]
) -> None:
    shifts, scales, offsets = values(panel)
    loaded = _Loaded(panel, arithmetic)
    for cut in reversed(cuts):
        x, result = loaded(view[cut]), target[cut]
        out = result if result.dtype == arithmetic else loaded.like(result)
        if shifts is not None:
            x = np.subtract(x, fitted(shifts, x), out=out)
        np.multiply(x, fitted(scales, x), out=out)
        np.add(out, fitted(offsets, x), out=out)
        if out is not result:
            np.copyto(result, out, casting="unsafe")


def gradients(x: NDArray, dy: NDArray, dx: NDArray, cache: Cache, part: Part) -> PartGradients | None:
    """Write the part's rows of dx; what these add to the other gradients, or None where that is for the definition.

    With S1 = sum(dy), S2 = sum(dy xhat) and xhat = (x - s) rstd - e, where e = (m - s) rstd:
    dx = gamma r rstd (dy - p ((S1 - e S2) + (x - s) rstd S2)). x, dy and dx are views of the cache's layout.
    """
    scaling, arithmetic = part.scaling, np.dtype(cache.plan.arithmetic)
    if cache.layout is None or scaling is None:
        return None
    scale = scaling.scale
    view, dy, target = joined(x[part.rows]), joined(dy[part.rows]), joined(dx[part.rows])
    cut = panels(view.shape, arithmetic.itemsize, shifted=scaling.shift is not None, whole=x.size)
    s1, s2 = _gradient_sums(view, dy, target, cut, scaling, arithmetic)
    if not s1.dot(s1) + s2.dot(s2) <= LARGEST_SCALE**2:
        return None
    dgamma, dweights = s2 if cache.spec.renorm is None else s2 * _flat(part.r) + s1 * _flat(part.d), None
    if part.proportions is None:
        _scaled(dy, target, cut, scale, arithmetic)
        put(target, dx[part.rows])
        return PartGradients(dgamma, s1, None)
    at = None if part.weights is None else _positions(part.weights, cache.layout, view, arithmetic)
    p = part.proportions if part.weights is None else 1.0
    slope, constant = p * scaling.rstd * s2, p * (s1 - scaling.rest * scaling.rstd * s2)
    if not _projected(view, dy, target, scaling.shift, slope, constant, scale, at, arithmetic, x.size):
        return None
    put(target, dx[part.rows])
    if part.weights is not None and cache.weights_are_real:
        dweights = _dweights(view, cut, cache, part, scaling, s1, s2, arithmetic)
        if not np.isfinite(dweights).all():
            return None
        dweights = summed(cache.layout.at_positions(dweights), part.weights)
    return PartGradients(dgamma, s1, dweights)


def _gradient_sums(
    view: NDArray, dy: NDArray, room: NDArray, cut: tuple[Panel, ...], scaling: Scaling, arithmetic: np.dtype[Any]
) -> tuple[NDArray, NDArray]:
    """sum(dy) and sum(dy xhat); `room`, of dy's shape, may be overwritten."""
    rows = at_once.rows_of(arithmetic, view, dy, room) if scaling.shift is None else None
    if rows is None:
        s1, products = _totals(over(cut, partial(_panel_gradient_sums, view, dy, scaling.shift, arithmetic)))
    else:
        (x, g, buffer), channels = rows, view.shape[2]
        s1 = at_once.total(g, channels)
        products = at_once.total(np.multiply(g, x, out=buffer), channels)
    return s1, (products - scaling.rest * s1) * scaling.rstd


def _panel_gradient_sums(
    view: NDArray, dy: NDArray, shift: NDArray | None, arithmetic: np.dtype[Any], panel: Panel, cuts: Sequence[Cut]
) -> tuple[NDArray, NDArray]:
    shifts = None if shift is None else panel.spread(shift, arithmetic)
    load_x, load_dy = _Loaded(panel, arithmetic), _Loaded(panel, arithmetic, adjacent=True)
    of_dy, of_products = Sum(panel, arithmetic), Sum(panel, arithmetic)
    for at in cuts:
        x, g = load_x(view[at]), load_dy(dy[at])
        buffer = load_x.like(x)
        if shifts is not None:
            x = np.subtract(x, fitted(shifts, x), out=buffer)
        of_dy.add(g)
        of_products.add_products(x, g, buffer)
    return of_dy.channels(), of_products.channels()


def _scaled(dy: NDArray, target: NDArray, cut: tuple[Panel, ...], scale: NDArray, arithmetic: np.dtype[Any]) -> None:
    """dx = scale dy."""
    for panel in reversed(cut):
        load_dy = _Loaded(panel, arithmetic)
        scales = panel.spread(scale, arithmetic)
        for at in reversed(panel.cuts):
            g = load_dy(dy[at])
            np.multiply(g, fitted(scales, g), out=target[at], casting="unsafe")


def _projected(
    view: NDArray, dy: NDArray, target: NDArray, shift: NDArray | None, slope: NDArray,
    constant: NDArray, scale: NDArray, weights: NDArray | None, arithmetic: np.dtype[Any], whole: int,
) -> bool:  # fmt: skip
    """dx = scale (dy - w (constant + (x - shift) slope)); False where what lies under a mask has spoilt it."""
    rows = at_once.rows_of(arithmetic, view, dy, target) if shift is None and weights is None else None
    if rows is not None:
        x, g, result = rows
        np.multiply(x, at_once.spread(slope, x), out=result)
        np.subtract(g, result, out=result)
        np.subtract(result, at_once.spread(constant, x), out=result)
        np.multiply(result, at_once.spread(scale, x), out=result)
        return True
    side = side_by_side(view, dy, target) if weights is None else 1
    view, dy, target = long_rows(view, side), long_rows(dy, side), long_rows(target, side)
    cut = panels(view.shape, arithmetic.itemsize, shifted=shift is not None, whole=whole)
    values = _Values((shift, slope, constant, scale), arithmetic, side, cut)
    work = partial(_panel_projected, view, dy, target, values, weights, arithmetic)
    return all(all(found) for found in over(cut, work, backward=True))


def _panel_projected(
    view: NDArray, dy: NDArray, target: NDArray, values: _Values, weights: NDArray | None,
    arithmetic: np.dtype[Any], panel: Panel, cuts: Sequence[Cut],
) -> bool:  # fmt: skip
    shifts, slopes, constants, scales = values(panel)
    load_x, load_dy = _Loaded(panel, arithmetic), _Loaded(panel, arithmetic)
    check = None if weights is None else Sum(panel, arithmetic)
    for at in reversed(cuts):
        x, g, result = load_x(view[at]), load_dy(dy[at]), target[at]
        buffer = result if result.dtype == arithmetic else load_x.like(x)
        if shifts is not None:
            x = np.subtract(x, fitted(shifts, x), out=buffer)
        np.multiply(x, fitted(slopes, x), out=buffer)
        if weights is None or check is None:
            np.subtract(g, buffer, out=buffer)
            np.subtract(buffer, fitted(constants, x), out=buffer)
        else:
            np.add(buffer, fitted(constants, x), out=buffer)
            np.multiply(buffer, weights[_all_channels(at)], out=buffer)
            check.add(buffer)
            np.subtract(g, buffer, out=buffer)
        np.multiply(buffer, fitted(scales, x), out=result, casting="unsafe")
    return check is None or bool(np.isfinite(check.channels()).all())


def _dweights(
    view: NDArray, cut: tuple[Panel, ...], cache: Cache, part: Part, scaling: Scaling, s1: NDArray, s2: NDArray,
    arithmetic: np.dtype[Any],
) -> NDArray:  # fmt: skip
    """-1/W sum_c gamma r (xhat S1 + (xhat^2 - v/(v+eps))/2 S2) at each position, as a polynomial in x - s."""
    assert part.weights is not None
    variance, e = _flat(part.variance), scaling.rest * scaling.rstd
    factor = -_flat(part.r) / part.weights.total * (np.ones(len(s1)) if cache.gamma is None else cache.gamma)
    ratio = variance / (variance + cache.spec.epsilon)
    linear = (factor * scaling.rstd * (s1 - e * s2)).astype(arithmetic)
    quadratic = (0.5 * factor * scaling.rstd**2 * s2).astype(arithmetic)
    n, a, _, b = view.shape
    found = np.full((n, a, 1, b), np.dot(factor, 0.5 * (e * e - ratio) * s2 - e * s1))
    for panel in cut:
        load_x = _Loaded(panel, arithmetic)
        shifts = None if scaling.shift is None else panel.spread(scaling.shift, arithmetic)
        for at in panel.cuts:
            x = load_x(view[at])
            buffer = load_x.like(x)
            if shifts is not None:
                x = np.subtract(x, fitted(shifts, x), out=buffer)
            here = found[_all_channels(at)]
            here += _over_channels(x, linear[panel.channels])
            here += _over_channels(np.multiply(x, x, out=buffer), quadratic[panel.channels])
    return found


def _over_channels(block: NDArray, values: NDArray) -> NDArray:
    """sum_c values_c block_c at each position of the block: (n, a, 1, b)."""
    n, a, c, b = block.shape
    found = np.dot(block.reshape(-1, c), values) if b == 1 else np.matmul(values, block)
    return np.asarray(found).reshape(n, a, 1, b)


def _moments(
    view: NDArray, shift: NDArray | None, weights: NDArray | None, spec: BatchNormSpec, arithmetic: np.dtype[Any],
    whole: int,
) -> tuple[NDArray, NDArray, Standard] | None:  # fmt: skip
    """`moments` with this shift; `whole`: numbers in the batch, of which this may be a part."""
    rows = at_once.rows_of(arithmetic, view) if shift is None else None
    if rows is None:
        cut = panels(view.shape, arithmetic.itemsize, shifted=shift is not None, whole=whole)
        sums, squares = _totals(over(cut, partial(_panel_moments, view, shift, weights, arithmetic)))
    else:
        (x,) = rows
        channels = view.shape[2]
        sums, squares = at_once.total(x, channels, weights), at_once.total(x * x, channels, weights)
    p = view.shape[2] / view.size if weights is None else 1.0
    rest = sums * p
    square = rest * rest
    variance = squares * p - square
    if not (square <= SQUARES * variance).all() or not variance.dot(variance) <= LARGEST_VARIANCE**2:
        return None
    if spec.stats_dtype == "float64" and arithmetic == np.float32 and not (variance >= LEAST_VARIANCE).all():
        return None  # in float32 the squares of such a channel may have vanished, and float64 averages show that
    standard = _standard(shift, rest, variance, spec.epsilon)
    return None if standard is None else (rest if shift is None else shift + rest, variance, standard)


def _panel_moments(
    view: NDArray, shift: NDArray | None, weights: NDArray | None, arithmetic: np.dtype[Any], panel: Panel,
    cuts: Sequence[Cut],
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """The sums of x and of its squares, as far as these cuts go."""
    shifts = None if shift is None else panel.spread(shift, arithmetic)
    load = _Loaded(panel, arithmetic, adjacent=True)
    first, second = Sum(panel, arithmetic), Sum(panel, arithmetic)
    for at in cuts:
        x = load(view[at])
        buffer = load.like(x)
        if shifts is not None:
            x = np.subtract(x, fitted(shifts, x), out=buffer)
        if weights is None:
            first.add(x)
            second.add_products(x, x, buffer)
        else:
            w = weights[_all_channels(at)]
            first.add_weighted(x, w)
            second.add_weighted(np.multiply(x, x, out=buffer), w)
    return first.channels(), second.channels()


def _standard(shift: NDArray | None, rest: NDArray, variance: NDArray, epsilon: float) -> Standard | None:
    stddev = np.sqrt(variance + epsilon)
    rstd = 1.0 / stddev
    if not rstd.dot(rstd) <= 1.0 / LEAST_VARIANCE:
        return None
    return Standard(shift, rest, rstd, wide=not stddev.dot(stddev) <= COMMON_VARIANCE)


def _shift(view: NDArray, weights: NDArray | None, arithmetic: np.dtype[Any], *, always: bool) -> NDArray | None:
    """The mean of some positions of positive weight, (C,); None where 0 would do as well, unless `always`."""
    n, a, _, b = view.shape
    held = None if weights is None else np.flatnonzero(weights)
    count = n * a * b if held is None else len(held)
    places = np.arange(count) if count <= SAMPLE else (_PLACES * count).astype(np.intp)
    i, j, k = np.unravel_index(places if held is None else held[places], (n, a, b))
    sample = view[i, j, :, k].astype(arithmetic)
    base = sample[0].copy()  # relative to one value, so that a constant channel's mean is that value, to the last bit
    sample -= base
    rest = sample.mean(0)
    mean: NDArray = base + rest
    if not always and (mean * mean <= 0.5 * SQUARES * (np.square(sample).mean(0) - rest * rest)).all():
        return None
    return mean


def _positions(weights: Weights, layout: Layout, view: NDArray, arithmetic: np.dtype[Any]) -> NDArray:
    """The weights' proportions at every position of the view, and 1 for its channels."""
    n, a, _, b = view.shape
    rows = n * a // layout.shape[1]
    return layout.positions(weights.proportions, rows, arithmetic).reshape(n, a, 1, b)


def _flat(values: NDArray | float) -> NDArray | float:
    return values.reshape(-1) if isinstance(values, np.ndarray) else values


def _totals(found: list[list[tuple[NDArray, NDArray]]]) -> tuple[NDArray, NDArray]:
    """Two sums, (C,), from what was found of both for parts of each panel."""
    if len(found) == len(found[0]) == 1:
        return found[0][0]
    first, second = (np.concatenate([total(pair[i] for pair in panel) for panel in found]) for i in (0, 1))
    return first, second


def _all_channels(at: Cut) -> Cut:
    return at[0], at[1], ALL, at[3]


class _Values:
    """Per-channel values, the first of which may be missing, spread for each panel's blocks: once for all threads where
    there is one panel, whose spread may be as large as a block."""

    def __init__(
        self, values: tuple[NDArray | None, ...], arithmetic: np.dtype[Any], side: int, cut: tuple[Panel, ...]
    ) -> None:
        self._values, self._arithmetic, self._side = values, arithmetic, side
        self._ready = self._spread(cut[0]) if len(cut) == 1 else None

    def __call__(self, panel: Panel) -> tuple[Any, ...]:
        return self._spread(panel) if self._ready is None else self._ready

    def _spread(self, panel: Panel) -> tuple[Any, ...]:
        return tuple(None if v is None else panel.spread(v, self._arithmetic, self._side) for v in self._values)


class _Loaded:
    """A panel's blocks in the arithmetic: as they are, or converted into one buffer that all of them share.

    `adjacent`: so are those whose rows are not adjacent in memory, which every sum would copy to new memory.
    """

    def __init__(self, panel: Panel, arithmetic: np.dtype[Any], *, adjacent: bool = False) -> None:
        self._shape = panel.block
        self._adjacent = adjacent
        self._arithmetic = arithmetic
        self._buffer: NDArray | None = None

    def __call__(self, block: NDArray) -> NDArray:
        if block.dtype == self._arithmetic and (not self._adjacent or block.flags.c_contiguous):
            return block
        buffer = self.like(block)
        np.copyto(buffer, block, casting="unsafe")
        return buffer

    def like(self, block: NDArray) -> NDArray:
        """The buffer, in this block's shape."""
        if self._buffer is None:
            self._buffer = np.empty(self._shape, self._arithmetic)
        if self._buffer.shape == block.shape:
            return self._buffer
        return self._buffer.reshape(-1)[: block.size].reshape(block.shape)
