"""Batch statistics and the moving average, in JAX."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bnlayer.call import CallPlan
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .state import counter_of
from .weights import Weights


@dataclass(frozen=True, eq=False)
class Moments:
    """One batch's statistics, in the plan's arithmetic and `channel_shape`.

    Attributes:
        shift: the mean, up to its rounding; carries no gradient.
        rest: what `shift` missed: the mean is `shift + rest`, and x - mean is most accurate as (x - shift) - rest.
        variance: biased.
        unbiased: with Bessel's correction; 0 where a single value has weight; carries no gradient.
    """

    shift: jax.Array
    rest: jax.Array
    variance: jax.Array
    unbiased: jax.Array


def batch_moments(x: jax.Array, plan: CallPlan, weights: Weights | None) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over all axes but the channel's.

    The shift does not change what m and v are, only how they round, so stopping its gradient leaves every derivative
    exact, and keeps a constant channel's variance at 0.

    Args:
        x: in the plan's arithmetic, at least one element a channel, finite wherever the weight is 0.
        plan: of the call.
        weights: of the call, or None.
    """
    count = plan.count
    assert count is not None

    def mean(values: jax.Array) -> jax.Array:
        total = jnp.sum(values, axis=plan.reduced, keepdims=True)
        return total / count if weights is None else total

    def weighted(values: jax.Array) -> jax.Array:
        return values if weights is None else values * weights.proportions

    shift = jax.lax.stop_gradient(mean(weighted(x)))
    shifted = x - shift
    rest = mean(weighted(shifted))
    deviation = shifted - rest
    # Weighted before it is squared: under a mask the square may overflow, and 0 times that is NaN.
    variance = mean(weighted(deviation) * deviation)
    biased = jax.lax.stop_gradient(variance)
    if weights is None:
        unbiased = biased * (count / (count - 1)) if count > 1 else jnp.zeros_like(biased)
    else:
        single = weights.spread_out == 0
        unbiased = jnp.where(single, 0, biased / jnp.where(single, 1, weights.spread_out))
    return Moments(shift, rest, variance, unbiased)


def updated(
    state: BatchNormState[jax.Array], batch: Moments, spec: BatchNormSpec, some: jax.Array | None
) -> BatchNormState[jax.Array]:
    """The state after one batch's statistics entered it: d s + (1-d) batch.

    Args:
        state: with moving statistics; a numpy array in it becomes JAX's.
        batch: what enters; no gradient passes through.
        spec: of the layer.
        some: a boolean scalar: False leaves the state as it was; None: it certainly enters.
    """
    assert state.moving_mean is not None
    assert state.moving_variance is not None
    counter = counter_of(state)
    t = counter + 1
    stored = jnp.dtype(spec.stats_dtype)
    arithmetic = jnp.promote_types(stored, batch.variance.dtype)
    # 1/t is the accurate one of the two: 1 - (1 - 1/t) would lose its digits.
    new: jax.Array | float = 1 / t.astype(arithmetic) if spec.decay == "cumulative" else 1.0 - float(spec.decay)
    old: jax.Array | float = 1 - new if spec.decay == "cumulative" else float(spec.decay)
    mean = jax.lax.stop_gradient(batch.shift + batch.rest)
    enters = jnp.ones(spec.num_features, bool) if some is None else jnp.broadcast_to(some, (spec.num_features,))
    if spec.nonfinite == "keep":
        # The mean and the biased variance decide: the unbiased variance is derived from them.
        enters &= (jnp.isfinite(mean) & jnp.isfinite(batch.variance)).reshape(-1)

    def average(before: jax.Array, entering: jax.Array) -> jax.Array:
        moved = old * jnp.asarray(before, arithmetic) + new * entering.reshape(-1).astype(arithmetic)
        return jax.lax.stop_gradient(jnp.where(enters, moved.astype(stored), jnp.asarray(before, stored)))

    return state.replace(
        moving_mean=average(state.moving_mean, mean),
        moving_variance=average(
            state.moving_variance,
            batch.unbiased if spec.moving_variance_estimator == "unbiased" else jax.lax.stop_gradient(batch.variance),
        ),
        num_updates=t if some is None else jnp.where(some, t, counter),
    )
