"""Keras on TensorFlow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from bnlayer.contract import CallOutcome, NDArray, Request
from bnlayer.errors import UnsupportedError
from bnlayer_tensorflow import batch_norm

from .runtime import Forward

__all__ = ["batch_norm", "counter_among_variables", "counter_dtype", "device", "plain", "precision", "step"]


def plain(layer: Any, x: Any, training: bool) -> Any | None:
    """See `runtime.Runtime`: a compiled step has no use for it."""
    return None


def counter_dtype() -> str:
    """See `runtime.Runtime`."""
    return "int64"


def counter_among_variables() -> bool:
    """See `runtime.Runtime`: an exported model has to have it."""
    return True


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


def step(
    layer: Any, home: Any, request: Request, forward: Forward
) -> tuple[tuple[CallOutcome, ...], NDArray | None, NDArray | None]:
    """See `runtime.Runtime`."""
    with tf.device(home.value.device):
        xs = [tf.constant(call.x) for call in request.calls]
        ws = [None if call.weights is None else tf.constant(call.weights) for call in request.calls]
        dys = {i: tf.constant(call.dy) for i, call in enumerate(request.calls) if call.dy is not None}
        along = {i: tf.constant(call.direction) for i, call in enumerate(request.calls) if call.direction is not None}
        parameters = {n: getattr(layer, n).value for n in ("gamma", "beta") if getattr(layer, n) is not None}
        real = {i: w for i, w in enumerate(ws) if w is not None and w.dtype.is_floating}
        sources = {"x": {i: xs[i] for i in dys}, "w": {i: w for i, w in real.items() if i in dys}, "p": parameters}
        with tf.GradientTape() as second:
            second.watch([xs[i] for i in along])
            with tf.GradientTape() as tape:
                # Watched by hand, for a layer that is not trainable has parameters that the tape does not see.
                tape.watch([[x for x in xs if x.dtype.is_floating], list(real.values()), list(parameters.values())])
                ys = [
                    forward(x, w, call.adjustment) for call, x, w in zip(request.calls, xs, ws, strict=True)
                ]  # fmt: skip
            got: Any = {"x": {}, "w": {}, "p": {}}
            if dys:
                got = _gradient(tape, [ys[i] for i in dys], sources, list(dys.values()))
        hvps = _gradient(
            second, [got["x"][i] for i in along], {i: xs[i] for i in along}, list(along.values())
        ) if along else {}  # fmt: skip
    calls = [
        CallOutcome(
            y.numpy(),
            dx=_numpy(got["x"].get(i)),
            dweights=_numpy(got["w"].get(i)),
            hvp=_numpy(hvps.get(i)),
        )
        for i, y in enumerate(ys)
    ]
    return tuple(calls), _numpy(got["p"].get("gamma")), _numpy(got["p"].get("beta"))


def _gradient(tape: Any, of: Any, sources: Any, along: Any) -> Any:
    return tape.gradient(
        of, sources, output_gradients=along, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )  # fmt: skip


def _numpy(tensor: Any) -> NDArray | None:
    return None if tensor is None else np.asarray(tensor.numpy())
