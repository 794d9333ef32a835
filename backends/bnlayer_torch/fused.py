"""torch's own batch norm kernels, where they compute the spec.

They normalize over axis 1, with gradients that are right to second order. In training they give the batch's mean and
unbiased variance through the moving statistics: from zeros, with a momentum of 1.

Four things that they do not do well enough are kept from them here (torch 2.13 on the CPU): long sums (`sums_drift`),
tensors of more than one memory layout (`is_ambiguous`), the gradients of half inputs (`loses_gradients`), and a beta
without a gamma, whose gradient they round to x's dtype. Nor are they fast where the channels are not innermost: there
our own sums take over (`bnlayer_torch.sums`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .applied import by_known
from .dtypes import HALVES
from .orders import Order, order_of
from .paths import PATHS, can_look
from .sums import measured

# From this many elements a channel on, the error of a sum that adds one element after the other is no longer small
# against the error of the rest: on a constant channel it grows like count/8 roundings.
_LONG_SUM: Final = 16
# Up to this many, and where the mean is within 4 standard deviations, count/8 roundings of the mean are still within
# the error that any sum of that many elements may have, (8 + sqrt(count)) (1 + |m|/sd).
_CHECKED: Final = 256
_RATIO_CHECKED: Final = 16.0
# From this many elements on our own sums by rows are faster than the kernel.
_MANY_ROWS: Final = 1 << 15
# Below it a variance could matter whose squares vanish in float32.
_LEAST_EPSILON: Final = 1e-12

Batch = tuple[Tensor, Tensor]  # mean and biased variance, (C,) each, without gradient


@dataclass(frozen=True)
class Way:
    """How a batch's own statistics are to normalize it: a path of `PATHS`, and the order of x that it needs."""

    path: str
    order: Order | None = None


NATIVE: Final = Way("native")


def way_of(x: Tensor, axis: int, count: int, epsilon: float) -> Way:
    """The path of a call that torch's kernel can compute, and around which is nothing, or a recomputation."""
    if x.dtype in HALVES or epsilon < _LEAST_EPSILON or count <= 1 or not can_look(x):
        return NATIVE
    order = order_of(x, axis)
    if order is None:
        return NATIVE
    if order.innermost:
        able: tuple[str, ...] = ("native", "checked", "columns")
        fastest = "native" if count <= _LONG_SUM else "checked" if count <= _CHECKED else "columns"
    else:
        able = ("native", "rows")
        many = x.numel() >= _MANY_ROWS or (x.dtype == torch.float64 and count > _LONG_SUM)
        fastest = "rows" if many else "native"
    path = PATHS.chosen(fastest, able)
    return NATIVE if path == "native" else Way(path, order)


def from_batch(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, epsilon: float, axis: int, count: int, way: Way
) -> tuple[Tensor, Batch]:
    """y by the batch's statistics, and these.

    Args:
        x: float tensor with at least two elements a channel.
        gamma, beta: of the arithmetic's dtype, or None.
        epsilon: above 0.
        axis: the channel axis.
        count: elements a channel.
        way: for this x.
    """
    gamma = _paired(gamma, beta)
    if way.path == "checked":
        assert way.order is not None
        mean = torch.zeros(way.order.merged[1], dtype=x.dtype)
        unbiased = torch.zeros_like(mean)
        found = checked(x, gamma, beta, (mean, unbiased), 1.0, epsilon, way.order)
        if found is not None:
            return found, (mean, unbiased * ((count - 1) / count))
    elif way.order is not None:
        batch = measured(x, way.order, count)
        if batch is not None:
            return by_known(x, gamma, beta, *batch, epsilon, way.order), batch
    shift = None
    if sums_drift(x, axis, count):
        shift = x.detach().mean([i for i in range(x.dim()) if i != axis], keepdim=True)
        x = x - shift
    # Zeros like a row of x, and not just zeros: under vmap they have to be as many as x.
    row = x.detach().movedim(axis, -1)[(0,) * (x.dim() - 1)]
    mean = torch.zeros_like(row, dtype=torch.promote_types(x.dtype, torch.float32))
    unbiased = torch.zeros_like(mean)

    def kernel(x: Tensor) -> Tensor:
        return torch.batch_norm(x, gamma, beta, mean, unbiased, True, 1.0, epsilon, torch.backends.cudnn.enabled)

    y = _on_axis_1(kernel, x, axis)
    return y, (mean if shift is None else mean + shift.reshape(-1), unbiased * ((count - 1) / count))


def checked(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running: tuple[Tensor, Tensor],
    momentum: float,
    epsilon: float,
    order: Order,
) -> Tensor | None:
    """y by the kernel, which also moves the running mean and variance; None where its statistics are not good enough.

    Then the two are as they were.
    """
    before = [tensor.clone() for tensor in running]
    y, mean, rstd = torch.native_batch_norm(order.merge(x), gamma, beta, *running, True, momentum, epsilon)
    # m^2 <= T v is (m^2 + T epsilon)/(v + epsilon) <= T, up to its roundings. Written so that what is not a number is
    # no pass.
    most = _RATIO_CHECKED * (1.0 + 16 * torch.finfo(x.dtype).eps)
    if mean.square().add_(_RATIO_CHECKED * epsilon).mul_(rstd).mul_(rstd).amax().item() <= most:
        return order.split(y, x.shape)
    for tensor, was in zip(running, before, strict=True):
        tensor.copy_(was)
    return None


def from_moving(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    plan: CallPlan,
) -> Tensor:
    """y by given statistics; `mean`, `variance`, `gamma` and `beta` are of the plan's arithmetic."""
    gamma, dtype = _paired(gamma, beta), x.dtype

    def kernel(x: Tensor) -> Tensor:
        return torch.batch_norm(x, gamma, beta, mean, variance, False, 0.0, epsilon, torch.backends.cudnn.enabled)

    return _on_axis_1(kernel, x.float() if loses_gradients(x) else x, plan.axis).to(dtype)


def sums_drift(x: Tensor, axis: int, count: int) -> bool:
    """Whether the kernel would lose accuracy in its sums over x, unless x is centered first.

    On the CPU it adds up one element after the other in x's own precision, but for float32 with the positions
    innermost, which it adds in double. Half inputs have so few bits that their sums in float32 stay exact for longer.
    """
    if x.device.type != "cpu" or x.dtype in HALVES:
        return False
    if not isinstance(count, torch.SymInt) and count <= _LONG_SUM:  # an export for any size must not ask for it
        return False
    in_double = x.dtype == torch.float32 and x.is_contiguous() and math.prod(x.shape[axis + 1 :]) > 1
    return not in_double


def is_ambiguous(x: Tensor) -> bool:
    """Whether the kernel may take x and the gradient of y for differently laid out than they are.

    With a length of 1 somewhere, rank 4 and 5 tensors can be contiguous and channels-last at once. The CPU's backward
    kernel then may read one of the two in the other's order, and dx is wrong.
    """
    return x.dim() > 3 and 1 in x.shape


def loses_gradients(x: Tensor) -> bool:
    """Whether the kernel would round on the way to the gradients of a half x: the CPU's sums dy in x's dtype."""
    return x.dtype in HALVES and x.device.type == "cpu" and torch.is_grad_enabled()


def _paired(gamma: Tensor | None, beta: Tensor | None) -> Tensor | None:
    return torch.ones_like(beta) if gamma is None and beta is not None else gamma


def _on_axis_1(kernel: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """The kernel on x with its channel axis moved to 1, without copying x."""
    if axis == 1 and not is_ambiguous(x):
        return kernel(x)
    features = x.shape[axis]
    if x.is_contiguous():
        # The axes on either side of the channels are one axis each; with none behind, the kernel for rank 2 is faster.
        before, behind = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
        merged = (before, features, behind) if behind > 1 else (before, features)
        return kernel(x.reshape(merged)).reshape(x.shape)
    outer = x.movedim(axis, 1)
    if outer.is_contiguous():
        return kernel(outer.flatten(2)).reshape(outer.shape).movedim(1, axis)
    inner = x.movedim(axis, -1)
    if inner.is_contiguous():
        return kernel(inner.reshape(-1, features)).reshape(inner.shape).movedim(-1, axis)
    return kernel(outer).movedim(1, axis)
