"""Example weights and masks, in JAX: checked, and as proportions of their total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bnlayer.call import CallPlan
from bnlayer.errors import InputError

from .ghosts import Groups


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one call, in the plan's arithmetic, split by group; each attribute broadcasts against a split x.

    Attributes:
        positive: where the weight is above 0.
        proportions: w/W, so that they sum to 1 over a group's positions of a channel; all 0 where its W is 0;
            differentiable.
        some: whether a group's W is above 0.
        spread_out: a group's 1 - Q/W^2, that is 1 - 1/n; exactly 0 where a single position has weight, and where W
            is 0.
        shares: each group's part in the total weight of all; carries no gradient.
    """

    positive: jax.Array
    proportions: jax.Array
    some: jax.Array
    spread_out: jax.Array
    shares: jax.Array


def check_values(weights: Any) -> None:
    """Check the weights' dtype, and their values where they can be looked at: not under a trace.

    Raises:
        InputError: a weight is negative, not finite, or not a real number.
    """
    dtype = weights.dtype if hasattr(weights, "dtype") else np.asarray(weights).dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_):
        raise InputError(f"weights must be real or boolean; got {dtype}.")
    if isinstance(weights, Tracer):
        return
    values = np.asarray(weights)
    # What JAX will hold: without x64 a large float64 would become infinite on the way.
    held = jax.dtypes.canonicalize_dtype(dtype)
    limit = float(jnp.finfo(held).max) if jnp.issubdtype(held, jnp.floating) else np.inf  # type: ignore[no-untyped-call]
    wrong = ~((values >= 0) & (values <= limit))
    if bool(wrong.any()):
        raise InputError(f"weights must be not negative and finite in {held}; got {values[wrong][0]}.")


def as_array(weights: Any) -> jax.Array:
    """The weights as an array that JAX's integers cannot wrap: numpy's int64 counts become floats."""
    if isinstance(weights, np.ndarray) and weights.dtype.kind in "iu":
        weights = weights.astype(np.float64)
    return jnp.asarray(weights)


def related(weights: jax.Array, plan: CallPlan, groups: Groups) -> Weights:
    """The weights in relation to their group's total. Negative or non-finite ones, seen only under a trace, make every
    group NaN."""
    assert plan.weights_shape is not None
    assert plan.count is not None
    arithmetic = jnp.dtype(plan.arithmetic)
    values = weights.reshape([int(length or 0) for length in plan.weights_shape])
    # float64 weights of a float32 x keep their range until they are proportions.
    values = values.astype(jnp.promote_types(values.dtype, arithmetic) if _is_float(values) else arithmetic)
    values = jnp.where(jnp.all((values >= 0) & (values < jnp.inf)), values, jnp.nan)
    if groups.axis is not None:
        values = jnp.broadcast_to(values, (groups.rows, *values.shape[1:]))
    spread = plan.count // values.size  # positions of x that one weight stands for
    values = groups.split(values)
    if groups.present is not None:
        values = jnp.where(groups.present, values, 0)
    largest = jax.lax.stop_gradient(_over(jnp.max, values, groups))
    some = ~(largest <= 0)  # NaN counts as some, so that it reaches the statistics
    # Relative to the largest, neither the total nor the squares can overflow or vanish; the ratio w/W does not
    # depend on it, so it needs no gradient.
    relative = _quotient(values, jnp.where(some, largest, 1))
    total = _over(jnp.sum, relative, groups) * spread
    proportions = _quotient(relative, jnp.where(some, total, 1))
    return Weights(
        positive=values > 0,
        proportions=proportions.astype(arithmetic),
        some=some,
        spread_out=_spread_out(jax.lax.stop_gradient(relative), spread, groups).astype(arithmetic),
        shares=_shares(largest, jax.lax.stop_gradient(total)).astype(arithmetic),
    )


def _over(reduction: Any, values: jax.Array, groups: Groups) -> jax.Array:
    """`reduction` of each group's values."""
    reduced: jax.Array = reduction(values, axis=groups.reduced, keepdims=True)
    return reduced


def _quotient(values: jax.Array, scalar: jax.Array) -> jax.Array:
    """values / scalar, correctly rounded, so that a / a is 1 for every a.

    XLA multiplies by the reciprocal where it sees one divisor for all: of 1e38 that is 0, and of others it makes a / a
    differ from 1. The barrier hides that the divisors are one; it passes gradients of every order.
    """
    divisors: jax.Array = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
        jnp.broadcast_to(scalar, values.shape)
    )
    return values / divisors


def _shares(largest: jax.Array, total: jax.Array) -> jax.Array:
    """W_g / sum(W), from each group's largest weight and its W relative to that; all 0 where there is no weight."""
    top = jnp.max(largest)
    scaled = _quotient(largest, jnp.where(top > 0, top, 1)) * total
    everything = jnp.sum(scaled)
    return _quotient(scaled, jnp.where(everything == 0, 1, everything))


def _spread_out(relative: jax.Array, spread: int, groups: Groups) -> jax.Array:
    """1 - Q/W^2 of each group, for weights whose largest is 1.

    With one largest weight set aside, W = 1 + R and W^2 - Q = 2 R + R^2 - Q_R, whose terms do not cancel: 1 - Q/W^2
    itself would round to 0 under one dominant weight, and the unbiased variance to infinity.
    """
    flat = relative.reshape(1, -1)
    if groups.axis is not None:
        flat = jnp.moveaxis(relative, groups.axis, 0).reshape(relative.shape[groups.axis], -1)
    others = flat.at[jnp.arange(len(flat)), jnp.argmax(flat, axis=1)].set(0)
    rest = jnp.sum(others, axis=1) * spread + (spread - 1)
    squares = jnp.sum(jnp.square(others), axis=1) * spread + (spread - 1)
    apart = (2 * rest + (jnp.square(rest) - squares)) / jnp.square(1 + rest)
    return apart.reshape(groups.counts.shape)


def _is_float(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
