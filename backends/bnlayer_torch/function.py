"""`batch_norm` for torch: a pure function, differentiable to second order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from bnlayer.call import CallPlan, RenormClips, plan_call, refuse_single_value
from bnlayer.call import renorm_clips as clips_of
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from . import fused
from .averages import updated
from .dtypes import DTYPES, dtype_name
from .ghosts import by_ghosts
from .normalization import Channels, by_batch, by_shares, by_statistics, plain_affine
from .orders import Order
from .surroundings import around
from .synchronized import by_replicas, group_of, in_agreement
from .weights import Shares, Weights, check_weights, read_shares, read_weights


def batch_norm(
    x: Tensor,
    state: BatchNormState[Tensor],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: Tensor | None = None,
    update_stats: bool = True,
    adjustment: tuple[Tensor, Tensor] | None = None,
    renorm_clips: Mapping[str, float | Tensor | None] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, BatchNormState[Tensor]]:
    """Normalize x and update the moving statistics.

    Args:
        x: float tensor of rank 2 or more, `spec.num_features` long on `spec.axis`.
        state: parameters and moving statistics as tensors on x's device, `num_updates` an int or an integer tensor;
            not modified. Gradients flow to gamma and beta, not to the statistics.
        spec: what the layer is.
        training: batch statistics if True, moving ones if False.
        weights: mask or weights of shape (N,), x's shape without the channel axis, or with 1 on it; at least 0.
            Gradients flow to floating-point ones.
        update_stats: False: batch statistics normalize, but the state is returned as it came.
        adjustment: in training, a scale and a bias of the normalized values before gamma and beta; each broadcastable
            to x. Gradients flow to both.
        renorm_clips: "r_max", "r_min" or "d_max" in place of the spec's for this call: a number, a tensor without
            dimensions, or None for no clip.
        process_group: of a synchronized spec, whose processes the replicas are; None for all, where torch.distributed
            is initialized. In training each of them has to make this call, also with no rows, and to take the same
            derivatives, since every one of these is a collective; in eval there is none. Gradients are those of the
            sum of all replicas' losses, and those of gamma and beta are this replica's part of it.

    Returns:
        y, of x's shape and dtype, and the state after: new tensors without gradient where they moved. With weights
        `num_updates` comes back as a tensor, for whether they hold any is not known before they are read.

    Raises:
        InputError: x, the weights, the adjustment or the clips do not fit the spec, on this or on another replica, or
            this process is not in the process group.
    """
    group = group_of(spec, training, process_group)
    read = partial(_read, x, spec, training, update_stats, weights, adjustment, renorm_clips)
    call = read() if group is None else in_agreement(group, spec, x.device, read)
    plan, w = call.plan, call.read
    if group is None and plan.synchronized and plan.count == 1:
        refuse_single_value(spec, 1, f"batch of the only replica; got x with shape {tuple(x.shape)}")
    channels = Channels(state, DTYPES[plan.arithmetic], x.device, spec.num_features)
    if group is not None:
        found = by_replicas(x, channels, spec, plan, call.weights, w, call.clips, call.adjustment, group)
        if found is None:
            return _by_moving(x, channels, spec, plan, w), state
        y, batch = found
        return y, updated(state, batch, spec) if plan.update else state
    if plan.ghosted:
        y, batch, entered = by_ghosts(x, channels, spec, plan, call.weights, call.clips)
        return y, updated(state, batch, spec, entered) if plan.update else state
    if not plan.batch_statistics or plan.count == 0:
        return _by_moving(x, channels, spec, plan, w), state
    if call.shares is not None:
        found = by_shares(x, channels, spec, plan, call.shares, call.clips)
        if found is not None:
            y, batch = found
            after = updated(state, batch, spec) if plan.update else state
            if isinstance(after.num_updates, int) and plan.update:
                after = after.replace(num_updates=torch.tensor(after.num_updates, device=x.device))
            return y, after
        assert call.weights is not None
        w = read_weights(call.weights, plan)
    y, batch = by_batch(x, channels, spec, plan, w, call.clips, call.adjustment)
    return y, updated(state, batch, spec, None if w is None else w.present.any()) if plan.update else state


@dataclass(frozen=True, eq=False)
class _Call:
    """One call's arguments, found to fit the spec.

    Attributes:
        plan, clips: as decided by the core.
        weights: of the plan's `weights_shape`, or None.
        read: the same, checked and related to their total; None also where x is empty, each ghost batch has its own, or
            there are shares.
        shares: the same where few numbers do.
        adjustment: of the plan's arithmetic; None where it does not hold.
    """

    plan: CallPlan
    clips: RenormClips
    weights: Tensor | None
    read: Weights | None
    shares: Shares | None
    adjustment: tuple[Tensor, Tensor] | None


def normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    *,
    axis: int,
    epsilon: float,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
    """y of a plain call of a layer that keeps its own averages: to find and make a spec and two states takes longer
    than the sums of a small batch.

    Args:
        x: any tensor.
        gamma, beta, mean, variance: (C,) each; the last two normalize unless `training`. They must not be changed in
            place before the backward pass where gradients are wanted.
        axis: of the channels, may be negative.
        epsilon: above 0 and finite.
        training: whether the batch's own statistics normalize.

    Returns:
        y, of x's shape and dtype, and in training the batch's mean and biased variance, (C,) each and without gradient;
        None where `batch_norm` has to look at the call: what it would refuse, any dtype that is not that of all others,
        and where something records or transforms it.
    """
    if type(x) is not Tensor or around() != "nothing":
        return None
    rank, features, dtype = x.dim(), mean.shape[0], x.dtype
    axis = axis + rank if axis < 0 else axis
    if (
        not 0 < axis < rank
        or x.shape[axis] != features
        or dtype not in (torch.float32, torch.float64)
        or any(each is not None and each.dtype is not dtype for each in (gamma, beta, mean, variance))
    ):
        return None
    count = x.numel() // features
    if count < (2 if training else 1):
        return None
    if not training:
        return fused.from_moving(x, gamma, beta, mean, variance, epsilon, axis), None
    way = fused.way_of(x, axis, count, epsilon, plain=True)
    return fused.from_batch(x, gamma, beta, epsilon, axis, count, way)


def _read(
    x: Tensor,
    spec: BatchNormSpec,
    training: bool,
    update_stats: bool,
    weights: Tensor | None,
    adjustment: tuple[Tensor, Tensor] | None,
    renorm_clips: Mapping[str, float | Tensor | None] | None,
) -> _Call:
    plan = plan_call(
        spec,
        x.shape,
        dtype_name(x.dtype),
        training=training,
        update_stats=update_stats,
        weights_shape=None if weights is None else weights.shape,
        adjustment_shapes=None if adjustment is None else (adjustment[0].shape, adjustment[1].shape),
    )
    clips = clips_of(spec, renorm_clips)
    if weights is not None:
        assert plan.weights_shape is not None
        weights = weights.reshape([int(length or 0) for length in plan.weights_shape])
    whole = plan.count != 0 and not plan.ghosted
    asks_nothing = not (plan.batch_statistics or torch.is_grad_enabled() or torch.compiler.is_compiling())
    if weights is not None and whole and asks_nothing:
        # y is that of the same call without them; only a gradient would have to be kept from what lies under a mask.
        check_weights(weights)
        whole = False
    shares = None
    if weights is not None and whole:
        order = _order_of_weighted(x, weights, spec, plan) if adjustment is None else None
        shares = None if order is None else read_shares(weights, x, plan.axis, order)
    return _Call(
        plan,
        clips,
        weights,
        read_weights(weights, plan) if weights is not None and whole and shares is None else None,
        shares,
        _read_adjustment(adjustment, DTYPES[plan.arithmetic]) if training else None,
    )


def _order_of_weighted(x: Tensor, weights: Tensor, spec: BatchNormSpec, plan: CallPlan) -> Order | None:
    if not plan.batch_statistics or plan.synchronized or around() not in ("nothing", "recomputation"):
        return None
    assert plan.count is not None
    return fused.weighted_order(x, weights, plan.axis, plan.count, spec.epsilon)


def _by_moving(x: Tensor, channels: Channels, spec: BatchNormSpec, plan: CallPlan, weights: Weights | None) -> Tensor:
    """y by the moving statistics."""
    if weights is None and spec.epsilon > 0 and plan.count != 0:
        return fused.from_moving(x, channels.gamma, channels.beta, *channels.moving, spec.epsilon, plan.axis)
    wide = x.to(channels.arithmetic)
    affine = plain_affine(channels, plan)
    return by_statistics(wide, affine, *channels.moving, spec.epsilon, plan, weights).to(x.dtype)


def _read_adjustment(adjustment: tuple[Tensor, Tensor] | None, arithmetic: torch.dtype) -> tuple[Tensor, Tensor] | None:
    if adjustment is None:
        return None
    scale, bias = adjustment
    if scale.dtype.is_complex or bias.dtype.is_complex:
        raise InputError("the adjustment must be real; take its real part first.")
    return scale.to(arithmetic), bias.to(arithmetic)
