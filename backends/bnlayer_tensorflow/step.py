"""One step of a layer, numpy in and numpy out, on the device or the replica that runs it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from bnlayer.contract import Call, CallOutcome, NDArray, Outcome, Request
from bnlayer.state import BatchNormState

from .layer import BatchNorm


def run_step(layer: BatchNorm, request: Request) -> Outcome:
    """Every call forward, then one backward pass, and one more where a direction asks for the second order."""
    layer.frozen_statistics = request.frozen_statistics
    xs = [tf.constant(call.x) for call in request.calls]
    ws = [None if call.weights is None else tf.constant(call.weights) for call in request.calls]
    real = {i: w for i, w in enumerate(ws) if w is not None and w.dtype.is_floating}
    directions = {i: tf.constant(c.direction) for i, c in enumerate(request.calls) if c.direction is not None}
    with tf.GradientTape() if directions else nullcontext() as outer:
        if outer is not None:
            outer.watch(xs)
        with tf.GradientTape() as tape:
            tape.watch([[x for x in xs if x.dtype.is_floating], list(real.values())])
            ys = [
                layer(
                    x,
                    training=request.training,
                    weights=w,
                    update_stats=request.update_stats,
                    adjustment=call.adjustment,
                    renorm_clips=request.renorm_clips,
                )
                for call, x, w in zip(request.calls, xs, ws, strict=True)
            ]
        dxs, dws, parameters = _gradients(tape, layer, request.calls, xs, ys, real)
    hvps: dict[int, tf.Tensor] = {}
    if outer is not None:
        hvps = outer.gradient(
            [dxs[i] for i in directions],
            {i: xs[i] for i in directions},
            output_gradients=list(directions.values()),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
    calls = tuple(
        CallOutcome(y.numpy(), dx=_numpy(dxs.get(i)), dweights=_numpy(dws.get(i)), hvp=_numpy(hvps.get(i)))
        for i, y in enumerate(ys)
    )
    return Outcome(
        calls,
        state=read_state(layer),
        dgamma=_numpy(parameters.get("gamma")),
        dbeta=_numpy(parameters.get("beta")),
    )


def read_state(layer: BatchNorm) -> BatchNormState[NDArray]:
    """A copy of the layer's state; in a replica, of its own."""
    arrays = {name: np.array(tf.convert_to_tensor(variable)) for name, variable in layer.state.arrays().items()}
    return BatchNormState(**arrays, num_updates=int(tf.convert_to_tensor(layer.num_updates)))


def _gradients(
    tape: tf.GradientTape,
    layer: BatchNorm,
    calls: tuple[Call, ...],
    xs: list[tf.Tensor],
    ys: list[tf.Tensor],
    weights: dict[int, tf.Tensor],
) -> tuple[dict[int, tf.Tensor], dict[int, tf.Tensor], dict[str, tf.Tensor]]:
    """With respect to each x and each real weights whose call has a dy, and to the parameters."""
    asked = [i for i, call in enumerate(calls) if call.dy is not None]
    if not asked:
        return {}, {}, {}
    sources: dict[str, Any] = {
        "xs": {i: xs[i] for i in asked},
        "ws": {i: w for i, w in weights.items() if i in asked},
        "parameters": {n: getattr(layer, n) for n in ("gamma", "beta") if getattr(layer, n) is not None},
    }
    got = tape.gradient(
        [ys[i] for i in asked],
        sources,
        output_gradients=[tf.constant(calls[i].dy) for i in asked],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return got["xs"], got["ws"], got["parameters"]


def _numpy(tensor: Any) -> NDArray | None:
    return None if tensor is None else np.asarray(tensor.numpy())
