"""`batch_norm` for torch: a pure function, differentiable to second order."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlayer.call import CallPlan, plan_call
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from . import fused
from .dtypes import DTYPES, dtype_name
from .statistics import batch_moments, updated
from .support import MISSING
from .weights import Weights, read_weights


def batch_norm(
    x: Tensor,
    state: BatchNormState[Tensor],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: Tensor | None = None,
    update_stats: bool = True,
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

    Returns:
        y, of x's shape and dtype, and the state after: new tensors without gradient where they moved. With weights
        `num_updates` comes back as a tensor, for whether they hold any is not known before they are read.

    Raises:
        InputError: x or the weights do not fit the spec.
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
    )
    arithmetic = DTYPES[plan.arithmetic]
    gamma = None if state.gamma is None else state.gamma.to(arithmetic)
    beta = None if state.beta is None else state.beta.to(arithmetic)
    w = None if weights is None or plan.count == 0 else read_weights(weights, plan)
    # torch's kernels know no weights, refuse an epsilon of 0, and give NaN for the variance of a single value.
    fits = w is None and spec.epsilon > 0 and plan.count != 0
    if not plan.batch_statistics or plan.count == 0:
        mean, variance = _moving(state, plan, x.device)
        if fits:
            return fused.from_moving(x, gamma, beta, mean, variance, spec.epsilon, plan), state
        y = _normalized(x.to(arithmetic), gamma, beta, mean, variance, spec.epsilon, plan, w)
        return y.to(x.dtype), state
    if fits and plan.count != 1:
        y, batch = fused.from_batch(x, gamma, beta, spec.epsilon, plan)
        return y, updated(state, batch, spec) if plan.update else state
    wide = x.to(arithmetic)  # once, so that a half x's gradients add up in float32
    batch = batch_moments(wide, plan, w)
    mean, variance, entered = batch.mean, batch.variance, None
    if w is not None:
        # Without a single weighted element there are no batch statistics: y comes by the eval formula.
        moving_mean, moving_variance = _moving(state, plan, x.device)
        mean = torch.where(w.present, mean, moving_mean)
        variance = torch.where(w.present, variance, moving_variance)
        entered = w.present
    y = _normalized(wide, gamma, beta, mean, variance, spec.epsilon, plan, w).to(x.dtype)
    return y, updated(state, batch, spec, entered) if plan.update else state


def _normalized(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    plan: CallPlan,
    w: Weights | None = None,
) -> Tensor:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta, at every position; all of the plan's arithmetic."""

    def per_channel(values: Tensor) -> Tensor:
        return values.reshape(plan.channel_shape)

    sd = torch.sqrt(per_channel(variance) + epsilon)
    factor = None if gamma is None else per_channel(gamma)

    def scaled(values: Tensor, sd: Tensor, factor: Tensor | None) -> Tensor:
        normalized = (values - per_channel(mean)) / sd
        return normalized if factor is None else normalized * factor

    if w is None:
        y = scaled(x, sd, factor)
    else:
        # A masked position may hold anything. What is not finite there shows in y, but takes no part in the gradients
        # of gamma and the variance, where even a dy of 0 times it would be NaN.
        sound = w.positive | torch.isfinite(x)
        unsound = scaled(x, sd.detach(), None if factor is None else factor.detach())
        y = torch.where(sound, scaled(torch.where(sound, x, 0.0), sd, factor), unsound)
    return y if beta is None else y + per_channel(beta)


def _moving(state: BatchNormState[Tensor], plan: CallPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """The moving statistics in the plan's arithmetic; mean 0 and variance 1 where none are tracked."""
    arithmetic = DTYPES[plan.arithmetic]
    if state.moving_mean is None or state.moving_variance is None:
        features = plan.channel_shape[plan.axis]
        zeros = torch.zeros(features, dtype=arithmetic, device=device)
        return zeros, torch.ones_like(zeros)
    return state.moving_mean.detach().to(arithmetic), state.moving_variance.detach().to(arithmetic)
