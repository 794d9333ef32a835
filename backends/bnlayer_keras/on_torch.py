"""Keras on PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import torch

from bnlayer.contract import CallOutcome, NDArray, Request
from bnlayer.errors import UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, numpy_dtype
from bnlayer_torch import function

from .runtime import Forward

__all__ = ["batch_norm", "counter_among_variables", "counter_dtype", "device", "plain", "precision", "step"]


def batch_norm(x: Any, state: BatchNormState[Any], spec: BatchNormSpec, **keywords: Any) -> tuple[Any, Any]:
    """See `runtime.Runtime`.

    Keras assigns in place, and a backward pass that is still to come needs the statistics that its forward pass saw.
    """
    seen = state
    if spec.track_moving_stats and torch.is_grad_enabled():
        seen = state.replace(**{name: getattr(state, name).clone() for name in ("moving_mean", "moving_variance")})
    y, after = function.batch_norm(x, seen, spec, **keywords)
    return y, state if after is seen else after


def plain(layer: Any, x: Any, training: bool) -> Any | None:
    """See `runtime.Runtime`."""
    gamma, beta = (None if each is None else each.value for each in (layer.gamma, layer.beta))
    mean, variance = layer.moving_mean.value, layer.moving_variance.value
    if not training and torch.is_grad_enabled():  # see `batch_norm`
        mean, variance = mean.clone(), variance.clone()
    found = function.normalize(
        x, gamma, beta, mean, variance, axis=layer.axis, epsilon=layer.epsilon, training=training
    )  # fmt: skip
    if found is None:
        return None
    y, batch = found
    if batch is not None:
        count, decay = x.numel() // mean.shape[0], layer.momentum
        bessel = count / (count - 1) if layer.moving_variance_estimator == "unbiased" else 1.0
        with torch.no_grad():
            layer.moving_mean.assign((mean * decay).add_(batch[0], alpha=1.0 - decay))
            layer.moving_variance.assign((variance * decay).add_(batch[1], alpha=(1.0 - decay) * bessel))
            layer.num_updates.assign(layer.num_updates.value + 1)
    return y


def counter_dtype() -> str:
    """See `runtime.Runtime`."""
    return "int64"


def counter_among_variables() -> bool:
    """See `runtime.Runtime`: they become the keys of `state_dict`."""
    return False


def precision(dtypes: set[str]) -> AbstractContextManager[Any]:
    """See `runtime.Runtime`."""
    return nullcontext()


def device(name: str) -> str:
    """See `runtime.Runtime`."""
    wanted = name.lower().replace("gpu", "cuda")
    try:
        placed = torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise UnsupportedError(f"Keras on PyTorch has no device {name!r} ({error}).") from error
    # As torch itself says it: where the names differ, as "cpu:0" and "cpu" do, Keras loses its parameters in a copy.
    return str(placed.device)


def step(
    layer: Any, home: Any, request: Request, forward: Forward
) -> tuple[tuple[CallOutcome, ...], NDArray | None, NDArray | None]:
    """See `runtime.Runtime`."""
    device = home.value.device

    def tensor(array: NDArray) -> torch.Tensor:
        placed: torch.Tensor = keras.ops.convert_to_tensor(array).to(device)
        return placed

    xs = [tensor(call.x) for call in request.calls]
    ws = [None if call.weights is None else tensor(call.weights) for call in request.calls]
    real = {i: w for i, w in enumerate(ws) if w is not None and w.is_floating_point()}
    for leaf in (*xs, *real.values()):
        leaf.requires_grad_(leaf.is_floating_point())  # another x is refused by the layer, in its own words
    parameters = {n: getattr(layer, n).value for n in ("gamma", "beta") if getattr(layer, n) is not None}
    ys = [
        forward(x, w, None if call.adjustment is None else tuple(map(tensor, call.adjustment)))
        for call, x, w in zip(request.calls, xs, ws, strict=True)
    ]
    dys = {i: tensor(call.dy) for i, call in enumerate(request.calls) if call.dy is not None}
    sources: dict[tuple[str, Any], torch.Tensor] = {("x", i): xs[i] for i in dys}
    sources |= {("w", i): w for i, w in real.items() if i in dys}
    sources |= {("p", n): p for n, p in parameters.items() if p.requires_grad}
    along = {i: tensor(call.direction) for i, call in enumerate(request.calls) if call.direction is not None}
    got: dict[tuple[str, Any], NDArray] = {}
    hvps: dict[int, NDArray] = {}
    if dys:
        gradients = torch.autograd.grad(
            [ys[i] for i in dys],
            list(sources.values()),
            list(dys.values()),
            create_graph=bool(along),
            materialize_grads=True,
        )
        first = dict(zip(sources, gradients, strict=True))
        got = {key: _numpy(gradient) for key, gradient in first.items()}
        if along:
            # A gradient that depends on no x has no graph (in eval), and its derivative is zero.
            curved = [i for i in along if first["x", i].requires_grad]
            seconds = torch.autograd.grad(
                [first["x", i] for i in curved],
                [xs[i] for i in along],
                [along[i] for i in curved],
                materialize_grads=True,
            ) if curved else [torch.zeros_like(xs[i]) for i in along]  # fmt: skip
            hvps = {i: _numpy(second) for i, second in zip(along, seconds, strict=True)}
    calls = [
        CallOutcome(_numpy(y), dx=got.get(("x", i)), dweights=got.get(("w", i)), hvp=hvps.get(i))
        for i, y in enumerate(ys)
    ]
    return tuple(calls), got.get(("p", "gamma")), got.get(("p", "beta"))


def _numpy(tensor: torch.Tensor) -> NDArray:
    values: NDArray = np.asarray(keras.ops.convert_to_numpy(tensor.detach()))
    return values.astype(numpy_dtype(keras.backend.standardize_dtype(tensor.dtype)))  # it gives bfloat16 as float32
