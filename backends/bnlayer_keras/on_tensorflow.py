"""Keras on TensorFlow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from bnlayer.contract import CallOutcome, NDArray, Request
from bnlayer.errors import UnsupportedError
from bnlayer_tensorflow import batch_norm

__all__ = ["batch_norm", "counter_dtype", "device", "precision", "step"]


def counter_dtype() -> str:
    """See `runtime.Runtime`."""
    return "int64"


def precision(dtypes: set[str]) -> AbstractContextManager[Any]:
    """See `runtime.Runtime`."""
    return nullcontext()


def device(name: str) -> str:
    """See `runtime.Runtime`. TensorFlow itself would place variables elsewhere without a word."""
    present = [d.name.rpartition("device:")[2].lower() for d in tf.config.list_logical_devices()]
    wanted = name.lower() if ":" in name else f"{name.lower()}:0"
    if wanted not in present:
        raise UnsupportedError(f"Keras on TensorFlow has no device {name!r}; it has {', '.join(present)}.")
    return wanted


def step(layer: Any, request: Request) -> tuple[tuple[CallOutcome, ...], NDArray | None, NDArray | None]:
    """See `runtime.Runtime`."""
    with tf.device(layer.num_updates.value.device):
        xs = [tf.constant(call.x) for call in request.calls]
        ws = [None if call.weights is None else tf.constant(call.weights) for call in request.calls]
        parameters = {n: getattr(layer, n).value for n in ("gamma", "beta") if getattr(layer, n) is not None}
        real = {i: w for i, w in enumerate(ws) if w is not None and w.dtype.is_floating}
        with tf.GradientTape() as tape:
            # Watched by hand, for a layer that is not trainable has parameters that the tape does not see.
            tape.watch([[x for x in xs if x.dtype.is_floating], list(real.values()), list(parameters.values())])
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
        dys = {i: tf.constant(call.dy) for i, call in enumerate(request.calls) if call.dy is not None}
        sources = {"x": {i: xs[i] for i in dys}, "w": {i: w for i, w in real.items() if i in dys}, "p": parameters}
        got: Any = {"x": {}, "w": {}, "p": {}}
        if dys:
            got = tape.gradient(
                [ys[i] for i in dys],
                sources,
                output_gradients=list(dys.values()),
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
    calls = [
        CallOutcome(y.numpy(), dx=_numpy(got["x"].get(i)), dweights=_numpy(got["w"].get(i))) for i, y in enumerate(ys)
    ]
    return tuple(calls), _numpy(got["p"].get("gamma")), _numpy(got["p"].get("beta"))


def _numpy(tensor: Any) -> NDArray | None:
    return None if tensor is None else np.asarray(tensor.numpy())
