"""`batch_norm` for JAX: a pure function, differentiable to every order by JAX itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bnlayer.call import CallPlan, RenormClips, plan_call
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .averages import updated
from .ghosts import groups_of
from .precision import refuse_missing_float64
from .renorm import corrections, read_clips
from .state import check_names_and_shapes
from .statistics import entering, group_moments
from .support import MISSING
from .weights import as_array, check_values, related


class Scales(NamedTuple):
    """What turns centered values into y, but for beta: gamma (((x - m)/sd r + d) scale + bias); None: not there."""

    sd: jax.Array
    renorm: tuple[jax.Array, jax.Array] | None
    adjustment: tuple[jax.Array, jax.Array] | None
    gamma: jax.Array | None


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
) -> tuple[jax.Array, BatchNormState[jax.Array]]:
    """Normalize x and update the moving statistics.

    Works under jit, grad, jvp, hessian, vmap, scan and remat; `spec`, `training` and `update_stats` are static. There
    is no custom derivative rule: what the formulas say is what JAX differentiates, to every order.

    Args:
        x: float array of rank 2 or more, `spec.num_features` long on `spec.axis`. float64 needs x64.
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

    Returns:
        y, of x's shape and dtype, and the state after, whose updated statistics carry no gradient.

    Raises:
        InputError: x, the weights, the adjustment or the clips do not fit the spec.
        StateError: the state does not fit the spec.
        UnsupportedError: the spec asks for what this backend lacks, or for float64 without x64.
    """
    MISSING.refuse("jax", spec)
    given = x if isinstance(x, (jax.Array, np.ndarray)) else jnp.asarray(x)
    plan = plan_call(
        spec,
        given.shape,
        given.dtype.name,
        training=training,
        update_stats=update_stats,
        weights_shape=None if weights is None else jnp.shape(weights),
        adjustment_shapes=None if adjustment is None else _shapes_of(adjustment),
    )
    clips = read_clips(spec, renorm_clips)
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
        weights=None if weights is None else as_array(weights),
        adjustment=None if adjustment is None or not training else _widened(adjustment, plan.arithmetic),
        clips=clips,
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
) -> tuple[jax.Array, BatchNormState[jax.Array]]:
    """y and the state after, for x and the adjustment in the plan's arithmetic."""
    groups = groups_of(spec, plan, len(x))
    related_weights = None if weights is None else related(weights, plan, groups)
    x = groups.split(x)
    # A position without weight may hold anything; what is not finite there must not reach a sum, nor may a gradient
    # of 0 be multiplied by it.
    hidden = None if related_weights is None else ~(related_weights.positive | jnp.isfinite(x))
    seen = x if hidden is None else jnp.where(hidden, 0, x)
    shift, variance = _moving(state, plan.arithmetic, groups.channel_shape)
    rest: jax.Array | None = None
    renorm: tuple[jax.Array, jax.Array] | None = None
    if plan.batch_statistics and plan.count != 0:
        batch = group_moments(seen, groups, related_weights)
        # At W = 0 there are no batch statistics: y comes by the eval formula. Chosen before the square root, so that
        # no gradient of the unused branch is multiplied by infinity.
        some = True if related_weights is None else related_weights.some
        if spec.renorm is not None:
            r, d = corrections(batch, state, spec, clips, groups.channel_shape)
            renorm = _where(some, r, 1), _where(some, d, 0)
        if adjustment is not None:
            adjustment = _where(some, adjustment[0], 1), _where(some, adjustment[1], 0)
        shift, rest = _where(some, batch.shift, shift), _where(some, batch.rest, 0)
        variance = _where(some, batch.variance, variance)
        if plan.update:
            state = updated(state, entering(batch, groups, related_weights), spec)
    gamma = None if state.gamma is None else _per_channel(state.gamma, plan.arithmetic, groups.channel_shape)
    scales = Scales(jnp.sqrt(variance + spec.epsilon), renorm, adjustment, gamma)
    centered = _centered(seen, shift, rest)
    if hidden is None:
        y = _scaled(centered, scales)
    else:
        # x reaches its own y there, and through the mean the others; in the gradients of the scales its xhat is 0.
        y = _scaled(jnp.where(hidden, 0, centered), scales)
        reached = _scaled(_centered(x, shift, rest), jax.lax.stop_gradient(scales))
        y = jnp.where(hidden, reached + (y - jax.lax.stop_gradient(y)), y)
    if state.beta is not None:
        y = y + _per_channel(state.beta, plan.arithmetic, groups.channel_shape)
    return groups.join(y), state


def _where(some: jax.Array | bool, chosen: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """`chosen` where some weight is there; `True` is known without looking, and costs nothing."""
    return chosen if some is True else jnp.where(some, chosen, otherwise)


def _centered(x: jax.Array, shift: jax.Array, rest: jax.Array | None) -> jax.Array:
    return x - shift if rest is None else (x - shift) - rest


def _scaled(centered: jax.Array, scales: Scales) -> jax.Array:
    y = centered / scales.sd
    for pair in (scales.renorm, scales.adjustment):
        if pair is not None:
            y = y * pair[0] + pair[1]
    return y if scales.gamma is None else y * scales.gamma


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
