"""One call of a batch norm, decided from shapes alone: what every backend has to know before it touches a number.

`plan_call` holds the rules that are the same in every framework (ranks, axes, weights' shapes, one value per channel,
which statistics normalize, whether they move), so that a backend is left with arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InputError
from .spec import FLOAT_DTYPES, BatchNormSpec


@dataclass(frozen=True)
class CallPlan:
    """How one call runs.

    Attributes:
        axis: the channel axis, counted from the front.
        reduced: every other axis, ascending.
        channel_shape: shape of a per-channel array broadcast against x, such as (1, C, 1, 1).
        count: elements per channel; None where a length is not known yet (a graph being traced).
        weights_shape: shape to give the weights so that they broadcast against x, or None without weights.
        batch_statistics: normalize with the batch's statistics, else with the moving ones.
        update: the batch's statistics enter the moving ones, unless the total weight turns out to be 0.
        arithmetic: "float32" or "float64": the dtype to compute in, promote(x, float32).
    """

    axis: int
    reduced: tuple[int, ...]
    channel_shape: tuple[int, ...]
    count: int | None
    weights_shape: tuple[int | None, ...] | None
    batch_statistics: bool
    update: bool
    arithmetic: str


def plan_call(
    spec: BatchNormSpec,
    shape: Sequence[int | None],
    dtype: str,
    *,
    training: bool,
    update_stats: bool = True,
    weights_shape: Sequence[int | None] | None = None,
) -> CallPlan:
    """Check one call's shapes and dtype against the spec and decide how it runs.

    Args:
        spec: what the layer is.
        shape: x's shape; None for a length that is not known yet.
        dtype: x's dtype by name, such as "bfloat16".
        training: whether the caller trains; a layer with frozen statistics passes False.
        update_stats: False: batch statistics normalize, but do not enter the moving ones.
        weights_shape: the weights' shape, or None without weights.

    Raises:
        InputError: x or the weights do not fit the spec, or there is one value per channel and the spec refuses that.
    """
    shape = tuple(shape)
    rank = len(shape)
    if dtype not in FLOAT_DTYPES:
        raise InputError(f"x must be one of {', '.join(FLOAT_DTYPES)}; got {dtype}. Convert it first.")
    if rank < 2:
        raise InputError(f"x must have a batch axis and a channel axis; got shape {_shown(shape)}.")
    axis = spec.axis + rank if spec.axis < 0 else spec.axis
    if not 0 < axis < rank:
        which = "is the batch axis" if axis == 0 else "is not an axis"
        raise InputError(
            f"axis {spec.axis} {which} of x with shape {_shown(shape)}; build the layer with another axis."
        )
    if shape[axis] is not None and shape[axis] != spec.num_features:
        raise InputError(f"x must have {spec.num_features} channels on axis {spec.axis}; got shape {_shown(shape)}.")
    reduced = tuple(i for i in range(rank) if i != axis)
    count: int | None = 1
    for i in reduced:
        length = shape[i]
        count = None if count is None or length is None else count * length
    batch_statistics = training or not spec.track_moving_stats
    if batch_statistics and count == 1 and spec.single_value == "raise":
        raise InputError(
            f"batch statistics need more than one value per channel; got x with shape {_shown(shape)}. Give a larger"
            " batch, call with training=False, or build the layer with single_value='allow'."
        )
    return CallPlan(
        axis=axis,
        reduced=reduced,
        channel_shape=tuple(spec.num_features if i == axis else 1 for i in range(rank)),
        count=count,
        weights_shape=None if weights_shape is None else _broadcastable(tuple(weights_shape), shape, axis),
        batch_statistics=batch_statistics,
        update=training and update_stats and spec.track_moving_stats and count != 0,
        arithmetic="float64" if dtype == "float64" else "float32",
    )


def trains(spec: BatchNormSpec, training: bool, frozen_statistics: bool) -> bool:
    """Whether a layer's call trains: what it passes to its function as `training`.

    Raises:
        InputError: the layer's statistics are frozen, and its spec tracks none.
    """
    if frozen_statistics and not spec.track_moving_stats:
        raise InputError("frozen_statistics needs moving statistics; this spec has track_moving_stats=False.")
    return training and not frozen_statistics


def _broadcastable(given: tuple[int | None, ...], shape: tuple[int | None, ...], axis: int) -> tuple[int | None, ...]:
    """The weights' shape with 1 on the channel axis and wherever they are spread.

    Three forms are accepted: (N,), x's shape without the channel axis, x's shape with 1 on it; in the last two any
    length may be 1. (N,) always means the batch axis, also where another axis has the same length.
    """
    rank = len(shape)
    if len(given) == rank:
        full = given
    elif len(given) == rank - 1:
        full = (*given[:axis], 1, *given[axis:])
    elif len(given) == 1:
        full = given + (1,) * (rank - 1)
    else:
        full = ()
    fits = len(full) == rank and all(
        have is None or have == 1 or (i != axis and (want is None or have == want))
        for i, (have, want) in enumerate(zip(full, shape, strict=True))
    )
    # A rank-1 weight that is not "x's shape without the channel axis" has to be exactly (N,).
    if fits and len(given) == 1 and rank > 2:
        fits = given[0] is None or shape[0] is None or given[0] == shape[0]
    if not fits:
        without = tuple(length for i, length in enumerate(shape) if i != axis)
        kept = tuple(1 if i == axis else length for i, length in enumerate(shape))
        raise InputError(
            f"weights must have shape {_shown(shape[:1])}, {_shown(without)} (1s allowed) or {_shown(kept)};"
            f" got {_shown(given)} for x with shape {_shown(shape)}."
        )
    return full


def _shown(shape: tuple[int | None, ...]) -> str:
    lengths = ["?" if length is None else str(length) for length in shape]
    return f"({', '.join(lengths)}{',' if len(lengths) == 1 else ''})"
