"""Between numpy and torch: arrays, a module's state, and one step of a module. Imports torch; `backend` does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from bnlayer.contract import Call, CallOutcome, NDArray, Outcome, Request
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .tensors import tensors_of

# x, weights and adjustment of one call to y.
Forward = Callable[[Tensor, Tensor | None, tuple[Tensor, Tensor] | None], Tensor]


class HasTensors(Protocol):
    """What torch's batch norms and ours have in common."""

    weight: Any
    bias: Any
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


def to_tensor(array: NDArray, device: torch.device | None = None) -> Tensor:
    """The array as a tensor with the same strides, sharing its memory where it can.

    Raises:
        InputError: torch has no such dtype.
    """
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy(order="K")  # torch has no read-only memory and no negative strides
    bits = array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array
    try:
        tensor = torch.from_numpy(bits)
    except TypeError as error:
        raise InputError(f"torch has no dtype {array.dtype.name}; convert the array first ({error}).") from error
    if bits is not array:
        tensor = tensor.view(torch.bfloat16)
    if device is None or device == tensor.device:
        return tensor
    moved = tensor.to(device)
    if moved.stride() == tensor.stride() or 0 in tensor.stride():
        return moved
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def to_array(tensor: Tensor) -> NDArray:
    """A numpy copy of the tensor."""
    local = tensor.detach().cpu()
    if local.dtype == torch.bfloat16:
        return np.array(local.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.array(local.numpy())


def read_state(module: HasTensors, spec: BatchNormSpec) -> BatchNormState[NDArray]:
    """A numpy copy of the module's state."""
    counter = module.num_batches_tracked if spec.track_moving_stats else None
    found = tensors_of(module, spec)
    return BatchNormState(
        **{name: to_array(tensor) for name, tensor in found.items() if tensor is not None},
        num_updates=0 if counter is None else int(counter),
    )


@torch.no_grad()
def write_state(module: HasTensors, state: BatchNormState[NDArray], spec: BatchNormSpec) -> None:
    """Copy a state into the module's own tensors.

    Raises:
        StateError: the state does not fit the spec.
    """
    state = state.checked(spec)
    for name, tensor in tensors_of(module, spec).items():
        if tensor is not None:
            tensor.copy_(to_tensor(getattr(state, name)))
    if spec.track_moving_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.fill_(state.num_updates)


def run_step(
    module: HasTensors,
    spec: BatchNormSpec,
    request: Request,
    forward: Forward,
) -> Outcome:
    """Every call of the request forward in order, then one backward pass through all of them."""
    tensors = [t for t in (module.weight, module.bias, module.running_mean) if t is not None]
    device = tensors[0].device if tensors else None
    passes = [_Pass(call, forward, device) for call in request.calls]
    asked = [one for one in passes if one.dy is not None]
    leaves = [leaf for one in asked for leaf in one.leaves]
    parameters = [p for p in (module.weight, module.bias) if p is not None and p.requires_grad] if asked else []
    wanted = [*leaves, *parameters]
    directed = [one for one in asked if one.direction is not None]
    gradients: dict[int, Tensor] = {}
    if wanted:
        got = torch.autograd.grad(
            [one.y for one in asked],
            wanted,
            [one.dy for one in asked],
            create_graph=bool(directed),
            allow_unused=True,
            materialize_grads=True,
        )
        gradients = {id(leaf): gradient for leaf, gradient in zip(wanted, got, strict=True)}
    second = _second_order(directed, [gradients[id(one.x)] for one in directed])
    found = {leaf: to_array(gradient) for leaf, gradient in gradients.items()}
    return Outcome(
        tuple(
            CallOutcome(
                to_array(one.y),
                dx=found.get(id(one.x)),
                dweights=found.get(id(one.weights)),
                hvp=second.get(id(one)),
            )
            for one in passes
        ),
        state=read_state(module, spec),
        dgamma=found.get(id(module.weight)),
        dbeta=found.get(id(module.bias)),
    )


def _second_order(passes: Sequence[_Pass], dxs: Sequence[Tensor]) -> dict[int, NDArray]:
    """The gradient of sum(dx * direction) with respect to each x, by the pass's id."""
    directions = [one.direction for one in passes]
    alive = [(dx, direction) for dx, direction in zip(dxs, directions, strict=True) if dx.requires_grad]
    if not alive:  # dx does not depend on x: y is linear in it, as in eval
        return {id(one): to_array(torch.zeros_like(one.x)) for one in passes}
    got = torch.autograd.grad(
        [dx for dx, _ in alive],
        [one.x for one in passes],
        [direction for _, direction in alive],
        allow_unused=True,
        materialize_grads=True,
    )
    return {id(one): to_array(hvp) for one, hvp in zip(passes, got, strict=True)}


class _Pass:
    """One call forward: its tensors, and the leaves that get a gradient."""

    def __init__(self, call: Call, forward: Forward, device: torch.device | None) -> None:
        self.direction = None if call.direction is None else to_tensor(call.direction, device)
        self.dy = None if call.dy is None else to_tensor(call.dy, device)
        self.x = to_tensor(call.x, device)
        self.weights = None if call.weights is None else to_tensor(call.weights, device)
        self.leaves = []
        for tensor in (self.x, self.weights):
            if self.dy is not None and tensor is not None and tensor.dtype.is_floating_point:
                self.leaves.append(tensor.requires_grad_())
        adjustment = call.adjustment
        self.y = forward(
            self.x,
            self.weights,
            None if adjustment is None else (to_tensor(adjustment[0], device), to_tensor(adjustment[1], device)),
        )
