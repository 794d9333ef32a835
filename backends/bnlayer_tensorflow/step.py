"""One step in TensorFlow, numpy in and numpy out, on the device or the replica that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from bnlayer.contract import Call, CallOutcome, NDArray, Outcome, Request
from bnlayer.state import BatchNormState

from .layer import BatchNorm

Forward = Callable[[tf.Tensor, tf.Tensor | None, Call], tf.Tensor]


def run_layer(layer: BatchNorm, request: Request) -> Outcome:
    """The step of one of this package's layers."""
    layer.frozen_statistics = request.frozen_statistics

    def forward(x: tf.Tensor, weights: tf.Tensor | None, call: Call) -> tf.Tensor:
        return layer(
            x,
            training=request.training,
            weights=weights,
            update_stats=request.update_stats,
            adjustment=call.adjustment,
            renorm_clips=request.renorm_clips,
        )

    parameters = {name: getattr(layer, name) for name in ("gamma", "beta") if getattr(layer, name) is not None}
    calls, gradients = run_calls(request.calls, forward, parameters)
    return Outcome(calls, state=read_state(layer), dgamma=gradients.get("gamma"), dbeta=gradients.get("beta"))


def run_calls(
    calls: tuple[Call, ...], forward: Forward, parameters: Mapping[str, tf.Variable]
) -> tuple[tuple[CallOutcome, ...], dict[str, NDArray]]:
    """Every call forward, then one backward pass, and one more where a direction asks for the second order.

    Args:
        calls: of a request.
        forward: y of x, the weights and the call they are from.
        parameters: what to differentiate with respect to beside x and real weights.

    Returns:
        what each call gave, and the gradients of the parameters; none where no call has a dy.
    """
    xs = [tf.constant(call.x) for call in calls]
    ws = [None if call.weights is None else tf.constant(call.weights) for call in calls]
    real = {i: w for i, w in enumerate(ws) if w is not None and w.dtype.is_floating}
    directions = {i: call.direction for i, call in enumerate(calls) if call.direction is not None}
    with tf.GradientTape() if directions else nullcontext() as outer:
        if outer is not None:
            outer.watch(xs)
        with tf.GradientTape() as tape:
            tape.watch([[x for x in xs if x.dtype.is_floating], list(real.values())])
            ys = [forward(x, w, call) for call, x, w in zip(calls, xs, ws, strict=True)]
        asked = [i for i, call in enumerate(calls) if call.dy is not None]
        sources: dict[str, Any] = {
            "xs": {i: xs[i] for i in asked},
            "ws": {i: w for i, w in real.items() if i in asked},
            "parameters": dict(parameters) if asked else {},
        }
        dys: list[Any] = [calls[i].dy for i in asked]
        first = _gradients(tape, [ys[i] for i in asked], sources, dys)
    hvps: dict[int, tf.Tensor] = {}
    if outer is not None:
        dxs = [first["xs"][i] for i in directions]
        hvps = _gradients(outer, dxs, {i: xs[i] for i in directions}, list(directions.values()))
    outcomes = tuple(
        CallOutcome(
            y.numpy(), dx=_numpy(first["xs"].get(i)), dweights=_numpy(first["ws"].get(i)), hvp=_numpy(hvps.get(i))
        )
        for i, y in enumerate(ys)
    )
    return outcomes, {name: np.asarray(gradient) for name, gradient in first["parameters"].items()}


def read_state(layer: BatchNorm) -> BatchNormState[NDArray]:
    """A copy of the layer's state; in a replica, of its own."""
    arrays = {name: np.array(tf.convert_to_tensor(v).numpy()) for name, v in layer.state.arrays().items()}
    return BatchNormState(**arrays, num_updates=int(tf.convert_to_tensor(layer.num_updates)))


def _gradients(tape: Any, targets: list[tf.Tensor], sources: dict[Any, Any], along: list[Any]) -> Any:
    """Of the sum of the targets along these directions, in the structure of the sources; 0 where nothing depends."""
    along = [tf.constant(direction) for direction in along]
    zero = tf.UnconnectedGradients.ZERO
    return tape.gradient(targets, sources, output_gradients=along, unconnected_gradients=zero)


def _numpy(tensor: Any) -> NDArray | None:
    return None if tensor is None else np.asarray(tensor.numpy())
