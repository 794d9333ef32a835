"""Batch statistics, in JAX: of each group of rows, and of all groups together."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .ghosts import Groups
from .weights import Weights


@dataclass(frozen=True, eq=False)
class Moments:
    """The statistics of each group, in x's arithmetic; they broadcast against a split x.

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


@dataclass(frozen=True, eq=False)
class Entering:
    """What one batch brings to the moving statistics, each of shape (num_features,); carries no gradient.

    Attributes:
        mean: the mean of the groups' means, weighted by their W.
        variance: that of their biased variances.
        unbiased: that of their unbiased ones.
        some: False where no group has weight, and nothing enters; None: it certainly enters.
    """

    mean: jax.Array
    variance: jax.Array
    unbiased: jax.Array
    some: jax.Array | None


def group_moments(x: jax.Array, groups: Groups, weights: Weights | None) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over each group's positions of a channel.

    The shift does not change what m and v are, only how they round, so stopping its gradient leaves every derivative
    exact, and keeps a constant channel's variance at 0.

    Args:
        x: in the plan's arithmetic, split, at least one element a channel, finite wherever the weight is 0.
        groups: of the call.
        weights: of the call, or None.
    """

    def mean(values: jax.Array) -> jax.Array:
        total = jnp.sum(values, axis=groups.reduced, keepdims=True)
        return total / groups.counts if weights is None else total

    def weighted(values: jax.Array) -> jax.Array:
        if weights is not None:
            return values * weights.proportions
        return values if groups.present is None else jnp.where(groups.present, values, 0)

    shift = jax.lax.stop_gradient(mean(weighted(x)))
    shifted = x - shift
    rest = mean(weighted(shifted))
    deviation = shifted - rest
    # Weighted before it is squared: under a mask the square may overflow, and 0 times that is NaN.
    variance = mean(weighted(deviation) * deviation)
    biased = jax.lax.stop_gradient(variance)
    if weights is None:
        single = groups.counts == 1
        unbiased = jnp.where(single, 0, biased * (groups.counts / np.where(single, 1, groups.counts - 1)))
    else:
        alone = weights.spread_out == 0
        unbiased = jnp.where(alone, 0, biased / jnp.where(alone, 1, weights.spread_out))
    return Moments(shift, rest, variance, unbiased)


def entering(batch: Moments, groups: Groups, weights: Weights | None) -> Entering:
    """All groups' statistics as one: sum(W_g m_g)/sum(W_g), and so on."""
    shares = groups.counts / groups.counts.sum() if weights is None else weights.shares

    def pooled(values: jax.Array) -> jax.Array:
        values = jax.lax.stop_gradient(values)
        if groups.axis is not None:
            values = jnp.sum(values * shares, axis=groups.axis)
        return values.reshape(-1)

    return Entering(
        mean=pooled(batch.shift + batch.rest),
        variance=pooled(batch.variance),
        unbiased=pooled(batch.unbiased),
        some=None if weights is None else jnp.any(weights.some),
    )
