"""One batch norm's recorded input and output, against what its spec and state say: in float64, one layer at a time.

A layer judged on its own input is judged apart from whatever went wrong before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]
Mode = Literal["moving", "batch"]  # whose statistics normalize

# A layer rounds its scale, its shift, their products with x and the sum: a handful of roundings, and the slack of the
# ones that kernels add by folding (x - mean) * a + beta into x * a + (beta - a * mean).
_ROUNDINGS: Final = 32
KNOWN_EPSILONS: Final = (1e-3, 1e-5, 1.001e-5, 1e-6, 1e-4, 2e-5, 1e-2, 1e-7, 1e-8, 1e-12, 0.0)
# An average computed in float32 from a batch's statistics, in whatever order these were summed.
_UPDATE: Final = 1e-5


@dataclass(frozen=True, eq=False)
class Values:
    """A batch norm's numbers in float64, all of shape (channels,)."""

    gamma: NDArray
    beta: NDArray
    mean: NDArray
    variance: NDArray


@dataclass(frozen=True, eq=False)
class Seen:
    """What went through a batch norm in one forward pass.

    Attributes:
        x, y: its input and output in float64, (values per channel, channels).
        unit: the unit roundoff of the coarser of their dtypes.
    """

    x: NDArray
    y: NDArray
    unit: float

    @classmethod
    def of(cls, pair: tuple[NDArray, NDArray], axis: int) -> Seen:
        """A record of `Run.layers`, whose channels are on `axis`."""
        x, y = (np.moveaxis(np.asarray(array), axis, -1) for array in pair)
        unit = max(_unit(array.dtype) for array in (x, y))
        wide = [array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (x, y)]
        return cls(wide[0], wide[1], max(unit, 2.0**-24))

    @property
    def count(self) -> int:
        """Values per channel."""
        return int(self.x.shape[0])

    def moments(self) -> tuple[NDArray, NDArray]:
        """The batch's mean and biased variance."""
        return self.x.mean(axis=0), self.x.var(axis=0)

    def misfit(self, values: Values, epsilon: float, mode: Mode) -> float:
        """How far y is from what these values make of x, as a share of the numbers that it is computed from.

        0 where both are NaN in the same places; infinite where one alone is.
        """
        with np.errstate(all="ignore"):
            mean, variance = (values.mean, values.variance) if mode == "moving" else self.moments()
            a = values.gamma / np.sqrt(variance + epsilon)
            expected = (self.x - mean) * a + values.beta
            scale = np.abs(a) * (np.abs(self.x).max(axis=0) + np.abs(mean)) + np.abs(values.beta)
            if mode == "batch":  # E[x^2] - E[x]^2 loses as many digits as the mean is large
                scale = scale * (1 + (mean**2 + variance) / (variance + epsilon))
            error = np.abs(self.y - expected) / np.where(scale > 0, scale, 1)
        same = np.isnan(self.y) & np.isnan(expected) | (self.y == expected)
        error = np.where(same, 0, np.where(np.isnan(error), np.inf, error))
        return float(error.max(initial=0))

    @property
    def tolerance(self) -> float:
        """What rounding alone may make of `misfit`."""
        return _ROUNDINGS * self.unit

    def epsilon(self, values: Values, mode: Mode) -> float | None:
        """The epsilon with which y comes of x, solved for; None where nothing tells.

        y = a x + b with a = gamma / sqrt(variance + epsilon), so epsilon = (gamma / a)^2 - variance: from every channel
        that varies, weighted by how many digits are left after the subtraction.
        """
        with np.errstate(all="ignore"):
            mean, variance = self.moments()
            centered = self.x - mean
            a = (centered * self.y).sum(axis=0) / (centered**2).sum(axis=0)
            base = values.variance if mode == "moving" else variance
            solved = (values.gamma / a) ** 2 - base
            weight = 1 / (base + np.abs(solved)) ** 2
        good = np.isfinite(solved) & np.isfinite(weight) & (variance > 0) & (values.gamma != 0)
        if not good.any():
            return None
        return float((solved[good] * weight[good]).sum() / weight[good].sum())

    def explained(self, values: Values, told: tuple[float, ...]) -> tuple[Mode, float, float] | None:
        """The first of whose statistics, and which epsilon, that gives y of x; and the misfit left. None: none does.

        Args:
            values: what the layer holds.
            told: epsilons to try first.
        """
        modes: tuple[Mode, ...] = ("moving", "batch")
        for mode in modes:
            fitting = [(self.misfit(values, epsilon, mode), epsilon) for epsilon in (*told, *KNOWN_EPSILONS)]
            first = next((each for each in fitting[: len(told)] if each[0] <= self.tolerance), None)
            best = first or min(fitting)
            if best[0] <= self.tolerance:
                return mode, best[1], best[0]
            solved = self.epsilon(values, mode)
            if solved is not None and solved > 0:
                solved = float(f"{solved:.3g}")
                left = self.misfit(values, solved, mode)
                if left <= self.tolerance:
                    return mode, solved, left
        return None


@dataclass(frozen=True, eq=False)
class Step:
    """One training step of a batch norm: the statistics before and after, and what went through."""

    before: Values
    after: Values
    seen: Seen


def update_error(steps: list[Step], decay: float, correction: bool) -> float:
    """How far the moving statistics are from decay * old + (1 - decay) * batch; a share of the batch's deviation.

    Args:
        correction: whether the batch's variance enters as n/(n-1) times the biased one.
    """
    worst = 0.0
    for step in steps:
        mean, variance = step.seen.moments()
        factor = _bessel(step.seen.count) if correction else 1.0
        # Rounding is a share of the numbers themselves, so these belong to the scale.
        scale = np.sqrt(variance) + np.abs(mean) + np.abs(step.before.mean) + 1e-30
        error = np.abs(step.after.mean - decay * step.before.mean - (1 - decay) * mean) / scale
        spread = variance + np.abs(step.before.variance) + mean**2 * step.seen.unit + 1e-30
        other = np.abs(step.after.variance - decay * step.before.variance - (1 - decay) * factor * variance) / spread
        worst = max(worst, _max(error), _max(other))
    return worst


def update_tolerance(steps: list[Step]) -> float:
    """What rounding alone may make of `update_error`."""
    return max(_UPDATE, max((step.seen.tolerance for step in steps), default=0.0))


def solved_update(steps: list[Step]) -> tuple[float, bool] | None:
    """The decay, and whether the variance is corrected by n/(n-1), with which the statistics moved as they did.

    after - before = (1 - decay) (batch - before): by least squares over channels and steps, from the means; the
    variances then tell the correction. None where the batches do not differ from the averages.
    """
    top = bottom = 0.0
    for step in steps:
        mean, variance = step.seen.moments()
        weight = 1 / (variance + 1e-30)
        drive = mean - step.before.mean
        top += float((weight * drive * (step.after.mean - step.before.mean)).sum())
        bottom += float((weight * drive**2).sum())
    if not bottom > 0 or not np.isfinite(top / bottom):
        return None
    decay = 1 - top / bottom
    if not -1e-6 <= decay <= 1 + 1e-6:
        return None
    decay = min(max(float(f"{decay:.4g}"), 0.0), 1.0)
    errors = [update_error(steps, decay, correction) for correction in (False, True)]
    return decay, errors[1] < errors[0]


def _unit(dtype: np.dtype[Any]) -> float:
    """The unit roundoff of a float dtype, ml_dtypes' among them."""
    finfo: Any = ml_dtypes.finfo
    return float(finfo(dtype).eps) / 2


def _bessel(count: int) -> float:
    return count / (count - 1) if count > 1 else 1.0


def _max(array: NDArray) -> float:
    return float("inf") if bool(np.isnan(array).any()) else float(array.max(initial=0))
