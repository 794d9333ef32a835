"""What the layers for Flax and Equinox share: the way from their hosts' words to a spec, and from their calls to
`batch_norm`. Imports neither host."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, needs_counter

from .function import batch_norm

# A spec's fields beyond what Flax's constructors take, and what they are unless said: Flax's own behavior.
OPTIONS: Final[dict[str, Any]] = {
    "moving_variance_estimator": "biased",
    "zero_debias": "none",
    "renorm": None,
    "virtual_batch_size": None,
    "virtual_batch_layout": "strided",
    "track_moving_stats": True,
    "single_value": "allow",
    "nonfinite": "propagate",
}
# A layer's state beside its spec; not among the variables, so that checkpoints do not change.
FLAGS: Final = ("frozen_statistics", "frozen_parameters")


def flax_spec(layer: Any, num_features: int, axis: int, param_dtype: Any, stats_dtype: Any) -> BatchNormSpec:
    """The spec of a Flax batch norm, of either API, the host's own or ours, by its attributes.

    Args:
        layer: has the host's attributes, and may have those of `OPTIONS`.
        num_features: number of channels.
        axis: the channel axis, which may depend on the input (see `example_axis`).
        param_dtype, stats_dtype: of the variables.

    Raises:
        SpecError: an attribute is what no batch norm can be.
        UnsupportedError: the attributes ask for `axis_index_groups`.
    """
    refuse_groups(layer.axis_index_groups)
    return _flax_spec(
        num_features,
        axis,
        layer.momentum,
        layer.epsilon,
        layer.use_bias,
        layer.use_scale,
        layer.axis_name is not None,
        jnp.dtype(param_dtype).name,
        jnp.dtype(stats_dtype).name,
        *(getattr(layer, name, usual) for name, usual in OPTIONS.items()),
    )


@lru_cache(maxsize=1024, typed=True)
def _flax_spec(
    num_features: int,
    axis: int,
    momentum: float | Literal["cumulative"],
    epsilon: float,
    use_bias: bool,
    use_scale: bool,
    synchronized: bool,
    param_dtype: str,
    stats_dtype: str,
    *options: Any,
) -> BatchNormSpec:
    """Remembered, for a layer asks at every call."""
    return BatchNormSpec(
        num_features,
        axis=axis,
        epsilon=epsilon,
        decay=momentum,
        center=use_bias,
        scale=use_scale,
        synchronized=synchronized,
        param_dtype=param_dtype,
        stats_dtype=stats_dtype,
        **dict(zip(OPTIONS, options, strict=True)),
    )


def refuse_groups(axis_index_groups: Any) -> None:
    """Refuse statistics over some replicas only.

    Raises:
        UnsupportedError: groups are given.
    """
    if axis_index_groups is not None:
        raise UnsupportedError(
            "axis_index_groups is not supported: statistics are over all replicas of axis_name or over none. Leave it"
            " out, or split the mesh axis in two and give axis_name the inner one."
        )


def channel_axis(axis: int | Sequence[int]) -> int:
    """The one channel axis that Flax's `axis` names.

    Raises:
        UnsupportedError: it names several.
    """
    if isinstance(axis, Sequence):
        if len(axis) != 1:
            raise UnsupportedError(
                f"axis must be one channel axis; got {tuple(axis)!r}. Reshape the channels into one axis before the"
                " layer, and back after it."
            )
        return int(axis[0])
    return axis


def example_axis(axis: int, rank: int) -> tuple[int, bool]:
    """The channel axis, and whether x lacks the batch axis.

    Flax and Equinox take single examples, whose first axis is the channels'; the batch is then an axis that vmap maps.
    To `batch_norm` these are batches of one row, in which the channels are on axis 1.
    """
    return (1, True) if axis in (0, -rank) else (axis, False)


def normalized(
    x: jax.Array,
    state: BatchNormState[Any],
    spec: BatchNormSpec,
    *,
    is_example: bool,
    training: bool,
    dtype: Any,
    axis_name: Hashable | Sequence[Hashable] | None,
    frozen_parameters: bool,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    adjustment: tuple[ArrayLike, ArrayLike] | None = None,
    renorm_clips: Mapping[str, ArrayLike | None] | None = None,
) -> tuple[jax.Array, BatchNormState[jax.Array]]:
    """`batch_norm` as a host calls it: of an example or a batch, with the host's mask, in the host's dtype of y.

    Args:
        x: float array; with `is_example` without the batch axis.
        state, spec: of the layer.
        is_example: see `example_axis`.
        training: as of `batch_norm`.
        dtype: of y. Arithmetic is in float32 or wider, whatever it is.
        axis_name: over which the statistics are synchronized, or None.
        frozen_parameters: gamma and beta get no gradient.
        mask: boolean, broadcastable to x (Flax's word); ignored unless training, as Flax does.
        weights, update_stats, adjustment, renorm_clips: as of `batch_norm`; of an example, the weights are x's shape
            without the channel axis.

    Raises:
        InputError: an argument does not fit.
        UnsupportedError: a mask differs between channels, and the averages need the number of updates.
    """
    if mask is not None and weights is not None:
        raise InputError("mask and weights say the same; give one of the two.")
    # Not rounded on the way in: y is.
    wide = jnp.promote_types(x.dtype, dtype)
    x = x.astype(wide)
    if frozen_parameters:
        state = state.replace(gamma=_stopped(state.gamma), beta=_stopped(state.beta))
    masked = None if mask is None or not training else _aligned(mask, x)
    if is_example:
        x = x[None]
        masked = None if masked is None else masked[None]
        weights = None if weights is None else jnp.asarray(weights)[None]
    arguments: dict[str, Any] = {
        "training": training,
        "update_stats": update_stats,
        "adjustment": adjustment,
        "renorm_clips": renorm_clips,
        "axis_name": axis_name,
    }
    if masked is not None and masked.shape[spec.axis] != 1:
        y, after = _by_channel(x, state, spec, masked, **arguments)
    else:
        y, after = batch_norm(x, state, spec, weights=weights if masked is None else masked, **arguments)
    return (y[0] if is_example else y).astype(dtype), after


def _stopped(parameter: Any) -> Any:
    return None if parameter is None else jax.lax.stop_gradient(jnp.asarray(parameter))


def _aligned(mask: ArrayLike, x: jax.Array) -> jax.Array:
    """The mask with x's rank: numpy's broadcasting adds the axes in front.

    Raises:
        InputError: it does not broadcast to x, or holds real numbers.
    """
    given = jnp.asarray(mask)
    if jnp.issubdtype(given.dtype, jnp.inexact):
        raise InputError(f"mask must be boolean; got {given.dtype}. Real numbers are weights: give weights=.")
    shape = (1,) * (x.ndim - given.ndim) + given.shape
    if len(shape) != x.ndim or any(have not in (1, want) for have, want in zip(shape, x.shape, strict=True)):
        raise InputError(f"mask must broadcast to x's shape {x.shape}; got {given.shape}.")
    return given.reshape(shape) != 0


def _by_channel(
    x: jax.Array,
    state: BatchNormState[Any],
    spec: BatchNormSpec,
    mask: jax.Array,
    *,
    adjustment: tuple[ArrayLike, ArrayLike] | None,
    **arguments: Any,
) -> tuple[jax.Array, BatchNormState[jax.Array]]:
    """`batch_norm` under a mask that differs between channels: every channel is a layer of its own.

    Raises:
        UnsupportedError: the averages need the number of updates, which would differ between channels.
    """
    if needs_counter(spec):
        raise UnsupportedError(
            "a mask that differs between channels cannot go with decay='cumulative' or zero_debias, which count one"
            " number of updates for all channels. Give a mask with 1 on the channel axis."
        )
    one = spec.replace(num_features=1, axis=-1)
    channel = {name: jnp.asarray(array)[:, None] for name, array in state.arrays().items()}
    spread = [jnp.broadcast_to(jnp.asarray(part), x.shape) for part in adjustment or ()]

    def single(x: jax.Array, mask: jax.Array, arrays: Any, *pair: jax.Array) -> tuple[jax.Array, Any]:
        y, after = batch_norm(
            x[..., None],
            BatchNormState(**arrays, num_updates=state.num_updates),
            one,
            weights=mask,
            adjustment=(pair[0][..., None], pair[1][..., None]) if pair else None,
            **arguments,
        )
        return y[..., 0], after.arrays()

    axis = spec.axis
    whole = jnp.broadcast_to(mask, x.shape)
    y, arrays = jax.vmap(single, in_axes=(axis, axis, 0, *(axis for _ in spread)), out_axes=(axis, 0))(
        x, whole, channel, *spread
    )
    return y, BatchNormState(**{name: array[:, 0] for name, array in arrays.items()}, num_updates=state.num_updates)


def refuse_losses(layer: Any, host: str) -> None:
    """Refuse to say a layer of ours in its host's words where that would lose something.

    Raises:
        UnsupportedError: names what the host's layer does not have.
    """
    usual = {**OPTIONS, **dict.fromkeys(FLAGS, False)}
    lost = [f"{name}={getattr(layer, name)!r}" for name in usual if getattr(layer, name, usual[name]) != usual[name]]
    if layer.momentum == "cumulative":
        lost.append("momentum='cumulative'")
    if lost:
        raise UnsupportedError(f"{host} has no {', '.join(lost)}; set that back first, or keep bnlayer's layer.")


def numpy_state(arrays: Mapping[str, Any], counter: Any = None) -> BatchNormState[np.ndarray[Any, Any]] | None:
    """A numpy copy of one layer's arrays; None where there are those of several layers, stacked by vmap or scan, or
    shapes without values."""
    every = [*arrays.values(), *([] if counter is None else [counter])]
    if any(not isinstance(array, (jax.Array, np.ndarray)) or isinstance(array, Tracer) for array in every):
        return None
    if any(array.ndim != 1 for array in arrays.values()) or (counter is not None and counter.ndim):
        return None
    copied = {name: np.array(array) for name, array in arrays.items()}
    return BatchNormState(**copied, num_updates=None if counter is None else int(counter))
