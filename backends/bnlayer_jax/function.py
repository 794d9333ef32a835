"""`batch_norm` for JAX: a pure function, differentiable to every order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bnlayer.call import CallPlan, RenormClips, plan_call, refuse_single_value
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .averages import updated
from .ghosts import groups_of
from .normalization import scaled, seen
from .paths import in_one_pass
from .precision import refuse_missing_float64
from .renorm import corrections, read_clips
from .replicas import AxisName, Replicas, replicas_of
from .state import check_names_and_shapes
from .statistics import entering, group_moments, replicated_moments
from .support import MISSING
from .weights import check_values, related, unwrapping


def batch_norm(
    x: ArrayLike,
    state: BatchNormState[Any],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    adjustment: tuple[ArrayLike, ArrayLike] | None = None,
    renorm_clips: Mapping[str, ArrayLike | None] | None = None,
    axis_name: AxisName | None = None,
) -> tuple[jax.Array, BatchNormState[jax.Array]]:
    """Normalize x and update the moving statistics.

    Works under jit, grad, jvp, hessian, vmap, scan, remat and shard_map; `spec`, `training`, `update_stats` and
    `axis_name` are static. Derivatives of every order are right, forwards and backwards (`bnlayer_jax.normalization`).

    Over several devices there are two ways, and only one of them asks `spec.synchronized`:

    * Under shard_map (or vmap or pmap with an axis name) each replica sees its own rows. A synchronized layer that is
      given the `axis_name` has the statistics of all replicas, with two all-reduces of a few numbers per channel in
      training (a third, of one number, with real weights), one in the backward pass, and none in eval. The gradients
      are those of the sum of the replicas' losses. Without `axis_name` the layer is one replica, for itself.
    * Under jit, x is one array wherever its rows are. Its statistics are those of the whole array, whatever
      `synchronized` says: XLA puts in the all-reduces that this takes.

    Args:
        x: float array of rank 2 or more, `spec.num_features` long on `spec.axis`. float64 needs x64. In eval a length
            may be a symbol of `jax.export`.
        state: parameters and moving statistics, of JAX arrays (a pytree, its counter an integer leaf); not modified.
        spec: what the layer is.
        training: batch statistics if True, moving ones if False.
        weights: mask or weights of shape (N,), x's shape without the channel axis, or with 1 on it; at least 0.
            Real ones are differentiable. Under a trace their values cannot be refused: a negative or non-finite one
            makes the statistics, and with them y, NaN.
        update_stats: False: batch statistics normalize, but the state is returned as it came.
        adjustment: (scale, bias) of the normalized values in training, each broadcastable to x; differentiable.
        renorm_clips: "r_max", "r_min" or "d_max" to a number or a scalar, which may be traced and is not checked
            then, in place of the spec's; None is no clip.
        axis_name: the mapped axis over which the statistics of a synchronized layer are taken in training; several
            count as one. All replicas have x's shape. Where they have fewer rows than that, the rest is padding of
            weight 0 (`bnlayer_jax.replicas.padded`), which changes nothing; but, like every masked row, it counts as
            rows when one value per channel is refused, since that is decided by shapes.

    Returns:
        y, of x's shape and dtype, and the state after, whose updated statistics carry no gradient.

    Raises:
        InputError: x, the weights, the adjustment or the clips do not fit the spec; or `axis_name` is given to a layer
            that is not synchronized, or is not mapped where it trains.
        StateError: the state does not fit the spec.
        UnsupportedError: the spec asks for what this backend lacks, or for float64 without x64.
    """
    MISSING.refuse("jax", spec)
    given = x if isinstance(x, (jax.Array, np.ndarray)) else jnp.asarray(x)
    plan = plan_call(
        spec,
        [length if isinstance(length, int) else None for length in given.shape],  # jax.export has symbols for lengths
        given.dtype.name,
        training=training,
        update_stats=update_stats,
        weights_shape=None if weights is None else jnp.shape(weights),
        adjustment_shapes=None if adjustment is None else _shapes_of(adjustment),
    )
    if plan.count is None and (plan.batch_statistics or weights is not None):
        raise InputError(
            f"batch statistics and weights need lengths that are numbers; got x with shape {given.shape}. Export with"
            " training=False and without weights, or with numbers."
        )
    clips = read_clips(spec, renorm_clips)
    replicas = replicas_of(axis_name, spec, plan.synchronized)
    if plan.synchronized:
        everywhere = "" if replicas is None else f" on each of {replicas.number} replicas"
        assert plan.count is not None
        count = plan.count if replicas is None else plan.count * replicas.number
        refuse_single_value(spec, count, f"batch; got x with shape {given.shape}{everywhere}")
    check_names_and_shapes(state, spec)
    refuse_missing_float64(spec, given.dtype.name)  # before JAX converts x, which it would do without a word
    x = jnp.asarray(given)
    if weights is not None:
        check_values(weights)
    if plan.count == 0:  # without a single element there is nothing to weigh
        weights = None
    y, state = _normalized_and_updated(
        x.astype(plan.arithmetic),
        state,
        spec,
        plan,
        weights=None if weights is None else jnp.asarray(unwrapping(weights)),
        adjustment=None if adjustment is None or not training else _widened(adjustment, plan.arithmetic),
        clips=clips,
        replicas=replicas,
    )
    return y.astype(x.dtype), state


def _normalized_and_updated(
    x: jax.Array,
    state: BatchNormState[Any],
    spec: BatchNormSpec,
    plan: CallPlan,
    *,
    weights: jax.Array | None,
    adjustment: tuple[jax.Array, jax.Array] | None,
    clips: RenormClips,
    replicas: Replicas | None,
) -> tuple[jax.Array, BatchNormState[jax.Array]]:
    """y and the state after, for x and the adjustment in the plan's arithmetic."""
    groups = groups_of(spec, plan, x.shape[0])
    related_weights = None if weights is None else related(weights, plan, groups, replicas)
    positive = None if related_weights is None else related_weights.positive
    x = groups.split(x)
    shift, variance = _moving(state, plan.arithmetic, groups.channel_shape)
    rest = jnp.zeros_like(shift)
    renorm: tuple[jax.Array | float, jax.Array | float] | None = None
    one_pass = False
    if plan.batch_statistics and plan.count != 0:
        if replicas is None:
            one_pass = in_one_pass(x.size)
            batch = group_moments(x, groups, related_weights, one_pass=one_pass)
        else:
            batch = replicated_moments(seen(x, positive, 0), groups, related_weights, replicas)
        # At W = 0 there are no batch statistics: y comes by the eval formula. Chosen before the square root, so that
        # no gradient of the unused branch is multiplied by infinity.
        some = True if batch.some is None else batch.some
        if spec.renorm is not None:
            corrected = corrections(batch, state, spec, clips, groups.channel_shape)
            renorm = _where(some, corrected[0], 1), _where(some, corrected[1], 0)
        if adjustment is not None:
            adjustment = _where(some, adjustment[0], 1), _where(some, adjustment[1], 0)
        shift, rest = _where(some, batch.shift, shift), _where(some, batch.rest, 0)
        variance = _where(some, batch.variance, variance)
        if plan.update:
            state = updated(state, entering(batch, groups, related_weights), spec)
    gamma = 1.0 if state.gamma is None else _per_channel(state.gamma, plan.arithmetic, groups.channel_shape)
    beta = 0.0 if state.beta is None else _per_channel(state.beta, plan.arithmetic, groups.channel_shape)
    r, d = renorm or (1.0, 0.0)
    scale = r / jnp.sqrt(variance + spec.epsilon)
    if adjustment is None:
        offset = beta if renorm is None else d * gamma + beta
        y = scaled(x, shift, rest, scale * gamma, offset, positive, one_pass=one_pass)
    else:
        y = scaled(x, shift, rest, scale, d, positive, one_pass=one_pass)
        y = (y * adjustment[0] + adjustment[1]) * gamma + beta
    return groups.join(y), state


def _where(some: jax.Array | bool, chosen: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """`chosen` where some weight is there; `True` is known without looking, and costs nothing."""
    return chosen if some is True else jnp.where(some, chosen, otherwise)


def _moving(state: BatchNormState[Any], dtype: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The moving statistics broadcast against x; mean 0 and variance 1 where none are tracked."""
    if state.moving_mean is None or state.moving_variance is None:
        return jnp.zeros(shape, dtype), jnp.ones(shape, dtype)
    return _per_channel(state.moving_mean, dtype, shape), _per_channel(state.moving_variance, dtype, shape)


def _per_channel(values: ArrayLike, dtype: str, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(values, dtype).reshape(shape)


def _shapes_of(adjustment: tuple[ArrayLike, ArrayLike]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of an adjustment's two arrays.

    Raises:
        InputError: it is no pair, or not of real numbers.
    """
    if not isinstance(adjustment, (tuple, list)) or len(adjustment) != 2:
        raise InputError(f"adjustment must be the pair (scale, bias); got {type(adjustment).__name__}.")
    for part in adjustment:
        dtype = part.dtype if isinstance(part, (jax.Array, np.ndarray)) else np.asarray(part).dtype
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise InputError(f"an adjustment must hold real numbers; got {dtype}.")
    return jnp.shape(adjustment[0]), jnp.shape(adjustment[1])


def _widened(adjustment: tuple[ArrayLike, ArrayLike], dtype: str) -> tuple[jax.Array, jax.Array]:
    """The adjustment in the plan's arithmetic."""
    return jnp.asarray(adjustment[0], dtype), jnp.asarray(adjustment[1], dtype)
