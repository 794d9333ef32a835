"""The `jax` backend: the contract of `bnlayer.contract.Backend` over this package's layer.

Importing this module imports no JAX, and using it changes no setting of JAX: x64 and the device hold for the call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bnlayer.call import plan_call, trains
from bnlayer.contract import Call, CallOutcome, NDArray, Outcome, Request, require
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.shards import cut, join
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .support import MISSING

if TYPE_CHECKING:
    import jax

    from .layer import BatchNorm
    from .step import StepGradients, StepInput


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

        read_clips(layer.spec, request.renorm_clips)  # checked here: the compiled step cannot look at them
        dtypes = [a.dtype for c in request.calls for a in (c.x, c.dy, c.weights) if a is not None]
        with ExitStack() as stack:
            stack.enter_context(x64_where_asked(layer.spec, *dtypes))
            stack.enter_context(jax.default_device(_device_of(layer)))
            frozen = layer.replace(frozen_statistics=request.frozen_statistics)
            after, outcome = _alone(frozen, request) if request.shards is None else _together(frozen, request)
            return after.replace(axis_name=layer.axis_name), outcome


def _alone(layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
    """The layer and the outcome after a step on one replica."""
    from .step import run_step

    ys, after, gradients = run_step(
        layer.replace(axis_name=None),
        [_step_input(call) for call in request.calls],
        _clips(request),
        _device_of(layer).platform,
        training=request.training,
        update_stats=request.update_stats,
    )
    return after, _outcome(request, ys, after, gradients)


def _together(layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
    """The same on several replicas: on a device each where there are as many, else on one.

    JAX runs one program on arrays of one shape, so every replica is padded to the rows of the longest.
    """
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from .step import AXIS, run_replicas

    parts, shards, spec, device = cut(request), request.shards, layer.spec, _device_of(layer)
    assert shards is not None
    training = trains(spec, request.training, request.frozen_statistics)
    inputs = []
    for index, whole in enumerate(request.calls):
        if spec.synchronized:
            # The padding counts as rows in the compiled step, so here one value per channel of all is refused.
            plan_call(spec.replace(synchronized=False), whole.x.shape, whole.x.dtype.name, training=training)
        own = [_step_input(_filled(part.calls[index], whole, max(shards))) for part in parts]
        if len(set(shards)) > 1:
            there = [np.arange(max(shards)) < rows for rows in shards]
            own = [call._replace(present=present) for call, present in zip(own, there, strict=True)]
        inputs.append(jax.tree.map(lambda *arrays: np.stack(arrays), *own))
    devices = jax.devices(device.platform)
    mesh = Mesh(np.array(devices[: len(shards)]), (AXIS,)) if len(devices) >= len(shards) else None
    state = jax.tree.map(lambda array: np.stack([array] * len(shards)), jax.device_get(layer.state))
    layers = layer.replace(state=state, axis_name=AXIS if spec.synchronized else None)
    placement = device if mesh is None else NamedSharding(mesh, PartitionSpec(AXIS))  # type: ignore[no-untyped-call]
    layers, inputs = jax.device_put((layers, inputs), placement)
    results = run_replicas(
        layers,
        inputs,
        _clips(request),
        device.platform,
        mesh=mesh,
        training=request.training,
        update_stats=request.update_stats,
    )
    gathered = jax.device_get(results)
    each = [jax.tree.map(partial(_member, rank=rank), gathered) for rank in range(len(shards))]
    outcomes = [_outcome(part, *result) for part, result in zip(parts, each, strict=True)]
    after: BatchNorm = jax.device_put(each[0][1], device if layer.state.num_updates.committed else None)
    return after, join(request, outcomes)


def _member(array: NDArray, rank: int) -> NDArray:
    return np.asarray(array[rank])


def _outcome(request: Request, ys: Sequence[Any], after: BatchNorm, gradients: StepGradients) -> Outcome:
    """The outcome on one replica, in numpy; of its request's shapes, without the rows that filled it up."""
    from .state import to_numpy

    back = iter(zip(gradients.calls, gradients.second, strict=True))
    calls = []
    for call, y in zip(request.calls, ys, strict=True):
        (dx, dweights), hvp = ((None, None), None) if call.dy is None else next(back)
        calls.append(
            CallOutcome(
                np.asarray(y)[: len(call.x)],
                dx=_rows(dx, call.x),
                dweights=_rows(dweights, call.weights),
                hvp=_rows(hvp, call.x),
            )
        )
    # Without a gradient that comes back, zeros would say more than was asked.
    parameters = gradients.parameters if gradients.calls else {}
    return Outcome(
        tuple(calls),
        state=to_numpy(after.state),
        dgamma=_numpy(parameters.get("gamma")),
        dbeta=_numpy(parameters.get("beta")),
    )


def _clips(request: Request) -> dict[str, float | None] | None:
    return None if request.renorm_clips is None else dict(request.renorm_clips)


def _step_input(call: Call) -> StepInput:
    """One call's arrays, its weights' values checked here: the compiled step cannot look at them."""
    from .step import StepInput
    from .weights import check_values, unwrapping

    for name, array in (("dy", call.dy), ("direction", call.direction)):
        if array is not None and array.shape != call.x.shape:
            raise InputError(f"{name} must have y's shape {call.x.shape}; got {array.shape}.")
    if call.weights is not None:
        check_values(call.weights)
    real = call.weights is not None and call.weights.dtype.kind not in "biu"
    return StepInput(
        x=call.x,
        weights=call.weights if real else None,
        mask=None if real else unwrapping(call.weights),
        dy=None if call.dy is None else call.dy.astype(call.x.dtype),
        adjustment=call.adjustment,
        direction=None if call.direction is None else call.direction.astype(call.x.dtype),
        present=None,
    )


def _filled(part: Call, whole: Call, rows: int) -> Call:
    """One replica's part of a call, padded to the rows of the longest; what has one row for all rows stays."""
    from .replicas import padded

    def filled(array: Any, like: Any) -> Any:
        return array if like is None or like.shape[:1] != whole.x.shape[:1] else padded(array, rows)[0]

    adjustment = part.adjustment
    if adjustment is not None and whole.adjustment is not None:
        scale, bias = (
            filled(own, like) if like.ndim == whole.x.ndim else own
            for own, like in zip(adjustment, whole.adjustment, strict=True)
        )
        adjustment = scale, bias
    return Call(
        filled(part.x, whole.x),
        dy=filled(part.dy, whole.dy),
        weights=filled(part.weights, whole.weights),
        adjustment=adjustment,
        direction=filled(part.direction, whole.direction),
    )


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


def _rows(array: jax.Array | None, like: NDArray | None) -> NDArray | None:
    """As many rows as `like` has."""
    return None if array is None or like is None else np.asarray(array)[: len(like)]


BACKEND = JaxBackend()
