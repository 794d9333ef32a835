"""What enters the moving averages, and the averages after it, in torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .statistics import Moments
from .tensors import held


def updated(
    state: BatchNormState[Tensor], batch: Moments, spec: BatchNormSpec, entered: Tensor | None = None
) -> BatchNormState[Tensor]:
    """The state after one batch's statistics entered it: new tensors, without gradient.

    Args:
        state: has the spec's averages; `num_updates` is an int or an integer tensor.
        batch: what enters.
        spec: decay, estimator, renorm, zero_debias and nonfinite policy.
        entered: a boolean scalar, False where nothing enters after all; None for True.

    Raises:
        StateError: the state lacks an average.
    """
    t = state.num_updates + 1
    mean, variance = batch.mean.detach(), batch.variance.detach()
    keep: Tensor | None = None if entered is None else ~entered
    if spec.nonfinite == "keep":
        # The unbiased variance and the standard deviation are derived from these two.
        lost = ~(torch.isfinite(mean) & torch.isfinite(variance))
        keep = lost if keep is None else keep | lost
    moved: dict[str, Tensor] = {}

    def average(name: str, new: Tensor, decay: float | Tensor) -> Tensor:
        """The average `name` moved, and as it is before it is rounded to the state's dtype."""
        old = held(state, name)
        wide: Tensor = decay * _at_least(old, new.dtype) + (1.0 - decay) * new
        put(name, wide)
        return wide

    def put(name: str, wide: Tensor) -> None:
        old = held(state, name)
        now = wide.to(old.dtype)
        moved[name] = now if keep is None else torch.where(keep, old, now)

    decay = _decay(spec, t, mean)
    if spec.renorm is not None:
        stddev = torch.sqrt(variance + spec.epsilon)
        average("renorm_mean", mean, spec.renorm.decay)
        average("renorm_stddev", stddev, spec.renorm.decay)
        average("moving_mean", mean, decay)
        # Keras's rule: the standard deviation is averaged, and the moving variance follows from that.
        average_stddev = average("moving_stddev", stddev, decay)
        put("moving_variance", (torch.square(average_stddev) - spec.epsilon).clamp(min=0.0))
    else:
        entering = batch.unbiased if spec.moving_variance_estimator == "unbiased" else variance
        if spec.zero_debias == "none":
            average("moving_mean", mean, decay)
        else:
            put("moving_mean", average("hidden_mean", mean, decay) / _seen(spec, t))
        if spec.zero_debias != "all":
            average("moving_variance", entering, decay)
        else:
            put("moving_variance", average("hidden_variance", entering, decay) / _seen(spec, t))
    return state.replace(**moved, num_updates=t if entered is None else state.num_updates + entered)


def _at_least(old: Tensor, dtype: torch.dtype) -> Tensor:
    # An exported graph would have a promotion of types as a node, and cannot run that.
    return old if old.dtype == dtype else old.to(torch.promote_types(old.dtype, dtype))


def _decay(spec: BatchNormSpec, t: int | Tensor, like: Tensor) -> float | Tensor:
    if spec.decay != "cumulative":
        return float(spec.decay)
    return 1.0 - 1.0 / (t.to(like.dtype) if isinstance(t, Tensor) else t)


def _seen(spec: BatchNormSpec, t: int | Tensor) -> float | Tensor:
    """1 - decay**t, the weight of t updates in a hidden average; no digits are lost where decay is close to 1."""
    rate = math.log(float(spec.decay)) if spec.decay else -math.inf
    if not isinstance(t, Tensor):
        return -math.expm1(t * rate)
    wide = torch.float32 if t.device.type == "mps" else torch.float64  # Apple's GPU has no double precision
    return -torch.expm1(t.to(wide) * rate)
