"""What a batch norm computes, by the definition and in double precision: the judge where no peer has the feature."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .cases import Mode, NDArray


def reference(
    mode: Mode,
    x: NDArray,
    dy: NDArray,
    values: Mapping[str, NDArray],
    epsilon: float,
    *,
    axis: int = -1,
    weights: NDArray | None = None,
    groups: NDArray | None = None,
) -> tuple[NDArray, ...]:
    """y, and in mode "grad" dx, in double precision.

    Args:
        mode: of the case.
        x, dy: float arrays.
        values: gamma, beta, moving_mean, moving_variance.
        epsilon: added to the variance.
        axis: the channel axis.
        weights: of x's shape without the channel axis.
        groups: which ghost batch each row is in.
    """
    x, dy = np.moveaxis(x, axis, -1), np.moveaxis(dy, axis, -1)
    if mode == "eval":
        sd = np.sqrt(values["moving_variance"].astype(np.float64) + epsilon)
        y = values["gamma"] * ((x - values["moving_mean"]) / sd) + values["beta"]
        return (np.moveaxis(y, -1, axis),)
    axes = tuple(range(x.ndim - 1))
    y, dx = np.empty(x.shape), np.empty(x.shape)
    members = [np.arange(len(x))] if groups is None else [np.flatnonzero(groups == g) for g in np.unique(groups)]
    for rows in members:
        part, dpart = x[rows].astype(np.float64), dy[rows].astype(np.float64)
        w = np.ones((*part.shape[:-1], 1)) if weights is None else weights[rows][..., None].astype(np.float64)
        share = w / w.sum()
        mean = (share * part).sum(axes)
        sd = np.sqrt((share * np.square(part - mean)).sum(axes) + epsilon)
        xhat = (part - mean) / sd
        y[rows] = values["gamma"] * xhat + values["beta"]
        dx[rows] = values["gamma"] / sd * (dpart - share * (dpart.sum(axes) + xhat * (dpart * xhat).sum(axes)))
    return tuple(np.moveaxis(found, -1, axis) for found in ((y, dx) if mode == "grad" else (y,)))
