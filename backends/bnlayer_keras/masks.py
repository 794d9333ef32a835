"""Which positions a call's statistics are of: Keras's masks and example weights, as the function's weights.

Keras's masks are of the inputs' shape without the LAST axis: so `Masking` and `Embedding` make them, and so Keras hands
them on. The function's weights are of the inputs' shape without the CHANNEL axis. Where the channels are last, these
are the same. Elsewhere a mask as Keras makes it can differ from channel to channel; each channel is then normalized by
itself. Where the lengths allow both readings, as two equal ones do, a mask that came with the inputs has Keras's
meaning, and one that the caller gives the function's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_names, needs_counter

from . import runtime

Shape = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Positions:
    """Where and how much each position counts.

    Attributes:
        weights: for the function, or None.
        by_channel: a boolean mask with the inputs' number of axes, 1 long on the last, or None. Never with `weights`.
    """

    weights: Any = None
    by_channel: Any = None


def positions(inputs: Any, mask: Any, weights: Any, axis: int) -> Positions:
    """Mask and weights as one.

    Raises:
        InputError: they do not go together.
    """
    if mask is None:
        return Positions(weights)
    ops = runtime.load_keras().ops
    lacks_last = _lacks_last(inputs, mask, axis)
    mask = ops.cast(mask, "bool")
    if lacks_last:
        mask = ops.expand_dims(mask, -1)
        if mask.shape[axis] != 1:
            if weights is not None:
                raise InputError("weights cannot be combined with a mask that differs by channel; give one of the two.")
            return Positions(by_channel=mask)
    if weights is None:
        return Positions(mask)
    while len(weights.shape) < len(mask.shape):  # (N,) always means the batch axis
        weights = ops.expand_dims(weights, -1)
    if len(weights.shape) != len(mask.shape):
        raise InputError(f"weights must have the mask's rank or be (N,); got {weights.shape} with mask {mask.shape}.")
    return Positions(ops.where(mask, weights, ops.zeros_like(weights)))


def shape(inputs: Any, mask: Any, weights: Any, axis: int) -> Shape | None:
    """The shape that the function will see of mask and weights; None where it sees none."""
    if mask is None:
        return None if weights is None else tuple(weights.shape)
    given = tuple(mask.shape)
    if not _lacks_last(inputs, mask, axis):
        return given
    return None if (*given, 1)[axis] != 1 else (*given, 1)


def batch_norm(
    function: Callable[..., Any],
    inputs: Any,
    state: BatchNormState[Any],
    spec: BatchNormSpec,
    where: Positions,
    **keywords: Any,
) -> tuple[Any, BatchNormState[Any]]:
    """The function over these positions: once, or once for each channel.

    Raises:
        InputError: the mask differs by channel, and the call asks for what all channels share.
    """
    if where.by_channel is None or not keywords["training"]:  # moving statistics normalize every position alike
        y, after = function(inputs, state, spec, weights=where.weights, **keywords)
        return y, after
    if needs_counter(spec) or keywords["adjustment"] is not None or spec.synchronized:
        raise InputError(
            "a mask that differs by channel does not go with cumulative, zero_debias, synchronized or an adjustment;"
            f" give the mask without the channel axis {spec.axis} instead of the last one."
        )
    ops = runtime.load_keras().ops
    axis = spec.axis % len(inputs.shape)
    names = array_names(spec)
    channels: list[tuple[Any, BatchNormState[Any]]] = []
    for c in range(spec.num_features):
        here = tuple(slice(c, c + 1) if i == axis else slice(None) for i in range(len(inputs.shape)))
        alone = BatchNormState(**{n: getattr(state, n)[c : c + 1] for n in names}, num_updates=state.num_updates)
        weights = where.by_channel[here]
        channels.append(function(inputs[here], alone, spec.replace(num_features=1), weights=weights, **keywords))
    y = ops.concatenate([y for y, _ in channels], axis)
    joined = {n: ops.concatenate([getattr(after, n) for _, after in channels]) for n in names}
    counts = ops.stack([after.num_updates for _, after in channels])
    return y, BatchNormState(**joined, num_updates=ops.max(counts))


def _lacks_last(inputs: Any, mask: Any, axis: int) -> bool:
    """Whether the mask lacks the inputs' last axis, and not their channel axis."""
    whole: Shape = tuple(inputs.shape)
    given: Shape = tuple(mask.shape)
    rank = len(whole)
    if not -rank <= axis < rank or axis % rank == rank - 1 or len(given) != rank - 1:
        return False
    axis %= rank
    without_last = _fits(given, whole[:-1])
    without_channels = _fits(given, (*whole[:axis], *whole[axis + 1 :]))
    handed_on = getattr(inputs, "_keras_mask", None) is not None
    return without_last and (handed_on or not without_channels)


def _fits(given: Sequence[int | None], wanted: Sequence[int | None]) -> bool:
    return all(have is None or want is None or have in (1, want) for have, want in zip(given, wanted, strict=True))
