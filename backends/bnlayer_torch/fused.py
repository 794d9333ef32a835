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
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .applied import by_known
from .dtypes import HALVES
from .orders import Order, order_of
from .paths import PATHS, can_look
from .sums import measured

# A sum that adds one element after the other is off by count/4 roundings at the worst, on a channel of one or two
# values (measured; count/9 on the average). The CPU's kernel gives each thread as many elements. So sums stay within
# what any sum of so many elements may lose, 8 + sqrt(count) roundings, up to
#   _SHORT (8 + sqrt(count))
# elements a thread.
_SHORT: Final = 4.0
_ALWAYS_SHORT: Final = 16
# Up to this ratio of m^2 and v what the kernel finds counts; a constant channel, where its sums drift, has a larger. In
# a channel of very few different values they may drift too, mean and variance by count/4 roundings at the worst. That
# is torch.nn's own accuracy; sums that do not (`bnlayer_torch.sums`) take 1.3 to 1.8 times as long as the whole kernel.
RATIO_CHECKED: Final = 16.0
# From this many elements on our own sums by rows are faster than the kernel.
_MANY_ROWS: Final = 1 << 15
# Below it a variance could matter whose squares vanish in float32.
LEAST_EPSILON: Final = 1e-12

_functorch: Final[Any] = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

Batch = tuple[Tensor, Tensor]  # mean and biased variance, (C,) each, without gradient


@dataclass(frozen=True)
class Way:
    """How a batch's own statistics are to normalize it.

    Attributes:
        path: one of `PATHS`.
        order: of x, where the path needs it.
        centered: whether the kernel gets x minus its mean.
    """

    path: str
    order: Order | None = None
    centered: bool = False


NATIVE: Final = Way("native")
CENTERED: Final = Way("native", centered=True)
CHECKED: Final = Way("checked")


def way_of(x: Tensor, axis: int, count: int, epsilon: float, *, plain: bool) -> Way:
    """The path of a call that torch's kernel can compute; `plain`: around which is nothing, or a recomputation."""
    drifts = sums_drift(x, axis, count)
    alone = CENTERED if drifts else NATIVE
    if not plain or not (drifts or PATHS.watched or (x.dim() > 2 and x.numel() >= _MANY_ROWS)):
        return alone
    if x.dtype in HALVES or epsilon < LEAST_EPSILON or count <= 1 or not can_look(x):
        return alone
    if drifts and x.dtype is torch.float32 and not PATHS.watched:
        return CHECKED
    order = order_of(x, axis)
    if order is None:
        able: tuple[str, ...] = ("native", "checked")
        fastest = "checked" if drifts else "native"
    elif order.innermost:
        able = ("native", "checked", "columns")
        fastest = "native" if not drifts else "checked" if x.dtype == torch.float32 else "columns"
    else:
        able = ("native", "rows")
        fastest = "rows" if drifts or x.numel() >= _MANY_ROWS else "native"
    path = PATHS.chosen(fastest, able)
    return alone if path == "native" else CHECKED if path == "checked" else Way(path, order)


def weighted_order(x: Tensor, weights: Tensor, axis: int, count: int, epsilon: float) -> Order | None:
    """x's order, where a batch with these weights can be computed on the path "weighted", and is to be.

    Around the call is nothing, or a recomputation.
    """
    differentiable = torch.is_grad_enabled() and weights.requires_grad
    if count <= 1 or epsilon < LEAST_EPSILON or differentiable or not (can_look(x) and can_look(weights)):
        return None
    order = order_of(x, axis)
    if order is None or PATHS.chosen("weighted", ("weighted", "composite")) != "weighted":
        return None
    return order


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
    gamma = paired(gamma, beta)
    if way.path == "checked":
        mean, unbiased = torch.zeros(2, x.shape[axis], dtype=x.dtype).unbind()
        passed = False

        def looked_at(x: Tensor) -> Tensor:
            nonlocal passed
            y, passed = checked(x, gamma, beta, mean, unbiased, 1.0, epsilon)
            return y

        y = _on_axis_1(looked_at, x, axis)
        if passed:
            return y, (mean, unbiased * ((count - 1) / count))
        way = unchecked(x, axis)
    if way.order is not None:
        batch = measured(x, way.order, count)
        if batch is not None:
            return by_known(x, gamma, beta, *batch, epsilon, way.order), batch
        way = CENTERED if sums_drift(x, axis, count) else NATIVE
    shift = None
    if way.centered:
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


def statistics(x: Tensor, axis: int, count: int, epsilon: float) -> tuple[Order, Batch] | None:
    """x's order and its batch's statistics, for `by_known`; None where only `from_batch` has them.

    Around the call is nothing, or a recomputation.

    Args:
        x: float32 or float64 with at least two elements a channel.
        axis: the channel axis.
        count: elements a channel.
        epsilon: what will be added to the variance.
    """
    order = order_of(x, axis) if epsilon >= LEAST_EPSILON and can_look(x) else None
    if order is None:
        return None
    way = way_of(x, axis, count, epsilon, plain=True)
    if way.path in ("rows", "columns"):
        batch = measured(x, order, count)
        return None if batch is None else (order, batch)
    if way.centered:
        return None
    mean, variance = torch.ops.aten.batch_norm_update_stats(order.merge(x.detach()), None, None, 0.0)
    if way.path == "native" or torch.square(mean).sub_(variance, alpha=RATIO_CHECKED).amax().item() <= 0:
        return order, (mean, variance)
    batch = measured(x, order, count)
    return None if batch is None else (order, batch)


def at_once(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    epsilon: float,
    count: int,
) -> tuple[Tensor, bool] | None:
    """`checked`, where that is the way of a float32 x on the CPU and nothing is around the call; else None.

    What `around`, `way_of` and those that they ask find of the commonest calls, in one function: the kernel's passes
    over x drive all code out of the processor's caches, and each function takes half a percent of a call of a
    millisecond.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.dtype is not torch.float32
        or not x.is_cpu
        or x.layout is not torch.strided
        or x.is_contiguous() != (x.dim() == 2)
        or epsilon < LEAST_EPSILON
        or count <= _ALWAYS_SHORT
        or count <= _longest(count)
        or torch._C._is_tracing()
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._current_graph_task_id() != -1
        or torch._C._len_torch_dispatch_stack() != 0
        or forward_ad._current_level >= 0
        or PATHS.wanted.get() is not None
    ):
        return None
    if torch.is_grad_enabled():
        # The kernel keeps what it is given for the backward pass, which in training makes no use of it. By another
        # handle on the same memory a later change of the statistics does not look like damage to it.
        running_mean, running_variance = running_mean.data, running_variance.data
    return checked(x, gamma, beta, running_mean, running_variance, momentum, epsilon)


def checked(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, bool]:
    """y by the kernel, which also moves the running mean and variance; and whether its statistics are good enough.

    If not, the two are as they were. The channel axis is 1, and x is not ambiguous.
    """
    before = torch.cat((running_mean, running_variance))
    y, mean, rstd = torch.native_batch_norm(x, gamma, beta, running_mean, running_variance, True, momentum, epsilon)
    # m^2 <= T v is (m^2 + T epsilon)/(v + epsilon) <= T, up to its roundings. Written so that what is not a number is
    # no pass, and with few operations: after the kernel's passes over x their code is out of the processor's caches.
    if torch.hypot(mean, _hidden(epsilon)).mul_(rstd).max().item() <= _MOST:
        return y, True
    old_mean, old_variance = before.chunk(2)
    running_mean.copy_(old_mean)
    running_variance.copy_(old_variance)
    return y, False


def unchecked(x: Tensor, axis: int) -> Way:
    """The way of what did not pass the check."""
    order = order_of(x, axis)
    return CENTERED if order is None else Way("columns", order)


_MOST: Final = RATIO_CHECKED**0.5 * (1.0 + 8 * torch.finfo(torch.float32).eps)


@lru_cache
def _hidden(epsilon: float) -> Tensor:
    # Of one axis, for a number without any would be converted first.
    return torch.tensor([(RATIO_CHECKED * epsilon) ** 0.5], dtype=torch.float32, device="cpu")


def from_moving(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    axis: int,
) -> Tensor:
    """y by given statistics; `mean`, `variance`, `gamma` and `beta` are of x's dtype, or float32."""
    gamma, dtype = paired(gamma, beta), x.dtype

    def kernel(x: Tensor) -> Tensor:
        return torch.batch_norm(x, gamma, beta, mean, variance, False, 0.0, epsilon, torch.backends.cudnn.enabled)

    return _on_axis_1(kernel, x.float() if loses_gradients(x) else x, axis).to(dtype)


def sums_drift(x: Tensor, axis: int, count: int) -> bool:
    """Whether the kernel would lose accuracy in its sums over x, unless x is centered first.

    On the CPU it adds up one element after the other in x's own precision, but for float32 with the positions
    innermost, which it adds in double. Half inputs have so few bits that their sums in float32 stay exact for longer.
    """
    dtype = x.dtype
    if not x.is_cpu or dtype in HALVES:
        return False
    # An export for any size must not ask for it, and what is compiled may run with fewer threads.
    if not isinstance(count, torch.SymInt) and (
        count <= _ALWAYS_SHORT or (not torch.compiler.is_compiling() and count <= _longest(count))
    ):
        return False
    in_double = dtype is torch.float32 and x.dim() > 2 and x.is_contiguous() and math.prod(x.shape[axis + 1 :]) > 1
    return not in_double


def _longest(count: int) -> float:
    return _SHORT * (8.0 + math.sqrt(count)) * torch.get_num_threads()


def is_ambiguous(x: Tensor) -> bool:
    """Whether the kernel may take x and the gradient of y for differently laid out than they are.

    With a length of 1 somewhere, rank 4 and 5 tensors can be contiguous and channels-last at once. The CPU's backward
    kernel then may read one of the two in the other's order, and dx is wrong.
    """
    return x.dim() > 3 and 1 in x.shape


def loses_gradients(x: Tensor) -> bool:
    """Whether the kernel would round on the way to the gradients of a half x: the CPU's sums dy in x's dtype."""
    return x.dtype in HALVES and x.device.type == "cpu" and torch.is_grad_enabled()


def paired(gamma: Tensor | None, beta: Tensor | None) -> Tensor | None:
    """gamma, or ones where there is a beta without one."""
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
