"""`batch_norm` for torch: a pure function, differentiable to second order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnlayer.call import plan_call
from bnlayer.call import renorm_clips as clips_of
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from . import fused
from .averages import updated
from .dtypes import DTYPES, dtype_name
from .ghosts import by_ghosts
from .normalization import Channels, by_batch, by_statistics, plain_affine
from .support import MISSING
from .weights import read_weights


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

    Returns:
        y, of x's shape and dtype, and the state after: new tensors without gradient where they moved. With weights
        `num_updates` comes back as a tensor, for whether they hold any is not known before they are read.

    Raises:
        InputError: x, the weights, the adjustment or the clips do not fit the spec.
        UnsupportedError: the spec asks for what this backend lacks.
    """
    MISSING.refuse("torch", spec)
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
    arithmetic = DTYPES[plan.arithmetic]
    channels = Channels(state, arithmetic, x.device, spec.num_features)
    if weights is not None:
        assert plan.weights_shape is not None
        weights = weights.reshape([int(length or 0) for length in plan.weights_shape])
    if plan.ghosted:
        y, batch, entered = by_ghosts(x, channels, spec, plan, weights, clips)
        return y, updated(state, batch, spec, entered) if plan.update else state
    w = None if weights is None or plan.count == 0 else read_weights(weights, plan)
    if not plan.batch_statistics or plan.count == 0:
        if w is None and spec.epsilon > 0 and plan.count != 0:
            return fused.from_moving(x, channels.gamma, channels.beta, *channels.moving, spec.epsilon, plan), state
        y = by_statistics(x.to(arithmetic), plain_affine(channels, plan), *channels.moving, spec.epsilon, plan, w)
        return y.to(x.dtype), state
    adjusting = _read_adjustment(adjustment, arithmetic) if training else None
    y, batch = by_batch(x, channels, spec, plan, w, clips, adjusting)
    return y, updated(state, batch, spec, None if w is None else w.present.any()) if plan.update else state


def _read_adjustment(adjustment: tuple[Tensor, Tensor] | None, arithmetic: torch.dtype) -> tuple[Tensor, Tensor] | None:
    if adjustment is None:
        return None
    scale, bias = adjustment
    if scale.dtype.is_complex or bias.dtype.is_complex:
        raise InputError("the adjustment must be real; take its real part first.")
    return scale.to(arithmetic), bias.to(arithmetic)
