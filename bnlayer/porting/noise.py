"""How far two models' outputs may be apart by rounding alone, and how far they are."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from .replay import NDArray
from .sides import Pass, Side

# Every layer rounds its output anew, where the perturbed run rounds once, at the input. Roundings are independent of
# each other, so they add up as squares: with the root of the depth. A kernel's sum of n terms, taken in two orders,
# differs by more than one rounding, about sqrt(n) of which most cancels; 8 is what may be left of it.
_PER_LAYER: Final = 8.0
_LEAST: Final = 1e-6  # a few roundings of float32 at the last layer, however shallow the model
_MOST: Final = 1e-3  # beyond, a mistake could hide: epsilon 1e-3 in place of 1e-5 costs about as much


def input_of(shape: tuple[int, ...], seed: int) -> NDArray:
    """A random input in float32."""
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def perturbed(x: NDArray, seed: int = 0) -> NDArray:
    """The input, each value of it off by one rounding up or down."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], x.shape)
    off: NDArray = x * (1 + signs * 2.0**-23)
    return off.astype(x.dtype)


def difference(a: NDArray, b: NDArray) -> float:
    """The largest difference as a share of a's largest value; infinite for other shapes and for NaN."""
    if a.shape != b.shape:
        return float("inf")
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        largest = float(np.abs(x).max(initial=0))
        error = float(np.abs(x - y).max(initial=0)) / (largest or 1.0)
    return error if np.isfinite(error) else float("inf")


def bound(floor: float, depth: int) -> float:
    """What rounding may make of an error whose floor, from one rounding at the input, was measured."""
    return min(max(_PER_LAYER * math.sqrt(1 + depth) * floor, _LEAST), _MOST)


def tolerance_of(source: Side, x: NDArray, done: Pass, *, training: bool = False) -> float:
    """The bound for the model's output: by running it on an input that is off by one rounding."""
    floor = difference(done.output, source.run(perturbed(x), training=training).output)
    return bound(floor, done.depth)
