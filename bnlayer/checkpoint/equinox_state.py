"""Equinox's two ways to keep a batch norm's statistics, as the averages of `BatchNormState`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]


def from_batch_mode(mean: NDArray, variance: NDArray, updates: int, decay: float) -> dict[str, NDArray]:
    """mode="batch": hidden averages and a counter t, from which the averages follow: hidden / (1 - d^t).

    Equinox's hidden variance starts at 1, not at 0, and is divided all the same: after few updates the variances that
    it evaluates with are d^t / (1 - d^t) larger than the batches'. What it evaluates with is what is returned.

    Args:
        mean, variance: as stored, of shape (num_features,).
        updates: the counter, t.
        decay: d, 0 <= d < 1.

    Returns:
        moving_mean, moving_variance, hidden_mean, hidden_variance; in the stored dtype. At t = 0 the moving ones are
        the stored ones, with which Equinox evaluates then, and nothing has entered the hidden ones.
    """
    if updates == 0:
        moving, hidden = (mean, variance), (np.zeros_like(mean), np.zeros_like(mean))
    else:
        share = -math.expm1(updates * math.log(decay)) if decay > 0 else 1.0
        moving = ((mean.astype(np.float64) / share).astype(mean.dtype),
                  (variance.astype(np.float64) / share).astype(mean.dtype))  # fmt: skip
        hidden = (mean, variance)
    return {
        "moving_mean": moving[0],
        "moving_variance": moving[1],
        "hidden_mean": hidden[0],
        "hidden_variance": hidden[1],
    }


def from_ema_mode(arrays: Mapping[str, NDArray], first_time: bool) -> dict[str, NDArray]:
    """mode="ema": plain averages, and a flag that no update has entered them: what is stored then is no number."""
    if not first_time:
        return dict(arrays)
    shape, dtype = arrays["moving_mean"].shape, arrays["moving_mean"].dtype
    return {**arrays, "moving_mean": np.zeros(shape, dtype), "moving_variance": np.ones(shape, dtype)}
