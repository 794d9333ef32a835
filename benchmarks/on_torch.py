"""torch: our modules against `torch.nn`'s."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from .cases import IMAGES, MODES, ROWS, Case, Mode, Pair, Shape, data, parameters

_FIRST = {"eval": 1.02, "train": 0.50, "grad": 0.85}


def cases() -> Iterator[Case]:
    """Contiguous channels first, channels_last, and rank 2."""
    for shape in IMAGES:
        first = (shape[0], shape[3], shape[1], shape[2])
        for mode in MODES:
            yield _case(mode, "NCHW", first, _FIRST[mode])
            yield _case(mode, "channels_last", first, 1.02)
    for shape in ROWS:
        for mode in MODES:
            yield _case(mode, "NC", shape, 1.05 if shape == (8, 64) else 1.02)


def _case(mode: Mode, layout: str, shape: Shape, bar: float | None) -> Case:
    peer = "torch.nn.BatchNorm2d" if len(shape) == 4 else "torch.nn.BatchNorm1d"
    return Case("torch", peer, mode, "float32", layout, shape, bar, partial(_pair, mode, layout, shape))


def _pair(mode: Mode, layout: str, shape: Shape) -> Pair:
    import torch

    import bnlayer_torch

    here, there = data(shape)
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = (torch.from_numpy(a).contiguous(memory_format=format) for a in (here, there))
    if mode == "grad":
        x.requires_grad_()
    kind = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    layers = [getattr(package, kind)(shape[1]) for package in (bnlayer_torch, torch.nn)]
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    values = parameters(shape[1])
    for layer in layers:
        layer.load_state_dict(
            {**{name: torch.from_numpy(values[role]) for name, role in names.items()},
             "num_batches_tracked": torch.tensor(1)}
        )  # fmt: skip
        layer.train(mode != "eval")

    def run(layer: Any) -> tuple[Any, ...]:
        if mode == "grad":
            x.grad = None
            layer.zero_grad()
            y = layer(x)
            y.backward(dy)
            return y, x.grad
        with torch.no_grad():
            return (layer(x),)

    def results() -> Any:
        return tuple(tuple(part.detach().numpy().copy() for part in run(layer)) for layer in layers)

    return Pair(partial(run, layers[0]), partial(run, layers[1]), results)
