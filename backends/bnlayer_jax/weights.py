"""Example weights and masks, in JAX: checked, and as proportions of their total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bnlayer.call import CallPlan
from bnlayer.errors import InputError

from .ghosts import Groups
from .replicas import Replicas


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of one call, in the plan's arithmetic, split by group; each attribute broadcasts against a split x.

    Attributes:
        positive: where the weight is above 0.
        relative: w relative to its group's largest (of all replicas); differentiable.
        total: W, the sum of `relative` over a group's positions of a channel (on this replica); differentiable.
        proportions: w/W, so that they sum to 1; all 0 where W is 0; differentiable.
        spread: what 1 - Q/W^2 is made of; carries no gradient.
        shares: each group's part in the total weight of all; carries no gradient.
    """

    positive: jax.Array
    relative: jax.Array
    total: jax.Array
    proportions: jax.Array
    spread: Spread
    shares: jax.Array


class Spread(NamedTuple):
    """The weights of each group relative to the largest, one of these set aside on each replica that has it.

    The parts of several replicas add up to those of all.

    Attributes:
        tops: how many were set aside, 1 or 0.
        rest: the sum of the others.
        squares: the sum of their squares.
    """

    tops: jax.Array
    rest: jax.Array
    squares: jax.Array

    def out(self) -> jax.Array:
        """1 - Q/W^2, that is 1 - 1/n; exactly 0 where a single position has weight, and where W is 0.

        With T tops, W = T + R and W^2 - Q = T (T - 1) + 2 T R + R^2 - Q_R, whose terms do not cancel: 1 - Q/W^2 itself
        would round to 0 under one dominant weight, and the unbiased variance to infinity.
        """
        tops, rest = self.tops, self.rest
        apart = tops * (tops - 1) + (2 * tops * rest + (jnp.square(rest) - self.squares))
        total = tops + rest
        return apart / jnp.where(total == 0, 1, jnp.square(total))


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


def unwrapping(weights: Any) -> Any:
    """The weights, numpy's integers as floats: JAX would wrap what does not fit its own."""
    if isinstance(weights, np.ndarray) and weights.dtype.kind in "iu":
        return weights.astype(np.float64)
    return weights


def related(weights: jax.Array, plan: CallPlan, groups: Groups, replicas: Replicas | None) -> Weights:
    """The weights in relation to their group's total. Negative or non-finite ones, seen only under a trace, make every
    group NaN, on every replica."""
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
    if replicas is not None and weights.dtype != jnp.bool_:  # where a mask has a largest, it is 1
        largest = replicas.largest(largest)
    # Relative to the largest, neither the total nor the squares can overflow or vanish; the ratio w/W does not
    # depend on it, so it needs no gradient.
    relative = _quotient(values, jnp.where(largest == 0, 1, largest))
    total = _over(jnp.sum, relative, groups) * spread
    proportions = _quotient(relative, jnp.where(total == 0, 1, total))
    return Weights(
        positive=values > 0,
        relative=relative.astype(arithmetic),
        total=total.astype(arithmetic),
        proportions=proportions.astype(arithmetic),
        spread=Spread(*(p.astype(arithmetic) for p in _spread_of(jax.lax.stop_gradient(relative), spread, groups))),
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


def _spread_of(relative: jax.Array, spread: int, groups: Groups) -> Spread:
    """The parts of 1 - Q/W^2, for weights relative to their group's largest, each standing for `spread` positions."""
    flat = relative.reshape(1, -1)
    if groups.axis is not None:
        flat = jnp.moveaxis(relative, groups.axis, 0).reshape(relative.shape[groups.axis], -1)
    row, top = jnp.arange(len(flat)), jnp.argmax(flat, axis=1)
    tops = (flat[row, top] == 1).astype(flat.dtype)
    others = flat.at[row, top].multiply(1 - tops)
    again = tops * (spread - 1)  # the positions that share the weight that was set aside
    parts = tops, jnp.sum(others, axis=1) * spread + again, jnp.sum(jnp.square(others), axis=1) * spread + again
    return Spread(*(part.reshape(groups.counts.shape) for part in parts))


def _is_float(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
