"""Batch statistics over all processes of a torch.distributed group, differentiable to every order.

Forward there is one collective: every replica sends one row of numbers (`_row`), gets the rows of all and merges them,
all in the same order and so to the same bits. Backward there is one all-reduce of two numbers a channel, and one more
in every further derivative. Gradients are those of the sum of all replicas' losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from bnlayer.call import CallPlan, RenormClips, refuse_single_value
from bnlayer.errors import BatchNormError, InputError, StateError
from bnlayer.spec import BatchNormSpec

from .dtypes import DTYPES
from .normalization import Channels, affine_of, by_statistics
from .statistics import Moments, entering, shifted_moments
from .weights import Weights

T = TypeVar("T")

# What a row begins with; shift, mean about the shift, and variance of each channel follow.
_COUNT, _LARGEST, _TOTAL, _SQUARES, _HEAD = range(5)
_REFUSED: Final = -1.0  # in place of the count


class GroupReference:
    """A process group as a module holds it: a copy of the module is in the same group, a pickle cannot be."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupReference:
        return self

    def __reduce__(self) -> NoReturn:
        raise StateError(
            "a process group exists in its own process only and cannot be pickled; set the layer's process_group to"
            " None before, and to a group of the new process afterwards, or save the state_dict."
        )


def group_of(spec: BatchNormSpec, training: bool, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group whose statistics this call takes; None where it takes this process's own, without any collective.

    Raises:
        InputError: there is no such group in this process.
    """
    if not spec.synchronized or not training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise InputError("process_group needs torch.distributed; call torch.distributed.init_process_group first.")
        return None
    group = dist.group.WORLD if process_group is None else process_group
    size = dist.get_world_size(group)
    if size < 1:
        raise InputError("process_group must be a group that this process is in; pass this process's own one.")
    return group if size > 1 else None


def in_agreement(group: dist.ProcessGroup, spec: BatchNormSpec, device: torch.device, read: Callable[[], T]) -> T:
    """What `read` returns; where it refuses the call, the other replicas, which wait for this one, hear of it.

    Raises:
        BatchNormError: what `read` raises; on the others `by_replicas` raises an InputError.
    """
    try:
        return read()
    except BatchNormError:
        row = torch.zeros(_HEAD + 3 * spec.num_features, dtype=torch.float64, device=device)
        row[_COUNT] = _REFUSED
        _gathered(row, group)
        raise


def by_replicas(
    x: Tensor,
    channels: Channels,
    spec: BatchNormSpec,
    plan: CallPlan,
    weights: Tensor | None,
    read: Weights | None,
    clips: RenormClips,
    adjustment: tuple[Tensor, Tensor] | None,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Moments] | None:
    """y by the statistics of all replicas together, and these; None where no replica has any weight.

    Args:
        x: this replica's part; it may have no rows.
        channels: the state's arrays, the same on all replicas.
        spec, plan, clips, adjustment: of this call.
        weights: of the plan's `weights_shape`, or None.
        read: the same, read; None also where x has no rows.
        group: the replicas, more than one.

    Raises:
        InputError: all replicas together have one value per channel and the spec refuses that, or one of them refused
            its part of the call. Raised on all of them.
    """
    wide = x.to(DTYPES[plan.arithmetic])  # once, so that a half x's gradients add up in float32
    with torch.no_grad():
        table = _gathered(_row(wide, plan, weights, read), group)
        # The one place where the host waits for the device: which replicas are empty decides what there is to compute.
        head = table[:, :_TOTAL].tolist()
    refused = [rank for rank, row in enumerate(head) if row[_COUNT] == _REFUSED]
    if refused:
        raise InputError(f"replica {refused[0]} of the process group refused its part of this call, so all do.")
    count = int(sum(row[_COUNT] for row in head))
    if count == 1:
        found = f"batch of all {len(head)} replicas; got x with shape {tuple(x.shape)} on this one"
        refuse_single_value(spec, count, found)
    if not any(row[_LARGEST] for row in head):
        return None
    batch = _merged(wide, plan, weights, read, table, group)
    affine = affine_of(channels, spec, plan, batch, clips, adjustment)
    y = by_statistics(wide, affine, batch.mean, batch.variance, spec.epsilon, plan, read)
    return y.to(x.dtype), batch


def _row(x: Tensor, plan: CallPlan, weights: Tensor | None, read: Weights | None) -> Tensor:
    """What the others have to know of this replica, in double precision.

    Shift and mean about it stay apart, so that no digit is lost before means are subtracted from each other. The sums
    of weights and squared weights are in units of the replica's largest.
    """
    features = plan.channel_shape[plan.axis]
    row = torch.zeros(_HEAD + 3 * features, dtype=torch.float64, device=x.device)
    if plan.count == 0:
        return row
    assert plan.count is not None
    row[:_HEAD] = torch.tensor([plan.count, 1, plan.count, plan.count], dtype=torch.float64)
    if weights is not None and read is not None:
        spread = plan.count // weights.numel()  # positions of x that one weight stands for
        relative = weights.to(row.dtype) / torch.where(read.largest == 0, 1.0, read.largest)
        squares = torch.square(relative).sum() * spread
        row[_LARGEST:_HEAD] = torch.stack([read.largest.squeeze(), read.total.squeeze(), squares])
    row[_HEAD:] = torch.cat(shifted_moments(x, plan, read))
    return row


def _gathered(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all replicas, by rank."""
    table = row.new_empty(dist.get_world_size(group), row.numel())
    dist.all_gather(list(table.unbind()), row, group=group)
    return table


def _merged(
    x: Tensor, plan: CallPlan, weights: Tensor | None, read: Weights | None, table: Tensor, group: dist.ProcessGroup
) -> Moments:
    """The moments of all replicas' elements, of their rows; right to every order of differentiation.

    With s a constant close to the mean, and sums over all replicas of S0 = w, S1 = w (x - s), S2 = w (x - s)^2:
    m = s + S1/S0 and v = S2/S0 - (S1/S0)^2, where the last term is next to nothing. The values of the sums come from
    the rows (Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance", 1983), their derivatives from x.
    """
    features = plan.channel_shape[plan.axis]
    _, largest, total, squares = table[:, :_HEAD].unbind(1)
    shifts, means, variances = torch.unflatten(table[:, _HEAD:], 1, (3, features)).unbind(1)
    unit = largest.amax()
    ratio = largest / unit
    share = (total * ratio).unsqueeze(1)
    s0 = share.sum()
    s = (share * shifts / s0 + share * means / s0).sum(0).to(x.dtype)
    offset = (shifts - s) + means
    known = torch.cat([s0.reshape(1), (share * offset).sum(0), (share * (variances + torch.square(offset))).sum(0)])
    # Another replica may have weights where this one has none, all of which then are 1.
    relative = unit.reciprocal() if weights is None else weights.to(known.dtype) / unit
    sums = _sums(x, relative, s, known, plan, read, group)
    moved, second = torch.unflatten(sums[1:] / sums[0], 0, (2, features)).unbind()
    variance = second - torch.square(moved)
    variance = variance - variance.detach().clamp(max=0.0)  # no rounding makes it negative; its gradient stays
    rest = 1.0 - (squares * torch.square(ratio)).sum() / torch.square(s0)
    single = rest <= 0  # in units of the largest a single weight is 1, so nothing is rounded here
    bessel = torch.where(single, 0.0, 1.0 / torch.where(single, 1.0, rest))
    unbiased = torch.where(single, 0.0, variance.detach() * bessel)  # not 0 times what may not be finite
    return Moments((s + moved).to(x.dtype), variance.to(x.dtype), unbiased.to(x.dtype))


class _Sums(Function):
    """S0, S1 and S2 of `_merged` in one vector: their known values, and their derivatives on every replica."""

    @staticmethod
    def forward(
        x: Tensor,
        relative: Tensor,
        s: Tensor,
        known: Tensor,
        plan: CallPlan,
        read: Weights | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        return known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, relative, s, _, ctx.plan, ctx.read, ctx.group = inputs
        ctx.save_for_backward(x, relative, s)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, relative, s = ctx.saved_tensors
        # Every replica's loss depends on the sums, and the loss is the sum of theirs.
        g = _all_reduce(gradients[0], ctx.group)
        g1, g2 = (part.reshape(ctx.plan.channel_shape) for part in g[1:].to(x.dtype).chunk(2))
        deviation = x - s.reshape(ctx.plan.channel_shape)
        if ctx.read is not None:
            deviation = torch.where(entering(deviation, ctx.read), deviation, 0.0)
        of_x = of_relative = None
        if ctx.needs_input_grad[0]:
            r = relative.to(x.dtype)
            of_x = r * g1 + 2.0 * r * g2 * deviation
        if ctx.needs_input_grad[1]:
            each = ((g1 + g2 * deviation) * deviation).sum(ctx.plan.axis, keepdim=True)
            of_relative = (g[0] + each).sum_to_size(relative.shape).to(relative.dtype)
        return of_x, of_relative, None, None, None, None, None


class _AllReduce(Function):
    """The sum over all replicas, on each of them; it is its own derivative."""

    @staticmethod
    def forward(values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _all_reduce(gradients[0], ctx.group), None


_sums: Final[Callable[..., Tensor]] = _Sums.apply
_all_reduce: Final[Callable[[Tensor, dist.ProcessGroup], Tensor]] = _AllReduce.apply
