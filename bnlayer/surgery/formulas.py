"""States of batch norms that compute the same under other circumstances. Imports nothing of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..spec import BatchNormSpec
from ..state import BatchNormState

NDArray = np.ndarray[Any, np.dtype[Any]]


def share(spec: BatchNormSpec, state: BatchNormState[Any]) -> float:
    """How much of a hidden average has come from batches: 1 - decay^updates; 1 where that is not known."""
    if state.num_updates is None or spec.decay == "cumulative":
        return 1.0
    return float(1 - float(spec.decay) ** int(state.num_updates))


def with_statistics(
    state: BatchNormState[NDArray], spec: BatchNormSpec, mean: NDArray, variance: NDArray
) -> BatchNormState[NDArray]:
    """The state with these moving statistics, float64, in its own dtypes; hidden averages give them at its counter."""
    assert state.moving_mean is not None and state.moving_variance is not None
    seen = share(spec, state)
    changes = {"moving_mean": mean, "moving_variance": variance}
    if state.hidden_mean is not None:
        changes["hidden_mean"] = mean * seen
    if state.hidden_variance is not None:
        changes["hidden_variance"] = variance * seen
    if state.renorm_mean is not None:
        stddev = np.sqrt(variance + spec.epsilon)
        changes |= {"renorm_mean": mean, "renorm_stddev": stddev, "moving_stddev": stddev}
    dtypes = {name: array.dtype for name, array in state.arrays().items()}
    return state.replace(**{name: array.astype(dtypes.get(name, np.float64)) for name, array in changes.items()})


def absorbed(state: BatchNormState[NDArray], spec: BatchNormSpec, bias: NDArray) -> BatchNormState[NDArray]:
    """The state with a constant that is no longer in its input taken off its means: moving_mean - bias.

    Args:
        state: with moving statistics.
        spec: whose decay tells how much of a hidden average are batches: that much of the bias is in it.
        bias: of num_features values.
    """
    wide = bias.reshape(-1).astype(np.float64)
    assert state.moving_mean is not None
    changes = {"moving_mean": (state.moving_mean.astype(np.float64) - wide).astype(state.moving_mean.dtype)}
    if state.hidden_mean is not None and state.num_updates is not None and spec.decay != "cumulative":
        part = share(spec, state)
        changes["hidden_mean"] = (state.hidden_mean.astype(np.float64) - part * wide).astype(state.hidden_mean.dtype)
    if state.renorm_mean is not None:
        changes["renorm_mean"] = (state.renorm_mean.astype(np.float64) - wide).astype(state.renorm_mean.dtype)
    return state.replace(**changes)


def shifted(
    state: BatchNormState[NDArray], spec: BatchNormSpec, epsilon: float, name: str
) -> tuple[BatchNormState[NDArray], str]:
    """The state with which another epsilon gives the same in eval, and in words how.

    Args:
        state: with moving statistics.
        spec: the epsilon that it has now.
        epsilon: the other one.
        name: the layer's, for the message.

    Raises:
        CheckpointError: the variance is too small to be shifted, and there is no gamma.
    """
    assert state.moving_variance is not None
    variance = state.moving_variance.astype(np.float64)
    change = spec.epsilon - epsilon
    if np.all(variance + change >= 0):
        changes = {"moving_variance": (variance + change).astype(state.moving_variance.dtype)}
        if state.hidden_variance is not None:
            hidden = state.hidden_variance.astype(np.float64) + share(spec, state) * change
            changes["hidden_variance"] = np.maximum(hidden, 0).astype(state.hidden_variance.dtype)
        return state.replace(**changes), "the difference is in the moving variance"
    if state.gamma is None:
        raise CheckpointError(
            f"{name}: epsilon {spec.epsilon:g} cannot become {epsilon:g}: the variance is too small to be shifted, and"
            " there is no gamma to make up for it."
        )
    gamma = state.gamma.astype(np.float64) * np.sqrt((variance + epsilon) / (variance + spec.epsilon))
    return state.replace(gamma=gamma.astype(state.gamma.dtype)), "gamma makes up for it"
