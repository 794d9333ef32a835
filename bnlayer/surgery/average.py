"""The mean of several checkpoints of one model, batch norms as mixtures.

All numbers in float64, with weights w that add up to 1. Of a batch norm, what every checkpoint normalizes with is a
sample of one population, and a mixture of them has

    mean     = sum of w * mean_i
    variance = sum of w * variance_i + sum of w * (mean_i - mean)^2

that is, the spread of the means belongs to it. Where the weights before a batch norm differ much from one checkpoint to
the next, no formula gives the averaged model's statistics: recalibrate it on data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..checkpoint.batch_norms import StoredBatchNorm, find
from ..checkpoint.checkpoint import Checkpoint, Tensor
from ..errors import CheckpointError, InputError
from ..porting.states import tensors_for
from .edits import NDArray, Note, silent
from .formulas import with_statistics


def average(
    checkpoints: Sequence[Checkpoint], weights: Sequence[float] | None = None, *, note: Note = silent, **options: Any
) -> Checkpoint:
    """The weighted mean of checkpoints of the same names, shapes and dtypes. Counters are the largest.

    Tensors that are no batch norm's are read and averaged when they are asked for. One checkpoint alone is itself, bit
    by bit.

    Args:
        checkpoints: at least one.
        weights: one each, not negative; None: all the same.
        note: told what is not a plain mean.
        options: as of `bnlayer.checkpoint.batch_norms.find`.

    Raises:
        InputError: there is none, or the weights do not fit.
        CheckpointError: names, shapes or dtypes differ, or numbers that are no floats.
    """
    if not checkpoints:
        raise InputError("give at least one checkpoint to average.")
    share = _shares(len(checkpoints), weights)
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _refuse_other(first, other)
    if len(checkpoints) == 1:
        return first
    norms = [find(checkpoint, **options).batch_norms for checkpoint in checkpoints]
    tensors = {name: _mean(checkpoints, share, name) for name in first}
    taken: set[str] = set()
    for same in zip(*norms, strict=True):
        made = _mixed(same, share, note)
        taken |= made.keys()
        tensors |= {name: Tensor.of(array) for name, array in made.items()}
    if norms[0]:
        note("converted", "statistics mixed: the spread of the means is in the variances",
             *(one.name for one in norms[0]))  # fmt: skip
        note("warnings", "the averaged weights give other activations than any of theirs: recalibrate on data where"
             " that can be done")  # fmt: skip
    return replace(first, tensors=tensors)


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    total = float(sum(weights))
    if len(weights) != count or min(weights) < 0 or not 0 < total < float("inf"):
        raise InputError(f"weights must be {count} numbers from 0 up, not all 0; got {list(weights)}.")
    return [weight / total for weight in weights]


def _refuse_other(first: Checkpoint, other: Checkpoint) -> None:
    where = other.path or other.format
    differ = [
        name for name in [*first, *(n for n in other if n not in first)] if name not in first or name not in other
    ]
    if differ:
        raise CheckpointError(f"{where}: {differ[0]} is not in all of the checkpoints ({len(differ)} names are not).")
    for name, tensor in first.tensors.items():
        one = other.tensors[name]
        if (one.shape, one.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(f"{where}: {name} is {one.dtype.name} {one.shape}; the first checkpoint has"
                                  f" {tensor.dtype.name} {tensor.shape}.")  # fmt: skip


def _mean(checkpoints: Sequence[Checkpoint], shares: Sequence[float], name: str) -> Tensor:
    tensor = checkpoints[0].tensors[name]
    read: Callable[[], NDArray]
    if tensor.dtype.kind in "biu":

        def read() -> NDArray:
            arrays = [checkpoint[name] for checkpoint in checkpoints]
            if tensor.dtype.kind != "b" and tensor.nbytes <= tensor.dtype.itemsize:  # one number: a counter
                return np.asarray(np.max(np.stack(arrays), 0))
            if any(not np.array_equal(array, arrays[0]) for array in arrays):
                raise CheckpointError(f"{name} is {tensor.dtype.name} and differs; whole numbers have no mean here.")
            return arrays[0]
    else:

        def read() -> NDArray:
            wide = np.complex128 if tensor.dtype.kind == "c" else np.float64
            total: NDArray = np.zeros(tensor.shape, wide)
            for share, checkpoint in zip(shares, checkpoints, strict=True):
                total = total + share * checkpoint[name].astype(wide)
            return total.astype(tensor.dtype)

    return Tensor(tensor.dtype, tensor.shape, read)


def _mixed(same: Sequence[StoredBatchNorm], shares: Sequence[float], note: Note) -> dict[str, NDArray]:
    states = [one.state() for one in same]
    wide = [{role: array.astype(np.float64) for role, array in state.arrays().items()} for state in states]

    def mean_of(role: str) -> NDArray:
        parts = [share * arrays[role] for share, arrays in zip(shares, wide, strict=True)]
        return np.asarray(np.sum(parts, axis=0))

    counters = [int(state.num_updates) for state in states if state.num_updates is not None]
    mean = mean_of("moving_mean")
    spread = [share * (arrays["moving_mean"] - mean) ** 2 for share, arrays in zip(shares, wide, strict=True)]
    parameters = {role: mean_of(role).astype(array.dtype) for role, array in states[0].arrays().items()}
    state = states[0].replace(**parameters, num_updates=max(counters) if counters else None)
    state = with_statistics(state, same[0].spec, mean, mean_of("moving_variance") + np.sum(spread, axis=0))
    made = tensors_for(same[0], same[0].spec, state, note)
    for role in ("renorm_mean", "renorm_stddev", "moving_stddev"):
        if role in same[0].parts:
            name = same[0].parts[role]
            made[name] = getattr(state, role).reshape(same[0].checkpoint.tensors[name].shape)
    return made
