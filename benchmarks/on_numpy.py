"""NumPy: ours against the textbook's formulas."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from .cases import IMAGES, MODES, ROWS, Case, Mode, NDArray, Pair, Shape, data, parameters

_LARGE = {(32, 56, 56, 64), (65536, 64), (8, 112, 112, 64)}
_SMALL = {"eval": 0.55, "train": 0.50, "grad": 0.50}
_MIDDLE = {"eval": 0.33, "train": 0.38, "grad": 0.40}


def cases() -> Iterator[Case]:
    """Channels last, and channels first for images."""
    for shape in (*IMAGES, *ROWS):
        for mode in MODES:
            bar = 0.25 if shape in _LARGE else _SMALL[mode] if shape == (256, 128) else _MIDDLE[mode]
            layout = "NHWC" if len(shape) == 4 else "NC"
            yield _case(mode, layout, shape, None if shape == (8, 64) or shape == (8, 112, 112, 64) else bar)
            if len(shape) == 4:
                first = (shape[0], shape[3], shape[1], shape[2])
                yield _case(mode, "NCHW", first, _MIDDLE[mode])


def _case(mode: Mode, layout: str, shape: Shape, bar: float | None) -> Case:
    axis = 1 if layout == "NCHW" else -1
    return Case("numpy", "textbook", mode, "float32", layout, shape, bar, partial(_pair, mode, shape, axis))


def _pair(mode: Mode, shape: Shape, axis: int) -> Pair:
    import bnlayer
    from bnlayer_numpy import batch_norm_backward, batch_norm_forward

    x, dy = data(shape)
    values = parameters(shape[axis])
    spec = bnlayer.BatchNormSpec(shape[axis], axis=axis)
    state = bnlayer.BatchNormState(**values)
    reduced = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    wide = [1] * len(shape)
    wide[axis] = -1

    def ours() -> tuple[Any, ...]:
        y, _, cache = batch_norm_forward(x, state, spec, training=mode != "eval")
        if mode != "grad":
            return (y,)
        gradients = batch_norm_backward(dy, cache)
        return y, gradients.dx

    def peer() -> tuple[NDArray, ...]:
        gamma, beta = values["gamma"].reshape(wide), values["beta"].reshape(wide)
        if mode == "eval":
            mean, variance = values["moving_mean"].reshape(wide), values["moving_variance"].reshape(wide)
        else:
            mean, variance = x.mean(reduced, keepdims=True), x.var(reduced, keepdims=True)
        rstd = 1 / np.sqrt(variance + np.float32(spec.epsilon))
        xhat = (x - mean) * rstd
        y = gamma * xhat + beta
        if mode != "grad":
            return (y,)
        dbeta, dgamma = dy.sum(reduced, keepdims=True), (dy * xhat).sum(reduced, keepdims=True)
        count = np.float32(x.size // x.shape[axis])
        return y, gamma * rstd / count * (count * dy - dbeta - xhat * dgamma)

    def memory() -> int:
        tracemalloc.start()
        try:
            result = ours()
            return tracemalloc.get_traced_memory()[1] if result else 0
        finally:
            tracemalloc.stop()

    return Pair(ours, peer, lambda: (ours(), peer()), memory=memory)
