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


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one call, in the plan's arithmetic.

    Attributes:
        positive: where the weight is above 0, in the plan's `weights_shape`.
        proportions: w/W, so that they sum to 1 over all positions of a channel; all 0 where W is 0; differentiable.
        some: whether W is above 0, a scalar.
        spread_out: 1 - Q/W^2, that is 1 - 1/n; exactly 0 where a single position has weight, and where W is 0.
    """

    positive: jax.Array
    proportions: jax.Array
    some: jax.Array
    spread_out: jax.Array


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


def related(weights: jax.Array, plan: CallPlan) -> Weights:
    """The weights in relation to their total. Negative or non-finite ones, seen only under a trace, make all NaN."""
    assert plan.weights_shape is not None
    assert plan.count is not None
    arithmetic = jnp.dtype(plan.arithmetic)
    values = weights.reshape([int(length or 0) for length in plan.weights_shape])
    # float64 weights of a float32 x keep their range until they are proportions.
    values = values.astype(jnp.promote_types(values.dtype, arithmetic) if _is_float(values) else arithmetic)
    values = jnp.where(jnp.all((values >= 0) & (values < jnp.inf)), values, jnp.nan)
    spread = plan.count // values.size  # positions of x that one weight stands for
    largest = jax.lax.stop_gradient(jnp.max(values))
    some = ~(largest <= 0)  # NaN counts as some, so that it reaches the statistics
    # Relative to the largest, neither the total nor the squares can overflow or vanish; the ratio w/W does not
    # depend on it, so it needs no gradient.
    relative = _quotient(values, jnp.where(some, largest, 1))
    proportions = _quotient(relative, jnp.where(some, jnp.sum(relative) * spread, 1))
    return Weights(
        positive=values > 0,
        proportions=proportions.astype(arithmetic),
        some=some,
        spread_out=_spread_out(jax.lax.stop_gradient(relative), spread).astype(arithmetic),
    )


def _quotient(values: jax.Array, scalar: jax.Array) -> jax.Array:
    """values / scalar, correctly rounded, so that a / a is 1 for every a.

    XLA multiplies by the reciprocal where it sees one divisor for all: of 1e38 that is 0, and of others it makes a / a
    differ from 1. The barrier hides that the divisors are one; it passes gradients of every order.
    """
    divisors: jax.Array = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
        jnp.broadcast_to(scalar, values.shape)
    )
    return values / divisors


def _spread_out(relative: jax.Array, spread: int) -> jax.Array:
    """1 - Q/W^2 for weights whose largest is 1.

    With one largest weight set aside, W = 1 + R and W^2 - Q = 2 R + R^2 - Q_R, whose terms do not cancel: 1 - Q/W^2
    itself would round to 0 under one dominant weight, and the unbiased variance to infinity.
    """
    flat = relative.reshape(-1)
    others = flat.at[jnp.argmax(flat)].set(0)
    rest = jnp.sum(others) * spread + (spread - 1)
    squares = jnp.sum(jnp.square(others)) * spread + (spread - 1)
    return (2 * rest + (jnp.square(rest) - squares)) / jnp.square(1 + rest)


def _is_float(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
