"""Batch renormalization's corrections, in torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnlayer.call import RenormClips

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
    den = stddev.detach().clamp(min=math.sqrt(epsilon))
    r = torch.sqrt(batch.variance.detach() + epsilon) / den
    d = (batch.mean.detach() - mean.detach()) / den
    if clips.r_min is not None:
        r = torch.maximum(r, _like(r, clips.r_min))
    if clips.r_max is not None:
        r = torch.minimum(r, _like(r, clips.r_max))
    if clips.d_max is not None:
        limit = _like(d, clips.d_max)
        d = torch.maximum(torch.minimum(d, limit), -limit)
    return r, d


def _like(values: Tensor, clip: float | Tensor) -> Tensor:
    """The clip as a tensor without dimensions that goes with `values`."""
    return clip.detach().to(values) if isinstance(clip, Tensor) else values.new_full((), clip)
