"""One call of a batch norm, decided from shapes alone: what every backend has to know before it touches a number.

`plan_call` holds the rules that are the same in every framework (ranks, axes, weights' shapes, one value per channel,
which statistics normalize, whether they move), so that a backend is left with arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .errors import InputError
from .spec import FLOAT_DTYPES, BatchNormSpec


@dataclass(frozen=True)
class CallPlan:
    """How one call runs.

    Attributes:
        axis: the channel axis, counted from the front.
        reduced: every other axis, ascending.
        channel_shape: shape of a per-channel array broadcast against x, such as (1, C, 1, 1).
        count: elements per channel; None where a length is not known yet (a graph being traced). Of a synchronized
            layer these are the elements on this replica.
        weights_shape: shape to give the weights so that they broadcast against x, or None without weights.
        batch_statistics: normalize with the batch's statistics, else with the moving ones.
        update: the batch's statistics enter the moving ones, unless the total weight turns out to be 0.
        synchronized: the batch's statistics are those of all replicas together. How many elements these have only the
            replicas know, so the backend asks `refuse_single_value` once they do.
        ghosted: the batch's statistics are those of ghost batches, one set each.
        ghosts: the rows of each ghost batch, as slices of the batch axis; None where not ghosted, or where the number
            of rows is not known yet (then `ghost_slices` tells once it is).
        arithmetic: "float32" or "float64": the dtype to compute in, promote(x, float32).
    """

    axis: int
    reduced: tuple[int, ...]
    channel_shape: tuple[int, ...]
    count: int | None
    weights_shape: tuple[int | None, ...] | None
    batch_statistics: bool
    update: bool
    synchronized: bool
    ghosted: bool
    ghosts: tuple[slice, ...] | None
    arithmetic: str


def plan_call(
    spec: BatchNormSpec,
    shape: Sequence[int | None],
    dtype: str,
    *,
    training: bool,
    update_stats: bool = True,
    weights_shape: Sequence[int | None] | None = None,
    adjustment_shapes: tuple[Sequence[int | None], Sequence[int | None]] | None = None,
) -> CallPlan:
    """Check one call's shapes and dtype against the spec and decide how it runs.

    Args:
        spec: what the layer is.
        shape: x's shape; None for a length that is not known yet.
        dtype: x's dtype by name, such as "bfloat16".
        training: whether the caller trains; a layer with frozen statistics passes False.
        update_stats: False: batch statistics normalize, but do not enter the moving ones.
        weights_shape: the weights' shape, or None without weights.
        adjustment_shapes: shapes of the adjustment's scale and bias, or None without one.

    Raises:
        InputError: x, the weights or the adjustment do not fit the spec, or there is one value per channel (of a ghost
            batch) and the spec refuses that.
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
    ghosted = training and spec.virtual_batch_size is not None and count != 0
    ghosts = ghost_slices(spec, shape[0]) if ghosted and shape[0] is not None else None
    # The smallest batch whose statistics are its own: the whole, or a ghost without the remainder's extra row.
    least = count if ghosts is None or count is None or not shape[0] else count // shape[0] * (shape[0] // len(ghosts))
    synchronized = spec.synchronized and training  # no collective in eval, whatever normalizes there
    if batch_statistics and not synchronized and least == 1:  # no message is built for nothing, or while tracing
        whole = "batch" if ghosts is None else f"ghost batch of {spec.virtual_batch_size}"
        refuse_single_value(spec, least, f"{whole}; got x with shape {_shown(shape)}", whole)
    if adjustment_shapes is not None:
        if spec.virtual_batch_size is not None:
            raise InputError("adjustment and virtual_batch_size contradict each other; use one of the two.")
        for name, given in zip(("scale", "bias"), adjustment_shapes, strict=True):
            _refuse_unlike(name, tuple(given), shape)
    return CallPlan(
        axis=axis,
        reduced=reduced,
        channel_shape=tuple(spec.num_features if i == axis else 1 for i in range(rank)),
        count=count,
        weights_shape=None if weights_shape is None else _broadcastable(tuple(weights_shape), shape, axis),
        batch_statistics=batch_statistics,
        update=training and update_stats and spec.track_moving_stats and (count != 0 or synchronized),
        synchronized=synchronized,
        ghosted=ghosted,
        ghosts=ghosts,
        arithmetic="float64" if dtype == "float64" else "float32",
    )


def refuse_single_value(spec: BatchNormSpec, count: int | None, found: str, whole: str = "batch") -> None:
    """Refuse statistics over one value per channel, where the spec does.

    Args:
        spec: its `single_value` decides.
        count: elements per channel, over all replicas; None where it is not known.
        found: what came, for the message: "batch; got ...".
        whole: what has to be larger.

    Raises:
        InputError: the count is 1 and the spec says "raise".
    """
    if count == 1 and spec.single_value == "raise":
        raise InputError(
            f"batch statistics need more than one value per channel and {found}. Give a larger {whole}, call with"
            " training=False, or build the layer with single_value='allow'."
        )


def ghost_slices(spec: BatchNormSpec, rows: int) -> tuple[slice, ...]:
    """The ghost batches of `rows` rows: G = ceil(rows / virtual_batch_size) of them, sizes differing by one at most.

    "strided": ghost g has rows g, g + G, ...; "consecutive": as `numpy.array_split` cuts them.
    """
    assert spec.virtual_batch_size is not None
    number = -(-rows // spec.virtual_batch_size)
    if spec.virtual_batch_layout == "strided":
        return tuple(slice(g, None, number) for g in range(number))
    # Not divmod: while torch.compile traces, rows may be a symbol, which has none.
    size, larger = (rows // number, rows % number) if number else (0, 0)
    starts = [g * size + min(g, larger) for g in range(number + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(starts))


@dataclass(frozen=True)
class RenormClips:
    """The clips of batch renormalization that hold for one call; None is no clip. A backend may put scalars of its own
    framework here, such as a schedule's tensors."""

    r_max: Any
    r_min: Any
    d_max: Any


def renorm_clips(spec: BatchNormSpec, given: Mapping[str, Any] | None) -> RenormClips:
    """The spec's clips, with those of this call in their place.

    Args:
        spec: its `renorm` has the layer's clips.
        given: "r_max", "r_min" or "d_max" to a number, a scalar of the framework, or None for no clip.

    Raises:
        InputError: a name is no clip, the layer has no renorm, or a number is negative or crosses another.
    """
    clips = {} if spec.renorm is None else {n: getattr(spec.renorm, n) for n in ("r_max", "r_min", "d_max")}
    if given is not None:
        unknown = sorted(set(given) - set(clips))
        if spec.renorm is None:
            raise InputError("renorm_clips need a layer with renorm; build it with renorm=Renorm(...).")
        if unknown:
            raise InputError(f"renorm_clips has no {', '.join(unknown)}; the clips are r_max, r_min and d_max.")
        clips.update(given)
        numbers = {n: v for n, v in clips.items() if isinstance(v, (int, float))}
        if any(not v >= 0 for v in numbers.values()):
            raise InputError(f"renorm_clips must not be negative; got {numbers}.")
        if "r_max" in numbers and "r_min" in numbers and numbers["r_min"] > numbers["r_max"]:
            raise InputError(f"r_min must be at most r_max; got {numbers['r_min']} > {numbers['r_max']}.")
    return RenormClips(**(clips or {"r_max": None, "r_min": None, "d_max": None}))


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


def _refuse_unlike(name: str, given: tuple[int | None, ...], shape: tuple[int | None, ...]) -> None:
    """The adjustment must broadcast to x, and not beyond it."""
    trailing = shape[len(shape) - len(given) :] if len(given) <= len(shape) else None
    if trailing is None or any(
        have is not None and have != 1 and want is not None and have != want
        for have, want in zip(given, trailing, strict=True)
    ):
        raise InputError(f"the adjustment's {name} must broadcast to x's shape {_shown(shape)}; got {_shown(given)}.")


def _shown(shape: tuple[int | None, ...]) -> str:
    lengths = ["?" if length is None else str(length) for length in shape]
    return f"({', '.join(lengths)}{',' if len(lengths) == 1 else ''})"
