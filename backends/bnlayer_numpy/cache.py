"""What a forward pass leaves for the backward one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec

from .abreast import Abreast
from .layout import Layout
from .weights import Weights, is_real

NDArray = np.ndarray[Any, np.dtype[Any]]


class Scaling(NamedTuple):
    """xhat = ((x - shift) - rest) rstd, and y = (x - shift) scale + offset: where the shift is near the mean, x - shift
    loses nothing.

    Attributes:
        shift: (C,), in the plan's arithmetic; None for 0, where that is near enough.
        rest: mean - shift, float64 (C,).
        rstd: 1/sqrt(variance + eps), float64 (C,).
        scale: gamma r rstd, float64 (C,), and never too large or too small for float32.
        offset: beta + gamma d - rest scale, float64 (C,).
    """

    shift: NDArray | None
    rest: NDArray
    rstd: NDArray
    scale: NDArray
    offset: NDArray


class Part(NamedTuple):
    """The rows that one set of statistics normalizes: the whole batch, or a ghost batch.

    Attributes:
        rows: of the batch axis.
        mean, variance: what normalizes, float64, of the plan's `channel_shape`.
        r, d: batch renormalization's corrections; 1 and 0 without.
        proportions: w/W (1/n without weights); None where the moving statistics normalize: then x reaches y directly
            only.
        weights: of these rows, or None.
        scaling: how `blocked` normalizes these rows; None where only the definition does.
    """

    rows: slice
    mean: NDArray
    variance: NDArray
    r: NDArray | float
    d: NDArray | float
    proportions: NDArray | float | None
    weights: Weights | None
    scaling: Scaling | None = None


class Cache(NamedTuple):
    """What the backward pass needs of one forward pass.

    Attributes:
        x, gamma, beta, weights, adjustment: as they came.
        parts: one for each set of statistics.
        plan, spec: of the call.
        layout: how x lies in memory; None where the definition computes all of the call.
        abreast: how ghost batches are side by side in x, the parameters, the parts and the spec; None: they are not.
    """

    x: NDArray
    gamma: NDArray | None
    beta: NDArray | None
    weights: NDArray | None
    adjustment: tuple[NDArray, NDArray] | None
    parts: tuple[Part, ...]
    plan: CallPlan
    spec: BatchNormSpec
    layout: Layout | None
    abreast: Abreast | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x as it was given."""
        return self.x.shape if self.abreast is None else self.abreast.shape

    @property
    def weights_are_real(self) -> bool:
        """Whether a gradient flows to the weights."""
        return self.weights is not None and is_real(self.weights)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one call: `dx` like x; `dgamma`, `dbeta` (C,) of `param_dtype`, None where the spec has no such
    parameter; `dweights` like the weights, None without weights or for a mask."""

    dx: NDArray
    dgamma: NDArray | None
    dbeta: NDArray | None
    dweights: NDArray | None


class PartGradients(NamedTuple):
    """What one part adds to the gradients, float64: (C,) to dgamma and dbeta, the weights' shape to theirs (None where
    none of them flows there)."""

    dgamma: NDArray
    dbeta: NDArray
    dweights: NDArray | None


def per_channel(values: NDArray, plan: CallPlan, dtype: Any = None) -> NDArray:
    """Broadcast against x, in this dtype or the plan's arithmetic."""
    return values.astype(dtype or plan.arithmetic).reshape(plan.channel_shape)
