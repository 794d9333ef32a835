"""Keras on JAX."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from bnlayer.contract import CallOutcome, NDArray, Request
from bnlayer.errors import InputError, UnsupportedError
from bnlayer_jax import batch_norm

__all__ = ["batch_norm", "counter_dtype", "device", "precision", "step"]


def counter_dtype() -> str:
    """See `runtime.Runtime`."""
    return "int64" if jax.config.jax_enable_x64 else "int32"


def precision(dtypes: set[str]) -> AbstractContextManager[Any]:
    """See `runtime.Runtime`. JAX has float64 under x64 only."""
    return jax.enable_x64(True) if "float64" in dtypes else nullcontext()


def device(name: str) -> str:
    """See `runtime.Runtime`."""
    platform, _, number = name.lower().partition(":")
    try:
        jax.devices(platform)[int(number or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        here = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise UnsupportedError(f"Keras on JAX has no device {name!r}; it has {here}.") from error
    return f"{platform}:{number or 0}"


def step(layer: Any, request: Request) -> tuple[tuple[CallOutcome, ...], NDArray | None, NDArray | None]:
    """See `runtime.Runtime`. Differentiates the layer's stateless form, as Keras's own training does."""
    (home,) = layer.num_updates.value.devices()
    variables = {n: getattr(layer, n) for n in ("gamma", "beta") if getattr(layer, n) is not None}
    moving = [v for v in layer.variables if all(v is not p for p in variables.values())]
    for call in request.calls:
        _check(call.weights)
    with jax.default_device(home):
        xs = [jnp.asarray(call.x) for call in request.calls]
        ws = [None if call.weights is None else jnp.asarray(call.weights) for call in request.calls]
        real = {i: w for i, w in enumerate(ws) if w is not None and jnp.issubdtype(w.dtype, jnp.floating)}

        def forward(parameters: dict[str, Any], xs: list[Any], real: dict[int, Any]) -> tuple[list[Any], list[Any]]:
            with keras.StatelessScope(state_mapping=[(variables[n], p) for n, p in parameters.items()]) as scope:
                ys = [
                    layer(x, training=request.training, weights=real.get(i, w), update_stats=request.update_stats)
                    for i, (x, w) in enumerate(zip(xs, ws, strict=True))
                ]
                return ys, [scope.get_current_value(v) for v in moving]

        parameters = {n: v.value for n, v in variables.items()}
        ys, back, after = jax.vjp(forward, parameters, xs, real, has_aux=True)
        for variable, value in zip(moving, after, strict=True):
            if value is not None:
                variable.assign(value)
        dp: dict[str, Any] = {}
        dxs: dict[int, Any] = {}
        dws: dict[int, Any] = {}
        asked = [i for i, call in enumerate(request.calls) if call.dy is not None]
        if asked:
            dys = [
                jnp.zeros_like(y) if call.dy is None else jnp.asarray(call.dy)
                for y, call in zip(ys, request.calls, strict=True)
            ]
            dp, dx_of_each, dws = back(dys)
            dxs = {i: dx_of_each[i] for i in asked}
            dws = {i: dw for i, dw in dws.items() if i in asked}
    calls = [CallOutcome(np.asarray(y), dx=_numpy(dxs.get(i)), dweights=_numpy(dws.get(i))) for i, y in enumerate(ys)]
    return tuple(calls), _numpy(dp.get("gamma")), _numpy(dp.get("beta"))


def _check(weights: NDArray | None) -> None:
    """What the function cannot look at under the trace of a derivative."""
    if weights is not None and not bool(np.all((weights >= 0) & (weights < np.inf))):
        raise InputError("weights must be finite and not negative; mask what has none with 0.")


def _numpy(array: Any) -> NDArray | None:
    return None if array is None else np.asarray(array)
