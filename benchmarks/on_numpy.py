"""NumPy: ours against the textbook's formulas, and against our own plain call what a call can have besides."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np

from .cases import IMAGES, MODES, ROWS, Case, Mode, NDArray, Pair, Shape, data, parameters

_LARGE: Final = {(32, 56, 56, 64), (65536, 64)}
_SMALL: Final = {"eval": 0.55, "train": 0.50, "grad": 0.50}
_MIDDLE: Final = {"eval": 0.33, "train": 0.38, "grad": 0.40}
_MASKED: Final = {"eval": 1.1, "train": 1.5, "grad": 2.0}
_CORRECTED: Final = 1.5
# What a call has besides x; each against our own call without it.
_MASKS: Final = ("mask", "weights")
_OTHERS: Final = ("renorm", "ghosts-strided", "ghosts-consecutive")
_GHOSTS: Final = 4


def cases() -> Iterator[Case]:
    """Channels last, and channels first for images."""
    for layout, shape in _shapes():
        for mode in MODES:
            yield _against_textbook(mode, layout, shape, "float32", _bar(layout, shape, mode))
    for layout, shape in _shapes():
        if shape == (8, 64):
            continue
        for kind in (*_MASKS, *_OTHERS):
            for mode in MODES:
                if kind in _MASKS or mode != "eval":
                    bar = _MASKED[mode] if kind in _MASKS else _CORRECTED
                    make = partial(_against_plain, mode, shape, _axis(layout), kind)
                    yield Case("numpy", "ours, plain", mode, "float32", f"{layout}, {kind}", shape, bar, make)
    for layout, shape in (("NHWC", (32, 56, 56, 64)), ("NCHW", (32, 64, 56, 56))):
        for mode in MODES:
            yield _against_textbook(mode, layout, shape, "float16", None)
            yield _against_textbook(mode, layout, shape, "float64", None)
            yield _against_textbook(mode, layout, shape, "float32", None, mean=1e3)


def _shapes() -> Iterator[tuple[str, Shape]]:
    for shape in (*IMAGES, *ROWS):
        if len(shape) == 4:
            yield "NHWC", shape
            yield "NCHW", (shape[0], shape[3], shape[1], shape[2])
        else:
            yield "NC", shape


def _bar(layout: str, shape: Shape, mode: Mode) -> float | None:
    if shape in _LARGE:
        return 0.25
    if shape == (256, 128):
        return _SMALL[mode]
    return None if shape in ((8, 64), (8, 112, 112, 64)) else _MIDDLE[mode]


def _axis(layout: str) -> int:
    return 1 if layout == "NCHW" else -1


def _against_textbook(
    mode: Mode, layout: str, shape: Shape, dtype: str, bar: float | None, *, mean: float = 0.5
) -> Case:
    make = partial(_textbook, mode, shape, _axis(layout), dtype, mean)
    special = "" if mean < 1 else f", mean {mean:g}"
    return Case("numpy", "textbook", mode, dtype, layout + special, shape, bar, make)


def _textbook(mode: Mode, shape: Shape, axis: int, dtype: str, mean: float) -> Pair:
    x, dy = data(shape, dtype, mean=mean)
    values = {**parameters(shape[axis]), "moving_mean": np.full(shape[axis], mean, np.float32)}
    ours = _ours(mode, shape, axis, x, dy, values)
    reduced = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    wide = [1] * len(shape)
    wide[axis] = -1
    epsilon = np.float32(1e-5)

    def peer() -> tuple[NDArray, ...]:
        y, *dx = formulas(x.astype(np.float32), dy.astype(np.float32)) if dtype == "float16" else formulas(x, dy)
        return (y.astype(dtype), *(each.astype(dtype) for each in dx)) if dtype == "float16" else (y, *dx)

    def formulas(x: NDArray, dy: NDArray) -> tuple[NDArray, ...]:
        gamma, beta = values["gamma"].reshape(wide), values["beta"].reshape(wide)
        if mode == "eval":
            mean, variance = values["moving_mean"].reshape(wide), values["moving_variance"].reshape(wide)
        else:
            mean, variance = x.mean(reduced, keepdims=True), x.var(reduced, keepdims=True)
        rstd = 1 / np.sqrt(variance + epsilon)
        xhat = (x - mean) * rstd
        y = gamma * xhat + beta
        if mode != "grad":
            return (y,)
        dbeta, dgamma = dy.sum(reduced, keepdims=True), (dy * xhat).sum(reduced, keepdims=True)
        count = np.float32(x.size // x.shape[axis])
        return y, gamma * rstd / count * (count * dy - dbeta - xhat * dgamma)

    # Beside a large mean it is the textbook's x - mean that loses digits.
    tolerance = 5e-3 if dtype == "float16" or mean > 1 else 1e-4
    return Pair(ours, peer, lambda: (ours(), peer()), tolerance, memory=partial(_memory, ours))


def _against_plain(mode: Mode, shape: Shape, axis: int, kind: str) -> Pair:
    x, dy = data(shape)
    values = parameters(shape[axis])
    positions = tuple(length for i, length in enumerate(shape) if i != axis % len(shape))
    plain = _ours(mode, shape, axis, x, dy, values)
    if kind in _MASKS:
        chance = np.random.default_rng(2).random(positions, np.float32)
        given, same = (chance < 0.7, np.ones(positions, bool)) if kind == "mask" else (chance, np.ones_like(chance))
        call, neutral = (_ours(mode, shape, axis, x, dy, values, weights=weights) for weights in (given, same))
    elif kind == "renorm":
        call = neutral = _ours(mode, shape, axis, x, dy, values, renorm=True)
    else:
        call = neutral = _ours(mode, shape, axis, x, dy, values, ghosts=kind.partition("-")[2])

    def results() -> tuple[tuple[NDArray, ...], tuple[NDArray, ...]]:
        """Of what must not change a result: weights of 1, corrections clipped to nothing, the mean of the ghosts."""
        if kind in _MASKS:
            return neutral(), plain()
        if kind == "renorm":
            return _ours(mode, shape, axis, x, dy, values, renorm=True, clipped=True)(), plain()
        layout = kind.partition("-")[2]
        parts = [
            _ours(mode, (shape[0] // _GHOSTS, *shape[1:]), axis, x[rows], dy[rows], values)()
            for rows in _rows(shape[0], layout)
        ]
        joined = tuple(np.empty_like(array) for array in call())
        for rows, of_part in zip(_rows(shape[0], layout), parts, strict=True):
            for whole, part in zip(joined, of_part, strict=True):
                whole[rows] = part
        return call(), joined

    return Pair(call, plain, results, memory=partial(_memory, call))


def _rows(length: int, layout: str) -> list[slice]:
    if layout == "strided":
        return [slice(g, None, _GHOSTS) for g in range(_GHOSTS)]
    each = length // _GHOSTS
    return [slice(g * each, (g + 1) * each) for g in range(_GHOSTS)]


def _ours(
    mode: Mode,
    shape: Shape,
    axis: int,
    x: NDArray,
    dy: NDArray,
    values: dict[str, NDArray],
    *,
    weights: NDArray | None = None,
    renorm: bool = False,
    clipped: bool = False,
    ghosts: str | None = None,
) -> Callable[[], tuple[NDArray, ...]]:
    import bnlayer
    from bnlayer_numpy import batch_norm_backward, batch_norm_forward

    options: dict[str, Any] = {}
    if renorm:
        options["renorm"] = bnlayer.Renorm(r_max=1, r_min=1, d_max=0) if clipped else bnlayer.Renorm()
    if ghosts is not None:
        options.update(virtual_batch_size=shape[0] // _GHOSTS, virtual_batch_layout=ghosts)
    spec = bnlayer.BatchNormSpec(shape[axis], axis=axis, **options)
    state = bnlayer.BatchNormState(**values).checked(spec)

    def call() -> tuple[NDArray, ...]:
        y, _, cache = batch_norm_forward(x, state, spec, training=mode != "eval", weights=weights)
        return (y,) if mode != "grad" else (y, batch_norm_backward(dy, cache).dx)

    return call


def _memory(call: Callable[[], tuple[NDArray, ...]]) -> int:
    """At the peak of one call, its results included."""
    tracemalloc.start()
    try:
        results = call()
        return tracemalloc.get_traced_memory()[1] if results else 0
    finally:
        tracemalloc.stop()
