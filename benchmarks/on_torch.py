"""torch: our modules against `torch.nn`'s, and what those do not have against our own plain call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np

from .cases import IMAGES, MODES, ROWS, Case, Mode, NDArray, Pair, Shape, data, parameters

_FIRST: Final = {"eval": 1.02, "train": 0.50, "grad": 0.85}
_EPSILON: Final = 1e-5
_GHOSTS: Final = 4
_NAMES: Final = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


@dataclass(frozen=True)
class _Option:
    """What our module can and torch's cannot, with the bars against our own plain call.

    Attributes:
        name: for the case's name.
        bars: by mode; those for contiguous channels first where they are others.
        weights: "mask" or "weights" of every position.
        arguments: of our module, by the number of rows.
        groups: which ghost batch each row is in, by the number of rows.
    """

    name: str
    bars: Mapping[Mode, float]
    first: Mapping[Mode, float] = field(default_factory=dict)
    weights: str | None = None
    arguments: Callable[[int], dict[str, Any]] = lambda _: {}
    groups: Callable[[int], NDArray] | None = None


def _renorm(_: int) -> dict[str, Any]:
    from bnlayer import Renorm

    # With these clips, which cost what others do, the result is that of the plain call.
    return {"renorm": Renorm(r_max=1.0, r_min=1.0, d_max=0.0), "moving_variance_estimator": "biased"}


def _ghosts(layout: str, rows: int) -> dict[str, Any]:
    return {"virtual_batch_size": rows // _GHOSTS, "virtual_batch_layout": layout}


_WEIGHTED: Final[dict[Mode, float]] = {"eval": 1.1, "train": 2.0, "grad": 2.0}
_OTHER: Final[dict[Mode, float]] = {"train": 1.5, "grad": 1.5}
_OPTIONS: Final = (
    _Option("mask", _WEIGHTED, {"train": 1.5}, weights="mask"),
    _Option("weights", _WEIGHTED, {"train": 1.5}, weights="weights"),
    _Option("renorm", _OTHER, arguments=_renorm),
    _Option("strided ghosts", _OTHER, arguments=partial(_ghosts, "strided"), groups=lambda n: np.arange(n) % _GHOSTS),
    _Option(
        "consecutive ghosts", _OTHER, arguments=partial(_ghosts, "consecutive"),
        groups=lambda n: np.arange(n) // (n // _GHOSTS),
    ),
)  # fmt: skip


def cases(device: str = "cpu") -> Iterator[Case]:
    """Contiguous channels first, channels_last, and rank 2."""
    inputs = [(layout, (s[0], s[3], s[1], s[2])) for s in IMAGES for layout in ("NCHW", "channels_last")]
    inputs += [("NC", shape) for shape in ROWS]
    bars = device == "cpu"
    for layout, shape in inputs:
        for mode in MODES:
            bar = _FIRST[mode] if layout == "NCHW" else 1.05 if shape == (8, 64) else 1.02
            yield _against_torch(device, mode, layout, shape, bar if bars else None)
    for option in _OPTIONS:
        for layout, shape in inputs:
            for mode, usual in option.bars.items():
                bar = option.first.get(mode, usual) if layout == "NCHW" else usual
                make = partial(_option_pair, device, mode, layout, shape, option)
                yield Case(
                    "torch", "ours, plain", mode, "float32", f"{layout}, {option.name}", shape,
                    bar if bars and shape != (8, 64) else None, make,
                )  # fmt: skip
    for layout, shape in (("NCHW", (64, 256, 14, 14)), ("channels_last", (64, 256, 14, 14)), ("NC", (65536, 64))):
        for mode in MODES:
            yield _against_torch(device, mode, layout, shape, None, dtype="bfloat16")
            yield _against_torch(device, mode, layout, shape, None, mean=1e3)
            yield _against_torch(device, mode, layout, shape, None, compiled=True)


def _against_torch(
    device: str, mode: Mode, layout: str, shape: Shape, bar: float | None, *, dtype: str = "float32",
    mean: float = 0.5, compiled: bool = False,
) -> Case:  # fmt: skip
    peer = "torch.nn.BatchNorm2d" if len(shape) == 4 else "torch.nn.BatchNorm1d"
    said = f"{layout}, mean 1e3" if mean == 1e3 else f"{layout}, torch.compile" if compiled else layout
    make = partial(_torch_pair, device, mode, layout, shape, dtype, mean, compiled)
    return Case("torch", peer, mode, dtype, said, shape, bar, make)


def _torch_pair(device: str, mode: Mode, layout: str, shape: Shape, dtype: str, mean: float, compiled: bool) -> Pair:
    import torch

    import bnlayer_torch

    layers = [_layer(package, mode, shape, device) for package in (bnlayer_torch, torch.nn)]
    if compiled:
        layers = [torch.compile(layer) for layer in layers]
    runs = [_run(layer, mode, *_tensors(device, mode, layout, data(shape, mean=mean), dtype)) for layer in layers]
    # At a mean of 1e3 roundings of x itself are 1e-4, and torch's kernel adds up some of them.
    tolerance = 2e-2 if dtype == "bfloat16" else 5e-2 if mean == 1e3 else 1e-4
    return _pair(runs, lambda: tuple(_arrays(run()) for run in runs), tolerance, device)


def _option_pair(device: str, mode: Mode, layout: str, shape: Shape, option: _Option) -> Pair:
    import torch

    import bnlayer_torch

    arrays = data(shape)
    weights = None
    if option.weights is not None:
        rng = np.random.default_rng(2)
        drawn = rng.uniform(0, 1, (shape[0], *shape[2:])).astype(np.float32)
        weights = drawn > 0.2 if option.weights == "mask" else drawn
    layers = [_layer(bnlayer_torch, mode, shape, device, **arguments) for arguments in (option.arguments(shape[0]), {})]
    given = () if weights is None else (torch.from_numpy(weights).to(device),)
    tensors = _tensors(device, mode, layout, arrays, "float32")
    ours, peer = _run(layers[0], mode, *tensors, *given), _run(layers[1], mode, *tensors)

    def results() -> Any:
        groups = None if option.groups is None else option.groups(shape[0])
        return _arrays(ours()), _reference(mode, *arrays, weights, groups)

    return _pair([ours, peer], results, 1e-4, device)


def _layer(package: Any, mode: Mode, shape: Shape, device: str, **arguments: Any) -> Any:
    import torch

    layer = getattr(package, "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d")(shape[1], eps=_EPSILON, **arguments)
    values = parameters(shape[1])
    given = {name: torch.from_numpy(values[role]) for name, role in _NAMES.items()}
    layer.load_state_dict({**layer.state_dict(), **given})
    return layer.to(device).train(mode != "eval")


def _tensors(device: str, mode: Mode, layout: str, arrays: tuple[NDArray, NDArray], dtype: str) -> tuple[Any, Any]:
    import torch

    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = (torch.from_numpy(a).to(device, getattr(torch, dtype)).contiguous(memory_format=order) for a in arrays)
    return x.requires_grad_(mode == "grad"), dy


def _run(layer: Any, mode: Mode, x: Any, dy: Any, *weights: Any) -> Callable[[], tuple[Any, ...]]:
    import torch

    def forward() -> tuple[Any, ...]:
        with torch.no_grad():
            return (layer(x, *weights),)

    def both() -> tuple[Any, ...]:
        x.grad = None
        layer.zero_grad()
        y = layer(x, *weights)
        y.backward(dy)
        return y, x.grad

    return both if mode == "grad" else forward


def _pair(runs: list[Callable[[], Any]], results: Callable[[], Any], tolerance: float, device: str) -> Pair:
    if device == "cpu":
        return Pair(runs[0], runs[1], results, tolerance)
    import torch

    def to_the_end(run: Callable[[], Any]) -> None:
        run()
        torch.cuda.synchronize()

    def memory() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        to_the_end(runs[0])
        return int(torch.cuda.max_memory_allocated() - before)

    return Pair(partial(to_the_end, runs[0]), partial(to_the_end, runs[1]), results, tolerance, memory)


def _arrays(tensors: tuple[Any, ...]) -> tuple[NDArray, ...]:
    return tuple(tensor.detach().cpu().float().numpy().copy() for tensor in tensors)


def _reference(
    mode: Mode, x: NDArray, dy: NDArray, weights: NDArray | None, groups: NDArray | None
) -> tuple[NDArray, ...]:
    """y and dx by the definition, in double precision."""
    wide = (1, -1, *[1] * (x.ndim - 2))
    values = {name: value.reshape(wide).astype(np.float64) for name, value in parameters(x.shape[1]).items()}
    if mode == "eval":
        xhat = (x - values["moving_mean"]) / np.sqrt(values["moving_variance"] + _EPSILON)
        return (values["gamma"] * xhat + values["beta"],)
    axes = (0, *range(2, x.ndim))
    y, dx = np.empty(x.shape), np.empty(x.shape)
    for group in [np.arange(len(x))] if groups is None else [np.flatnonzero(groups == g) for g in np.unique(groups)]:
        part, dpart = x[group].astype(np.float64), dy[group].astype(np.float64)
        w = np.ones((1,) * x.ndim) if weights is None else np.expand_dims(weights, 1).astype(np.float64)
        share = w / np.broadcast_to(w, (len(part), 1, *x.shape[2:])).sum()
        mean = (share * part).sum(axes, keepdims=True)
        sd = np.sqrt((share * np.square(part - mean)).sum(axes, keepdims=True) + _EPSILON)
        xhat = (part - mean) / sd
        y[group] = values["gamma"] * xhat + values["beta"]
        sums = dpart.sum(axes, keepdims=True) + xhat * (dpart * xhat).sum(axes, keepdims=True)
        dx[group] = values["gamma"] / sd * (dpart - share * sums)
    return (y, dx) if mode == "grad" else (y,)
