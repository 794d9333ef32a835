"""The `jax` backend: the contract of `bnlayer.contract.Backend` over this package's layer.

Importing this module imports no JAX, and using it changes no setting of JAX: x64 and the device hold for the call.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from bnlayer.contract import Call, CallOutcome, NDArray, Outcome, Request, require
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .support import MISSING

if TYPE_CHECKING:
    import jax

    from .layer import BatchNorm
    from .step import StepInput


class JaxBackend:
    """bnlayer's batch norm in JAX. Layers are immutable: `load` and `step` return another one."""

    name = "jax"

    def version(self) -> str:
        return str(require("jax", "jax").__version__)

    def owns(self, layer: Any) -> bool:
        # Whoever holds a layer has imported its module.
        module = sys.modules.get(f"{__package__}.layer")
        return module is not None and isinstance(layer, module.BatchNorm)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        return MISSING.reason(spec, request)

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> BatchNorm:
        MISSING.refuse(self.name, spec)
        jax = require("jax", "jax")
        from .layer import BatchNorm
        from .precision import x64_where_asked

        target = None if device is None else _device(device)
        with x64_where_asked(spec):
            layer = BatchNorm(spec, state)
            placed: BatchNorm = layer if target is None else jax.device_put(layer, target)
        return placed

    def extract(self, layer: BatchNorm) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        from .state import to_numpy

        return layer.spec, to_numpy(layer.state)

    def load(self, layer: BatchNorm, state: BatchNormState[NDArray]) -> BatchNorm:
        loaded = self.build(layer.spec, state, device=_device_of(layer))
        return loaded.replace(frozen_statistics=layer.frozen_statistics)

    def step(self, layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
        MISSING.refuse(self.name, layer.spec, request)
        import jax

        from .precision import x64_where_asked
        from .renorm import read_clips
        from .state import to_numpy
        from .step import run_step

        read_clips(layer.spec, request.renorm_clips)  # checked here: the compiled step cannot look at them
        dtypes = [a.dtype for c in request.calls for a in (c.x, c.dy, c.weights) if a is not None]
        with ExitStack() as stack:
            stack.enter_context(x64_where_asked(layer.spec, *dtypes))
            stack.enter_context(jax.default_device(_device_of(layer)))
            ys, after, gradients = run_step(
                layer.replace(frozen_statistics=request.frozen_statistics),
                [_step_input(call) for call in request.calls],
                None if request.renorm_clips is None else dict(request.renorm_clips),
                training=request.training,
                update_stats=request.update_stats,
            )
            back = iter(gradients.calls)
            calls = []
            for call, y in zip(request.calls, ys, strict=True):
                dx, dweights = (None, None) if call.dy is None else next(back)
                calls.append(CallOutcome(np.asarray(y), dx=_numpy(dx), dweights=_numpy(dweights)))
            # Without a gradient that comes back, zeros would say more than was asked.
            parameters = gradients.parameters if gradients.calls else {}
            return after, Outcome(
                tuple(calls),
                state=to_numpy(after.state),
                dgamma=_numpy(parameters.get("gamma")),
                dbeta=_numpy(parameters.get("beta")),
            )


def _step_input(call: Call) -> StepInput:
    """One call's arrays, its weights' values checked here: the compiled step cannot look at them."""
    from .step import StepInput
    from .weights import as_array, check_values

    if call.dy is not None and call.dy.shape != call.x.shape:
        raise InputError(f"dy must have y's shape {call.x.shape}; got {call.dy.shape}.")
    import jax.numpy as jnp

    weights = None
    real = False
    if call.weights is not None:
        check_values(call.weights)
        weights, real = as_array(call.weights), call.weights.dtype.kind not in "biu"
    x = jnp.asarray(call.x)
    return StepInput(
        x=x,
        weights=weights if real else None,
        mask=None if real else weights,
        dy=None if call.dy is None else jnp.asarray(call.dy, x.dtype),
        adjustment=None if call.adjustment is None else _pair(call.adjustment),
    )


def _pair(adjustment: tuple[NDArray, NDArray]) -> tuple[jax.Array, jax.Array]:
    import jax.numpy as jnp

    scale, bias = adjustment
    return jnp.asarray(scale), jnp.asarray(bias)


def _device(device: Any) -> Any:
    """The device of this name: a platform such as "cpu", "cuda" or "gpu", its number after a colon; or a jax.Device.

    Raises:
        UnsupportedError: there is no such device here.
    """
    import jax

    if isinstance(device, jax.Device):
        return device
    platform, _, number = str(device).partition(":")
    try:
        return jax.devices(platform)[int(number or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        here = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise UnsupportedError(f"backend 'jax' has no device {device!r}; it has {here} ({error}).") from error


def _device_of(layer: BatchNorm) -> Any:
    """Where the layer's arrays are; its counter is there in every spec."""
    (device,) = layer.state.num_updates.devices()
    return device


def _numpy(array: jax.Array | None) -> NDArray | None:
    return None if array is None else np.asarray(array)


BACKEND = JaxBackend()
