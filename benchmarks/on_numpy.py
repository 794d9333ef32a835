"""NumPy: ours against the textbook's formulas, and against our own plain call what a call can have besides.

The textbook's are those of Ioffe & Szegedy, "Batch Normalization", 2015, as section 3 prints them, forward and
backward. The backward pass may be simplified to half as many passes over memory, as this package does; rows of their
own are against that.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np

from .cases import IMAGES, MODES, ROWS, Case, Mode, NDArray, Pair, Shape, data, parameters
from .options import OPTIONS, Option

_LARGE: Final = {(32, 56, 56, 64), (65536, 64)}
_SMALL: Final = {"eval": 0.55, "train": 0.50, "grad": 0.50}
_EPSILON: Final = 1e-5
# Calls whose limit is about where the bar is.
_CLOSE: Final[tuple[tuple[Mode, str, Shape], ...]] = (
    ("eval", "NC", (65536, 64)),
    ("train", "NC", (65536, 64)),
    ("train", "NHWC", (32, 56, 56, 64)),
    ("train", "NHWC", (64, 14, 14, 256)),
    ("eval", "NCHW", (64, 256, 14, 14)),
    ("train", "NCHW", (64, 256, 14, 14)),
    ("train", "NHWC", (128, 7, 7, 512)),
)
_BLOCK: Final = 2**17  # numbers; half a MiB, as ours
_MIDDLE: Final = {"eval": 0.33, "train": 0.38, "grad": 0.40}


def cases(device: str = "cpu") -> Iterator[Case]:
    """Channels last, and channels first for images."""
    for layout, shape in _shapes():
        for mode in MODES:
            yield _against_textbook(mode, layout, shape, "float32", _bar(layout, shape, mode))
    for layout, shape in _shapes():
        yield _against_textbook("grad", layout, shape, "float32", None, simplified=True)
    for layout, shape in _shapes():
        if shape == (8, 64):
            continue
        for option in OPTIONS:
            for mode in option.modes:
                bar, make = option.bar(mode, strict=True), partial(_against_plain, mode, shape, _axis(layout), option)
                yield Case("numpy", "ours, plain", mode, "float32", f"{layout}, {option.name}", shape, bar, make)
    for mode in MODES:
        kept = "" if mode == "eval" else ", averages and checks"
        peer = f"textbook (not ours: bare operations{kept})"
        yield Case("numpy", peer, mode, "float32", "NC", (256, 128), None, partial(_limit, mode, (256, 128)))
    for mode, layout, shape in _CLOSE:
        peer = "textbook (not ours: bare operations, in blocks on every core)"
        yield Case("numpy", peer, mode, "float32", layout, shape, None, partial(_limit_in_blocks, mode, layout, shape))
    (strided,) = (option for option in OPTIONS if option.name == "strided ghosts")
    peer, shape = "ours, plain (not ours: bare operations, row by row on every core)", (128, 7, 7, 512)
    make = partial(_limit_of_ghosts, shape, strided)
    yield Case("numpy", peer, "train", "float32", f"NHWC, {strided.name}", shape, None, make)
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
    mode: Mode, layout: str, shape: Shape, dtype: str, bar: float | None, *, mean: float = 0.5, simplified: bool = False
) -> Case:
    make = partial(textbook, mode, shape, _axis(layout), dtype, mean, simplified)
    special = "" if mean < 1 else f", mean {mean:g}"
    return Case(
        "numpy", "textbook, simplified" if simplified else "textbook", mode, dtype, layout + special, shape, bar, make
    )


def textbook(mode: Mode, shape: Shape, axis: int, dtype: str, mean: float, simplified: bool) -> Pair:
    x, dy = data(shape, dtype, mean=mean)
    values = {**parameters(shape[axis]), "moving_mean": np.full(shape[axis], mean, np.float32)}
    ours = _ours(mode, shape, axis, x, dy, values)
    peer = _formulas(mode, shape, axis, dtype, simplified, x, dy, values)
    # Beside a large mean it is the textbook's x - mean that loses digits.
    tolerance = 5e-3 if dtype == "float16" or mean > 1 else 1e-4
    return Pair(ours, peer, lambda: (ours(), peer()), tolerance, memory=partial(_memory, ours))


def _formulas(
    mode: Mode,
    shape: Shape,
    axis: int,
    dtype: str,
    simplified: bool,
    x: NDArray,
    dy: NDArray,
    values: dict[str, NDArray],
) -> Callable[[], tuple[NDArray, ...]]:
    """The textbook's call."""
    reduced = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    wide = [1] * len(shape)
    wide[axis] = -1
    epsilon, half, two = np.float32(1e-5), np.float32(0.5), np.float32(2)

    def peer() -> tuple[NDArray, ...]:
        y, *dx = formulas(x.astype(np.float32), dy.astype(np.float32)) if dtype == "float16" else formulas(x, dy)
        return (y.astype(dtype), *(each.astype(dtype) for each in dx)) if dtype == "float16" else (y, *dx)

    def formulas(x: NDArray, dy: NDArray) -> tuple[NDArray, ...]:
        gamma, beta = values["gamma"].reshape(wide), values["beta"].reshape(wide)
        if mode == "eval":
            mean, variance = values["moving_mean"].reshape(wide), values["moving_variance"].reshape(wide)
        else:
            mean, variance = x.mean(reduced, keepdims=True), x.var(reduced, keepdims=True)
        stddev = np.sqrt(variance + epsilon)
        xhat = (x - mean) / stddev
        y = gamma * xhat + beta
        if mode != "grad":
            return (y,)
        count = np.float32(x.size // x.shape[axis])
        dgamma, dbeta = (dy * xhat).sum(reduced, keepdims=True), dy.sum(reduced, keepdims=True)
        if simplified:
            return y, gamma / stddev / count * (count * dy - dbeta - xhat * dgamma)
        dxhat = dy * gamma
        dvariance = (dxhat * (x - mean)).sum(reduced, keepdims=True) * (-half * stddev**-3)
        dmean = (-dxhat / stddev).sum(reduced, keepdims=True)
        dmean += dvariance * (-two * (x - mean)).sum(reduced, keepdims=True) / count
        return y, dxhat / stddev + dvariance * two * (x - mean) / count + dmean / count

    return peer


def _limit(mode: Mode, shape: Shape) -> Pair:
    """Not ours, but what a small call has to do, written for one shape and one spec: nothing is looked up or decided,
    and y holds the squares before it is y. In training statistics are float64 from sums in float32, as are the averages
    that a layer keeps, and E[x^2] - E[x]^2 and what follows from it are looked at before they are trusted."""
    (x, dy), values = data(shape), parameters(shape[-1])
    gamma, beta, wide = values["gamma"], values["beta"], (-1, 8 * shape[-1])  # 8 positions side by side
    rows, along = x.reshape(wide), dy.reshape(wide)
    ones, count = np.ones(len(rows), np.float32), shape[0]

    def sums(first: NDArray, second: NDArray, room: NDArray) -> NDArray:
        found = np.empty((2, first.shape[1]), np.float32)
        ones.dot(first, out=found[0])
        ones.dot(np.multiply(first, second, out=room), out=found[1])
        return np.asarray(np.add.reduce(found.reshape(2, 8, -1), 1, np.float64))

    def side_by_side(*channels: NDArray) -> NDArray:
        found = np.empty((len(channels), 8, shape[-1]), np.float32)
        for i, each in enumerate(channels):
            found[i] = each
        return found.reshape(len(channels), -1)

    def bare() -> tuple[NDArray, ...]:
        y = np.empty_like(rows)
        moving = values["moving_mean"], values["moving_variance"]
        if mode == "eval":
            mean, variance = moving
        else:
            found = sums(rows, rows, y)
            found /= count
            mean, variance = found
            square = mean * mean
            variance -= square
            assert (square <= 4 * variance).all() and variance.dot(variance) < 2.0**160
        rstd = 1 / np.sqrt(variance + _EPSILON)
        scale = gamma * rstd
        if mode != "eval":
            assert rstd.dot(rstd) < 2.0**60 and scale.dot(scale) < 2.0**120
        scales, offsets = side_by_side(scale, beta - mean * scale)
        np.multiply(rows, scales, out=y)
        np.add(y, offsets, out=y)
        if mode == "eval":
            return (y.reshape(shape),)
        averages = np.array(moving, np.float64)
        averages *= 0.99
        found[1] *= count / (count - 1)
        averages += 0.01 * found
        averages.astype(np.float32)
        if mode == "train":
            return (y.reshape(shape),)
        dx = np.empty_like(rows)
        dbeta, dgamma = sums(along, rows, dx)
        dgamma -= mean * dbeta
        dgamma *= rstd
        assert dbeta.dot(dbeta) + dgamma.dot(dgamma) < 2.0**120
        slope = rstd * dgamma / count
        slopes, constants, scales = side_by_side(slope, dbeta / count - mean * slope, scale)
        np.multiply(rows, slopes, out=dx)
        np.subtract(along, dx, out=dx)
        np.subtract(dx, constants, out=dx)
        np.multiply(dx, scales, out=dx)
        return y.reshape(shape), dx.reshape(shape)

    peer = _formulas(mode, shape, -1, "float32", False, x, dy, values)
    return Pair(bare, peer, lambda: (bare(), peer()))


def _limit_in_blocks(mode: Mode, layout: str, shape: Shape) -> Pair:
    """The same for a large call, eval or train: blocks that stay in a core's cache, shared out to all cores, values
    repeated to rows of 16,384 numbers, sums by products with ones. Nothing is checked."""
    (x, dy), values = data(shape), parameters(shape[_axis(layout)])
    gamma, beta, epsilon = values["gamma"], values["beta"], np.float32(_EPSILON)
    channels, after = len(gamma), x[0, 0].size if layout == "NCHW" else 1
    side, count = 1 if layout == "NCHW" else 16384 // channels, np.float32(x.size // channels)
    of_rows = np.ones(after, np.float32)
    rows = x.reshape(-1, side * channels, after)
    step = max(1, _BLOCK // rows[0].size)
    pool = ThreadPoolExecutor(os.cpu_count())

    def on_every_core(work: Callable[[slice, NDArray], Any]) -> list[Any]:
        cores = os.cpu_count() or 1
        ends = [len(rows) * i // cores for i in range(cores + 1)]

        def share(begin: int, end: int) -> list[Any]:
            room = np.empty_like(rows[:step])
            return [work(slice(i, min(i + step, end)), room) for i in range(begin, end, step)]

        return [found for part in pool.map(share, ends, ends[1:]) for found in part]

    def sums(at: slice, room: NDArray) -> tuple[NDArray, NDArray]:
        block = rows[at]
        return total(block), total(np.multiply(block, block, out=room[: len(block)]))

    def total(block: NDArray) -> NDArray:
        long = block.reshape(-1, 1024) if after == 1 else block.reshape(-1, after).dot(of_rows).reshape(-1, channels)
        return np.asarray(np.ones(len(long), np.float32).dot(long))

    def bare() -> tuple[NDArray, ...]:
        mean, variance = values["moving_mean"], values["moving_variance"]
        if mode == "train":
            found = (np.sum(each, 0).reshape(-1, channels) for each in zip(*on_every_core(sums), strict=True))
            first, second = (each.sum(0) for each in found)
            mean = first / count
            variance = second / count - mean * mean
        scale = gamma / np.sqrt(variance + epsilon)
        offset = beta - mean * scale
        scales, offsets = (np.tile(each, side).reshape(-1, 1) for each in (scale, offset))
        y = np.empty_like(rows)

        def apply(at: slice, _: NDArray) -> None:
            np.multiply(rows[at], scales, out=y[at])
            np.add(y[at], offsets, out=y[at])

        on_every_core(apply)
        return (y.reshape(shape),)

    peer = _formulas(mode, shape, _axis(layout), "float32", False, x, dy, values)
    return Pair(bare, peer, lambda: (bare(), peer()))


def _limit_of_ghosts(shape: Shape, option: Option) -> Pair:
    """Not ours, but strided ghost batches of images, of which a core has every second: each image is read twice, and is
    a block. Nothing is checked."""
    arrays, values = data(shape), parameters(shape[-1])
    x, ghosts, channels = arrays[0], 4, shape[-1]
    images, epsilon = x.reshape(len(x), -1, channels), np.float32(_EPSILON)
    ones, count = np.ones(images.shape[1], np.float32), np.float32(images[::ghosts].size // channels)
    pool = ThreadPoolExecutor(os.cpu_count())

    def bare() -> tuple[NDArray, ...]:
        y = np.empty_like(images)

        def normalize(ghost: int) -> None:
            room, first, second = np.empty_like(images[0]), np.zeros(channels), np.zeros(channels)
            for image in images[ghost::ghosts]:
                first += ones.dot(image)
                second += ones.dot(np.multiply(image, image, out=room))
            mean = first / count
            scale = values["gamma"] / np.sqrt(second / count - mean * mean + epsilon)
            row = np.empty_like(images[0])
            row[...] = scale
            room[...] = values["beta"] - mean * scale
            for image, result in zip(images[ghost::ghosts], y[ghost::ghosts], strict=True):
                np.multiply(image, row, out=result)
                np.add(result, room, out=result)

        list(pool.map(normalize, range(ghosts)))
        return (y.reshape(shape),)

    plain = _ours("train", shape, -1, *arrays, values)
    return Pair(bare, plain, lambda: (bare(), option.right("train", arrays, values, _EPSILON, -1)))


def _against_plain(mode: Mode, shape: Shape, axis: int, option: Option) -> Pair:
    arrays, values = data(shape), parameters(shape[axis])
    plain = _ours(mode, shape, axis, *arrays, values)
    call = _ours(mode, shape, axis, *arrays, values, option.weights(shape, axis), **option.fields(shape[0]))

    def results() -> tuple[tuple[NDArray, ...], tuple[NDArray, ...]]:
        return call(), option.right(mode, arrays, values, _EPSILON, axis)

    return Pair(call, plain, results, memory=partial(_memory, call))


def _ours(
    mode: Mode,
    shape: Shape,
    axis: int,
    x: NDArray,
    dy: NDArray,
    values: dict[str, NDArray],
    weights: NDArray | None = None,
    **fields: Any,
) -> Callable[[], tuple[NDArray, ...]]:
    import bnlayer
    from bnlayer_numpy import batch_norm_backward, batch_norm_forward

    spec = bnlayer.BatchNormSpec(shape[axis], axis=axis, epsilon=_EPSILON, **fields)
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
