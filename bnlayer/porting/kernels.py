"""A layer's kernel and bias from one framework's layout into another's."""

from __future__ import annotations

from math import prod
from typing import Any, Final

import numpy as np

from ..errors import CheckpointError
from .layouts import Shape
from .units import Unit, Units

NDArray = np.ndarray[Any, np.dtype[Any]]


def kernel_for(source: Unit, target: Unit, kernel: NDArray, shape: Shape, flatten: Shape | None) -> NDArray:
    """The target's kernel, of the source's values and dtype.

    Args:
        kernel: the source's, as stored.
        shape: the target's, as stored.
        flatten: of a dense layer, (channels, *spatial) before its input was flattened, where the two frameworks flatten
            in different orders; else None. `source` says which order the kernel's rows have.

    Raises:
        CheckpointError: the values do not fit.
    """
    canonical = source.layout.canonical(kernel)
    if flatten is not None:
        canonical = _reordered(canonical, flatten, channels_first=source.layout.name == "OI")
    wanted = target.layout.canonical_shape(shape)
    if canonical.shape != wanted:
        short, long = sorted((canonical.shape, wanted), key=len)
        if long[: len(short)] != short or prod(long[len(short) :]) != 1:
            raise CheckpointError(f"{source.name} -> {target.name}: {canonical.shape} does not fit {wanted}.")
        canonical = canonical.reshape(wanted)  # a dense layer, as a 1x1 convolution
    return target.layout.stored(canonical, shape)


def _reordered(kernel: NDArray, flatten: Shape, *, channels_first: bool) -> NDArray:
    """(out, in) with its columns in the other order: of (channels, *spatial) or of (*spatial, channels)."""
    channels, *spatial = flatten
    if channels_first:
        return np.moveaxis(kernel.reshape(-1, channels, *spatial), 1, -1).reshape(kernel.shape)
    return np.moveaxis(kernel.reshape(-1, *spatial, channels), -1, 1).reshape(kernel.shape)


def flattens(source: Units, target: Units, s: Unit, t: Unit, given: Shape | None) -> tuple[Shape | None, str]:
    """Whether a dense layer's columns must be put into another order, and the shape by which to do it.

    A flattened feature map has its channels first in torch and Equinox, and last in the others. That a layer's input
    was flattened is told by the models, a rules file, or by it having more features than the layer before has channels.

    Returns:
        The shape or None, and why it cannot be told ("" where it can).
    """
    if s.kind != "dense" or t.kind != "dense" or (s.layout.name == t.layout.name):
        return None, ""
    known = given or t.flatten or s.flatten
    features = s.shape[1]
    if known is not None:
        if prod(known) != features:
            return None, f"it takes {features} features, and the shape before flattening, {known}, has {prod(known)}"
        return (known, "") if prod(known[1:]) > 1 else (None, "")
    # Only the first dense layer after convolutions can have a flattened input.
    befores = [_width_before(side, u) for side, u in ((source, s), (target, t)) if side.ordered == "all"]
    if any(width is not None and features != width and features % width == 0 for width in befores):
        return None, _unclear(features)
    widths = [{u.channels for u in side.units if u.kind in _SPATIAL} for side in (source, target)]
    dense = [{u.channels for u in side.units if u.kind == "dense"} for side in (source, target)]
    convolutional = any(u.kind in ("conv", "depthwise", "conv transpose") for u in source.units)
    if not convolutional or features in widths[0] or features in widths[1]:
        return None, ""
    if features in dense[0] and features in dense[1]:
        return None, ""
    if any(features % width == 0 and features > width for width in widths[0]):
        return None, _unclear(features)
    return None, ""


_SPATIAL: Final = ("conv", "depthwise", "conv transpose", "batch norm", "norm")


def _width_before(side: Units, dense: Unit) -> int | None:
    """The channels of the layer just before a dense one, if that may have a feature map for output; else None."""
    before = [u for u in side.units if u.order < dense.order]
    convolutional = any(u.kind in ("conv", "depthwise", "conv transpose") for u in before)
    return before[-1].channels if convolutional and before[-1].kind in _SPATIAL else None


def _unclear(features: int) -> str:
    return (
        f"its {features} features may be a flattened feature map, whose order differs between the frameworks; give"
        " flatten = [channels, height, width] in a rules file, or a live model as the template"
    )
