"""Batch renormalization's corrections, in torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnlayer.call import RenormClips
from bnlayer.spec import Renorm

from .statistics import Moments


def corrections(
    batch: Moments, mean: Tensor, stddev: Tensor, epsilon: float, clips: RenormClips
) -> tuple[Tensor, Tensor]:
    """r and d, which move a batch's normalization towards the averages; constants to the gradient.

    r = sd/den and d = (m - renorm_mean)/den, clipped, with den = max(renorm_stddev, sqrt(epsilon)) from the state
    before the update. Ioffe, "Batch Renormalization", 2017, with Keras's floor under den.

    Args:
        batch: what normalizes.
        mean, stddev: the renorm averages before the update, like the batch's mean.
        epsilon: the spec's.
        clips: numbers, or tensors without dimensions.
    """
    sd = torch.sqrt(batch.variance.detach() + epsilon)
    return clipped(batch.mean.detach(), sd, mean.detach(), stddev.detach(), epsilon, clips)


def clipped(
    batch_mean: Tensor, batch_stddev: Tensor, mean: Tensor, stddev: Tensor, epsilon: float, clips: RenormClips | Renorm
) -> tuple[Tensor, Tensor]:
    """r and d of a batch's mean and sqrt(v + epsilon); see `corrections`."""
    den = stddev.clamp(min=math.sqrt(epsilon))
    return (
        _between(batch_stddev / den, clips.r_min, clips.r_max),
        _between((batch_mean - mean) / den, None if clips.d_max is None else -clips.d_max, clips.d_max),
    )


def _between(values: Tensor, low: float | Tensor | None, high: float | Tensor | None) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return values.clamp(*(None if clip is None else _like(values, clip) for clip in (low, high)))
    return values if low is None and high is None else values.clamp(low, high)


def _like(values: Tensor, clip: float | Tensor) -> Tensor:
    """The clip as a tensor without dimensions that goes with `values`."""
    return clip.detach().to(values) if isinstance(clip, Tensor) else values.new_full((), clip)


def corrected(gamma: Tensor | None, beta: Tensor | None, correction: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """gamma' and beta' of gamma (xhat r + d) + beta = xhat gamma' + beta'."""
    r, d = correction
    if gamma is None:
        return r, d if beta is None else d + beta
    return gamma * r, gamma * d if beta is None else torch.addcmul(beta, gamma, d)
