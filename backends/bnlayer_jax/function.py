"""`batch_norm` for JAX: a pure function, differentiable to every order by JAX itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bnlayer.call import CallPlan, plan_call
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .precision import refuse_missing_float64
from .state import check_names_and_shapes
from .statistics import batch_moments, updated
from .support import MISSING
from .weights import Weights, as_array, check_values, related


def batch_norm(
    x: ArrayLike,
    state: BatchNormState[Any],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
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

    Returns:
        y, of x's shape and dtype, and the state after, whose updated statistics carry no gradient.

    Raises:
        InputError: x or the weights do not fit the spec.
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
    )
    check_names_and_shapes(state, spec)
    refuse_missing_float64(spec, given.dtype.name)  # before JAX converts x, which it would do without a word
    x = jnp.asarray(given)
    w = None
    if weights is not None:
        check_values(weights)
        if plan.count != 0:  # without a single element there is nothing to weigh
            w = related(as_array(weights), plan)
    y, state = _normalized_and_updated(x.astype(plan.arithmetic), state, spec, plan, w)
    return y.astype(x.dtype), state


def _normalized_and_updated(
    x: jax.Array, state: BatchNormState[Any], spec: BatchNormSpec, plan: CallPlan, weights: Weights | None
) -> tuple[jax.Array, BatchNormState[jax.Array]]:
    """y and the state after, for x in the plan's arithmetic."""
    # A position without weight may hold anything; what is not finite there must not reach a sum, nor may a gradient
    # of 0 be multiplied by it.
    hidden = None if weights is None else ~(weights.positive | jnp.isfinite(x))
    seen = x if hidden is None else jnp.where(hidden, 0, x)
    shift, variance = _moving(state, plan)
    rest: jax.Array | None = None
    if plan.batch_statistics and plan.count != 0:
        batch = batch_moments(seen, plan, weights)
        some = None if weights is None else weights.some
        if plan.update:
            state = updated(state, batch, spec, some)
        # At W = 0 there are no batch statistics: y comes by the eval formula. Chosen before the square root, so that
        # no gradient of the unused branch is multiplied by infinity.
        shift = batch.shift if some is None else jnp.where(some, batch.shift, shift)
        rest = batch.rest if some is None else jnp.where(some, batch.rest, 0)
        variance = batch.variance if some is None else jnp.where(some, batch.variance, variance)
    sd = jnp.sqrt(variance + spec.epsilon)
    gamma = None if state.gamma is None else _per_channel(state.gamma, plan)
    y = _scaled(_centered(seen, shift, rest), sd, gamma)
    if hidden is not None:
        # x reaches its own y there, and through the mean the others; with x hidden, its part in the gradients of the
        # scale is 0.
        stopped = None if gamma is None else jax.lax.stop_gradient(gamma)
        y = jnp.where(hidden, _scaled(_centered(x, shift, rest), jax.lax.stop_gradient(sd), stopped), y)
    if state.beta is not None:
        y = y + _per_channel(state.beta, plan)
    return y, state


def _centered(x: jax.Array, shift: jax.Array, rest: jax.Array | None) -> jax.Array:
    return x - shift if rest is None else (x - shift) - rest


def _scaled(centered: jax.Array, sd: jax.Array, gamma: jax.Array | None) -> jax.Array:
    xhat = centered / sd
    return xhat if gamma is None else xhat * gamma


def _moving(state: BatchNormState[Any], plan: CallPlan) -> tuple[jax.Array, jax.Array]:
    """The moving statistics broadcast against x; mean 0 and variance 1 where none are tracked."""
    if state.moving_mean is None or state.moving_variance is None:
        return jnp.zeros(plan.channel_shape, plan.arithmetic), jnp.ones(plan.channel_shape, plan.arithmetic)
    return _per_channel(state.moving_mean, plan), _per_channel(state.moving_variance, plan)


def _per_channel(values: ArrayLike, plan: CallPlan) -> jax.Array:
    return jnp.asarray(values, plan.arithmetic).reshape(plan.channel_shape)
