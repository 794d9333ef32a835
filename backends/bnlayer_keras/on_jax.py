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

from .runtime import Forward

__all__ = ["batch_norm", "counter_among_variables", "counter_dtype", "device", "plain", "precision", "step"]


def plain(layer: Any, x: Any, training: bool) -> Any | None:
    """See `runtime.Runtime`: a compiled step has no use for it."""
    return None


def counter_dtype() -> str:
    """See `runtime.Runtime`."""
    return str(jax.dtypes.canonicalize_dtype(np.int64))


def counter_among_variables() -> bool:
    """See `runtime.Runtime`: compiled training carries these and no others."""
    return True


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


def step(
    layer: Any, home: Any, request: Request, forward: Forward
) -> tuple[tuple[CallOutcome, ...], NDArray | None, NDArray | None]:
    """See `runtime.Runtime`. Differentiates the layer's stateless form, as Keras's own training does."""
    variables = layer.variables
    (device,) = home.value.devices()
    for call in request.calls:
        _check(call.weights)
    learned = {n: getattr(layer, n) for n in ("gamma", "beta") if getattr(layer, n) is not None}
    asked = [i for i, call in enumerate(request.calls) if call.dy is not None]
    curved = [i for i, call in enumerate(request.calls) if call.direction is not None]

    @jax.jit
    def run(sources: Any, masks: dict[int, Any], values: list[Any], dys: list[Any], along: list[Any]) -> Any:
        def ahead(sources: Any) -> tuple[list[Any], Any]:
            mapping = [*zip(variables, values, strict=True), *((learned[n], p) for n, p in sources["p"].items())]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                ys = [
                    forward(x, sources["w"].get(i, masks.get(i)), request.calls[i].adjustment)
                    for i, x in enumerate(sources["x"])
                ]
                return [ys[i] for i in asked], (ys, [scope.get_current_value(v) for v in variables])

        def slopes(xs: list[Any]) -> tuple[list[Any], Any]:
            _, back, (ys, after) = jax.vjp(ahead, {**sources, "x": xs}, has_aux=True)
            (got,) = back(dys)
            return [got["x"][i] for i in curved], (ys, after, got)

        if not curved:
            return (*slopes(sources["x"])[1], None)
        _, back, seen = jax.vjp(slopes, sources["x"], has_aux=True)
        return (*seen, back(along)[0])

    with jax.default_device(device):
        weights = {i: jnp.asarray(call.weights) for i, call in enumerate(request.calls) if call.weights is not None}
        real = {i: w for i, w in weights.items() if jnp.issubdtype(w.dtype, jnp.floating)}
        masks = {i: w for i, w in weights.items() if i not in real}
        sources = {
            "x": [jnp.asarray(call.x) for call in request.calls],
            "w": real,
            "p": {n: v.value for n, v in learned.items()},
        }
        ys, after, got, hvps = run(
            sources,
            masks,
            [v.value for v in variables],
            [jnp.asarray(request.calls[i].dy) for i in asked],
            [jnp.asarray(request.calls[i].direction) for i in curved],
        )
        for variable, value in zip(variables, after, strict=True):
            variable.assign(value)
    calls = [
        CallOutcome(
            np.asarray(y),
            dx=np.asarray(got["x"][i]) if i in asked else None,
            dweights=np.asarray(got["w"][i]) if i in asked and i in real else None,
            hvp=np.asarray(hvps[i]) if i in curved else None,
        )
        for i, y in enumerate(ys)
    ]
    parameters = {n: np.asarray(gradient) for n, gradient in got["p"].items()} if asked else {}
    return tuple(calls), parameters.get("gamma"), parameters.get("beta")


def _check(weights: NDArray | None) -> None:
    """What the function cannot look at under the trace of a derivative."""
    if weights is not None and not bool(np.all((weights >= 0) & (weights < np.inf))):
        raise InputError("weights must be finite and not negative; mask what has none with 0.")
