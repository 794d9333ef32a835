"""Equinox's two ways to keep a batch norm's statistics, as the averages of `BatchNormState`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]


def from_batch_mode(mean: NDArray, variance: NDArray, updates: int, decay: float) -> dict[str, NDArray]:
    """mode="batch": hidden averages that start at 0 and 1, and a counter t.

    After t updates a start at s weighs d^t still. So the averages of the batches alone are `mean / (1 - d^t)` and
    `(variance - d^t) / (1 - d^t)`; the hidden variance that starts at 0, as ours does, is `variance - d^t`. Equinox
    itself divides `variance` as if it had started at 0, and its eval sees variances that are d^t / (1 - d^t) too large.

    Args:
        mean, variance: as stored, of shape (num_features,).
        updates: the counter, t.
        decay: d, 0 <= d < 1.

    Returns:
        moving_mean, moving_variance, hidden_mean, hidden_variance; in the stored dtype. At t = 0 the moving ones are
        the stored ones, with which Equinox evaluates then.
    """
    wide_mean, wide_variance = mean.astype(np.float64), variance.astype(np.float64)
    if updates == 0:
        moving, hidden = (wide_mean, wide_variance), (np.zeros_like(wide_mean), np.zeros_like(wide_mean))
    else:
        left = decay**updates
        share = -math.expm1(updates * math.log(decay)) if decay > 0 else 1.0
        debiased = wide_variance - left
        # A batch without variance leaves d^t, in the rounding of t products.
        rounding = 2 * updates * float(np.finfo(np.float32).eps) * left
        debiased[(debiased < 0) & (debiased >= -rounding)] = 0.0
        hidden = (wide_mean, debiased)
        moving = (wide_mean / share, debiased / share)
    arrays = {
        "moving_mean": moving[0],
        "moving_variance": moving[1],
        "hidden_mean": hidden[0],
        "hidden_variance": hidden[1],
    }
    return {role: array.astype(mean.dtype) for role, array in arrays.items()}


def from_ema_mode(arrays: Mapping[str, NDArray], first_time: bool) -> dict[str, NDArray]:
    """mode="ema": plain averages, and a flag that no update has entered them: what is stored then is no number."""
    if not first_time:
        return dict(arrays)
    shape, dtype = arrays["moving_mean"].shape, arrays["moving_mean"].dtype
    return {**arrays, "moving_mean": np.zeros(shape, dtype), "moving_variance": np.ones(shape, dtype)}
