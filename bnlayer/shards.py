"""One batch on several replicas: cut a step's calls by rows, and join what the replicas gave.

For a backend's `step` with `Request.shards`; what runs the replicas is the framework's own engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from .contract import Call, CallOutcome, NDArray, Outcome, Request
from .errors import InputError


def cut(request: Request) -> list[Request]:
    """The request that each replica gets: its rows of every call.

    What has x's rank (or is weights of one number per row) and as many rows as x is cut with it; what has one row, or
    fewer axes, is the same on every replica.

    Raises:
        InputError: the shards do not add up to the rows of every call.
    """
    assert request.shards is not None
    edges = [0, *accumulate(request.shards)]
    for call in request.calls:
        if min(request.shards, default=-1) < 0 or edges[-1] != call.x.shape[0]:
            raise InputError(
                f"shards must be counts that add up to x's {call.x.shape[0]} rows; got {list(request.shards)}."
            )
    return [
        replace(request, calls=tuple(_rows(call, slice(*edge)) for call in request.calls), shards=None)
        for edge in pairwise(edges)
    ]


def join(request: Request, outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of the whole step: rows put together again, parameter gradients added up.

    Args:
        request: of the whole step.
        outcomes: of each replica, in order.

    Raises:
        InputError: the replicas ended in different states, so they were not synchronized.
    """
    first = outcomes[0]
    for rank, outcome in enumerate(outcomes[1:], 1):
        for name, array in first.state.arrays().items():
            other = getattr(outcome.state, name)
            if not np.array_equal(array.astype(np.float64), other.astype(np.float64), equal_nan=True):
                raise InputError(f"{name} must be the same on every replica; that of replica {rank} differs from 0's.")
        if int(outcome.state.num_updates) != int(first.state.num_updates):
            raise InputError(
                f"num_updates must be the same on every replica; replica 0 has {first.state.num_updates}, replica"
                f" {rank} {outcome.state.num_updates}."
            )
    return Outcome(
        tuple(_joined(call, [o.calls[i] for o in outcomes]) for i, call in enumerate(request.calls)),
        state=first.state,
        dgamma=_sum([o.dgamma for o in outcomes]),
        dbeta=_sum([o.dbeta for o in outcomes]),
    )


def _rows(call: Call, rows: slice) -> Call:
    def of(array: NDArray | None) -> NDArray | None:
        return array[rows] if array is not None and _is_cut(array, call) else array

    adjustment = call.adjustment
    if adjustment is not None:
        scale, bias = (a[rows] if a.ndim == call.x.ndim and a.shape[0] == call.x.shape[0] else a for a in adjustment)
        adjustment = (scale, bias)
    return Call(
        call.x[rows],
        dy=of(call.dy),
        weights=of(call.weights),
        adjustment=adjustment,
        direction=of(call.direction),
    )


def _is_cut(array: NDArray, call: Call) -> bool:
    """Whether an array whose first axis is the batch's has a row for each row of x, and not one for all."""
    return bool(array.shape[0] == call.x.shape[0])


def _joined(call: Call, parts: Sequence[CallOutcome]) -> CallOutcome:
    spread = call.weights is not None and not _is_cut(call.weights, call)
    dweights = [p.dweights for p in parts]
    return CallOutcome(
        np.concatenate([p.y for p in parts]),
        dx=_rejoined([p.dx for p in parts]),
        dweights=_sum(dweights) if spread else _rejoined(dweights),
        hvp=_rejoined([p.hvp for p in parts]),
    )


def _rejoined(parts: Sequence[NDArray | None]) -> NDArray | None:
    present = [p for p in parts if p is not None]
    return np.concatenate(present) if len(present) == len(parts) else None


def _sum(parts: Sequence[NDArray | None]) -> NDArray | None:
    present: list[Any] = [p for p in parts if p is not None]
    if len(present) != len(parts):
        return None
    # As an all-reduce of float32 would, and no narrower: half parameters' gradients are rounded once.
    wide = np.result_type(np.float32, present[0].dtype)
    return np.asarray(np.sum([p.astype(wide) for p in present], axis=0)).astype(present[0].dtype)
