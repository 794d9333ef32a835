"""What moving statistics do to x. In eval that depends on the state alone, and takes a small call as long as x does: so
the last few states are remembered, by their bytes, for anyone may write to an array."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np

from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from . import at_once, blocked
from .cache import NDArray, Scaling

# Beyond so many channels to compare bytes takes as long as to compute.
_FEW_CHANNELS: Final = 1024
# NumPy's own buffer. What is repeated along rows as long is not copied there first, and needs no smaller one.
_LONG_FOR_NUMPY: Final = 8192
_Bytes = tuple[np.dtype[Any], bytes]


class Evaluated(NamedTuple):
    """What moving statistics do to an x of some length.

    Attributes:
        mean, variance: float64 (C,).
        scaling: what is done to x with them; None where that is for the definition.
        row: its scale and offset in the arithmetic, for all positions or for so many that NumPy reads a row like plain
            memory; None where there are not as many, or the scaling has a shift.
    """

    mean: NDArray
    variance: NDArray
    scaling: Scaling | None
    row: tuple[NDArray, NDArray] | None = None


def evaluated(state: BatchNormState[NDArray], spec: BatchNormSpec, arithmetic: str, positions: int) -> Evaluated:
    """What the moving statistics do to an x of so many positions: mean 0 and variance 1 where none are tracked.

    What is returned is not to be written to.
    """
    mean, variance, gamma, beta = state.moving_mean, state.moving_variance, state.gamma, state.beta
    if mean is None or variance is None:
        mean, variance = np.zeros(spec.num_features), np.ones(spec.num_features)
    if len(mean) > _FEW_CHANNELS:
        return _made(mean, variance, gamma, beta, spec.epsilon, arithmetic)
    return _remembered(
        (mean.dtype, mean.tobytes()),
        (variance.dtype, variance.tobytes()),
        None if gamma is None else (gamma.dtype, gamma.tobytes()),
        None if beta is None else (beta.dtype, beta.tobytes()),
        spec.epsilon, arithmetic, _side(positions, len(mean)),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _remembered(
    mean: _Bytes, variance: _Bytes, gamma: _Bytes | None, beta: _Bytes | None, epsilon: float, arithmetic: str,
    side: int,
) -> Evaluated:  # fmt: skip
    given = (
        _array(mean),
        _array(variance),
        None if gamma is None else _array(gamma),
        None if beta is None else _array(beta),
    )
    found = _made(*given, epsilon, arithmetic)
    scaling = found.scaling
    if scaling is not None and scaling.shift is None and side:
        dtype = np.dtype(arithmetic)
        scale, offset = (at_once.repeated(each, side, dtype) for each in (scaling.scale, scaling.offset))
        found = found._replace(row=(scale, offset))
    for array in (found.mean, found.variance, *(scaling or ()), *(found.row or ())):
        if array is not None:
            array.flags.writeable = False  # a call's cache shows them to whoever has it
    return found


def _side(positions: int, channels: int) -> int:
    """Of how many positions a row is; 0 where there is to be none."""
    side = at_once.side(positions, channels, _LONG_FOR_NUMPY)
    return side if side == positions or side * channels >= _LONG_FOR_NUMPY else 0


def _array(given: _Bytes) -> NDArray:
    dtype, held = given
    return np.frombuffer(held, dtype)


def _made(
    mean: NDArray, variance: NDArray, gamma: NDArray | None, beta: NDArray | None, epsilon: float, arithmetic: str
) -> Evaluated:
    mean, variance = mean.astype(np.float64), variance.astype(np.float64)
    standard = blocked.standardized_by(mean, variance, epsilon, arithmetic)
    return Evaluated(mean, variance, None if standard is None else blocked.scaled(standard, gamma, beta, None))
