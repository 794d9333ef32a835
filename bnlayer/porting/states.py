"""A batch norm's state as the tensors of another framework's layer: what is stored beside mean and variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ..checkpoint.batch_norms import StoredBatchNorm
from ..errors import CheckpointError
from ..spec import BatchNormSpec
from ..state import BatchNormState

NDArray = np.ndarray[Any, np.dtype[Any]]
Note = Callable[..., None]  # Report.add
_LAST: Final = 2**31 - 1  # the counters of Haiku and Equinox are 32 bits wide


def settled(decay: float) -> int:
    """After how many updates a zero-debiased average is the plain one to the last bit: decay^t < 2^-64."""
    if decay <= 0:
        return 1
    steps = math.ceil(64 * math.log(2) / -math.log(decay)) if decay < 1 else _LAST + 1
    if steps > _LAST:
        raise CheckpointError(
            f"a decay of {decay} needs more updates than a counter holds, until a zero-debiased average is plain."
        )
    return steps


def tensors_for(
    target: StoredBatchNorm, spec: BatchNormSpec, state: BatchNormState[NDArray], note: Note
) -> dict[str, NDArray]:
    """The target layer's tensors, by name, that hold this state; in its dtypes, counters in the target's.

    Args:
        target: the layer to fill.
        spec: the source's, whose decay the averages follow.
        state: the source's.
        note: `Report.add`, told of whatever is not the same bits.

    Raises:
        CheckpointError: the source lacks statistics, or its parameters have no place.
    """
    parts, name = target.parts, target.name
    if state.moving_mean is None or state.moving_variance is None:
        raise CheckpointError(f"{name}: the source has no moving statistics to fill it with.")
    arrays: dict[str, NDArray] = {}
    for role, neutral in (("gamma", 1.0), ("beta", 0.0)):
        value = getattr(state, role)
        if role in parts:
            if value is None:
                note(
                    "converted", f"{role} filled with {neutral:g}: the source has none, which is the same", parts[role]
                )
                value = np.full(target.num_features, neutral, state.moving_mean.dtype)
            arrays[role] = value
        elif value is not None and np.any(value != neutral):
            raise CheckpointError(
                f"{name}: the source's {role} is not {neutral:g} throughout, and the target has none. Give the target a"
                f" {role}, or fold it."
            )
    arrays["moving_mean"], arrays["moving_variance"] = state.moving_mean, state.moving_variance
    if target.convention == "equinox.ema":
        return _placed(target, arrays, 0)
    counter = state.num_updates
    if "hidden_mean" in parts:
        arrays, counter = _hidden(target, arrays, spec, state, note)
    elif "num_updates" in parts and counter is None:
        counter = 0
        note("assumed", "number of updates 0: the source counts none, and only a cumulative average needs it",
             parts["num_updates"])  # fmt: skip
    elif state.hidden_mean is not None and not _plain(spec, state):
        note("lossy", "a zero-debiased average goes on as a plain one: its first updates weigh differently", name)
    return _placed(target, arrays, counter)


def _plain(spec: BatchNormSpec, state: BatchNormState[NDArray]) -> bool:
    """Whether so many updates have entered a zero-debiased average that it goes on as a plain one does."""
    return spec.decay != "cumulative" and state.num_updates is not None and state.num_updates >= settled(spec.decay)


def _hidden(
    target: StoredBatchNorm, arrays: dict[str, NDArray], spec: BatchNormSpec, state: BatchNormState[NDArray], note: Note
) -> tuple[dict[str, NDArray], int]:
    """With the hidden averages that a zero-debiased one follows from, and their counter."""
    parts = target.parts
    if spec.decay == "cumulative":
        raise CheckpointError(f"{target.name}: a cumulative average has no counterpart in a zero-debiased one.")
    decay = float(spec.decay)
    carried = (
        state.hidden_mean is not None
        and state.num_updates is not None
        and (state.hidden_variance is not None or "hidden_variance" not in parts)
    )
    if carried:
        assert state.hidden_mean is not None and state.num_updates is not None
        counter = state.num_updates
        hidden = {"hidden_mean": state.hidden_mean, "hidden_variance": state.hidden_variance}
    else:
        counter = settled(decay)
        hidden = {"hidden_mean": arrays["moving_mean"], "hidden_variance": arrays["moving_variance"]}
        note("converted", f"counter set to {counter}, hidden averages to the averages: they go on as the source's",
             parts["num_updates"])  # fmt: skip
    if target.convention == "equinox.batch":
        mean, variance = hidden["hidden_mean"], hidden["hidden_variance"]
        assert mean is not None and variance is not None
        if counter == 0:  # nothing has entered them, and Equinox evaluates with what is stored
            mean, variance = arrays["moving_mean"], arrays["moving_variance"]
        return {**arrays, "moving_mean": mean, "moving_variance": variance}, counter
    return {**arrays, **{role: a for role, a in hidden.items() if role in parts and a is not None}}, counter


def _placed(target: StoredBatchNorm, arrays: dict[str, NDArray], counter: int | None) -> dict[str, NDArray]:
    """By the tensors' names, in their shapes."""
    tensors = target.checkpoint.tensors
    result: dict[str, NDArray] = {}
    for role, name in target.parts.items():
        if role == "num_updates":
            for twin in (name, name.replace("/mean_ema/", "/var_ema/")):  # Haiku counts for each average apart
                if twin in tensors and counter is not None:
                    result[twin] = np.full(tensors[twin].shape, counter, tensors[twin].dtype)
        elif role in arrays:
            result[name] = arrays[role].reshape(tensors[name].shape)
    return result
