"""torch: our modules against `torch.nn`'s, and what those do not have against our own plain call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from .cases import IMAGES, MODES, ROWS, Case, Mode, NDArray, Pair, Shape, data, parameters
from .options import OPTIONS, Option

_FIRST: Final = {"eval": 1.02, "train": 0.50, "grad": 0.85}
_EPSILON: Final = 1e-5
_NAMES: Final = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def cases(device: str = "cpu") -> Iterator[Case]:
    """Contiguous channels first, channels_last, and rank 2."""
    inputs: list[tuple[str, Shape]] = [
        (layout, (s[0], s[3], s[1], s[2])) for s in IMAGES for layout in ("NCHW", "channels_last")
    ]
    inputs += [("NC", shape) for shape in ROWS]
    bars = device == "cpu"
    for layout, shape in inputs:
        for mode in MODES:
            bar = _FIRST[mode] if layout == "NCHW" else 1.05 if shape == (8, 64) else 1.02
            yield _against_torch(device, mode, layout, shape, bar if bars else None)
    for option in OPTIONS:
        for layout, shape in inputs:
            for mode in option.modes:
                bar = option.bar(mode, strict=layout == "NCHW")
                make = partial(_option_pair, device, mode, layout, shape, option)
                yield Case(
                    "torch", "ours, plain", mode, "float32", f"{layout}, {option.name}", shape,
                    bar if bars and shape != (8, 64) else None, make,
                )  # fmt: skip
    if bars:
        yield from _limits(inputs)
    for layout, shape in (("NCHW", (64, 256, 14, 14)), ("channels_last", (64, 256, 14, 14)), ("NC", (65536, 64))):
        for mode in MODES:
            yield _against_torch(device, mode, layout, shape, None, dtype="bfloat16")
            yield _against_torch(device, mode, layout, shape, None, mean=1e3)
            yield _against_torch(device, mode, layout, shape, None, compiled=True)


def _limits(inputs: list[tuple[str, Shape]]) -> Iterator[Case]:
    """Not ours, but the least that calls take which are near their bar: see `limits_torch`."""
    for layout, shape in inputs:
        rank_2, small, first = len(shape) == 2, shape == (256, 128), layout == "NCHW"
        if shape == (8, 64):
            continue
        peer = "torch.nn.BatchNorm1d" if rank_2 else "torch.nn.BatchNorm2d"
        for mode in MODES:
            if mode == "eval" or not first:
                yield _limit(peer, "the kernel", layout, None, shape, mode)
        for option in OPTIONS:
            if small and option.name == "weights":
                yield _limit("ours, plain", "itself, and a look at them", layout, option, shape, "eval")
            for mode in ("train", "grad"):
                if option.kind is not None:
                    there = mode == "train" or rank_2
                elif option.name == "renorm":
                    there = small
                else:
                    there = not first and (shape != (65536, 64) or option.name == "consecutive ghosts")
                if there:
                    yield _limit("ours, plain", "bare operations", layout, option, shape, mode)


def _limit(peer: str, what: str, layout: str, option: Option | None, shape: Shape, mode: Mode) -> Case:
    said = layout if option is None else f"{layout}, {option.name}"
    kept = shape == (256, 128) and mode != "eval"  # what is nothing beside a large input is a good part of a small call
    what += ", averages and a check" if kept else " alone" if option is None else ""
    make = partial(_limit_pair, layout, option, shape, mode, kept)
    return Case("torch", f"{peer} (not ours: {what})", mode, "float32", said, shape, None, make)


def _limit_pair(layout: str, option: Option | None, shape: Shape, mode: Mode, kept: bool) -> Pair:
    import torch

    import bnlayer_torch

    from .limits_torch import Bare, looked

    arrays, values = data(shape), parameters(shape[1])
    tensors = _tensors("cpu", mode, layout, arrays, "float32")
    weights = None if option is None else option.weights(shape, 1)
    given = () if weights is None else (torch.from_numpy(weights),)
    layer = _layer(torch.nn if option is None else bnlayer_torch, mode, shape, "cpu")
    bare: Any = Bare("" if option is None else option.name, values, _EPSILON, training=mode != "eval", kept=kept)
    if mode == "eval" and given:
        bare = partial(looked, layer)
    peer, ours = _run(layer, mode, *tensors), _run(bare, mode, *tensors, *given)

    def results() -> Any:
        right = _arrays(peer()) if option is None else option.right(mode, arrays, values, _EPSILON, 1)
        return _arrays(ours()), right

    return Pair(ours, peer, results)


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
    # The same tensors for both: where in memory they lie, and in pages of which size, may be worth more than a bar.
    tensors = _tensors(device, mode, layout, data(shape, mean=mean), dtype)
    runs = [_run(layer, mode, *tensors) for layer in layers]
    # At a mean of 1e3 roundings of x itself are 1e-4, and torch's kernel adds up some of them.
    tolerance = 2e-2 if dtype == "bfloat16" else 5e-2 if mean == 1e3 else 1e-4
    return _pair(runs, lambda: tuple(_arrays(run()) for run in runs), tolerance, device)


def _option_pair(device: str, mode: Mode, layout: str, shape: Shape, option: Option) -> Pair:
    import torch

    import bnlayer_torch

    arrays, weights = data(shape), option.weights(shape, 1)
    fields = option.fields(shape[0])
    if "renorm" in fields:
        fields["moving_variance_estimator"] = "biased"  # which renorm goes with, and torch's own is not
    layers = [_layer(bnlayer_torch, mode, shape, device, **arguments) for arguments in (fields, {})]
    given = () if weights is None else (torch.from_numpy(weights).to(device),)
    tensors = _tensors(device, mode, layout, arrays, "float32")
    ours, peer = _run(layers[0], mode, *tensors, *given), _run(layers[1], mode, *tensors)

    def results() -> Any:
        return _arrays(ours()), option.right(mode, arrays, parameters(shape[1]), _EPSILON, 1)

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
        layer.zero_grad()
        y = layer(x, *weights)
        y.backward(dy)
        dx, x.grad = x.grad, None  # held on to, it would count as there before the next call
        return y, dx

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
