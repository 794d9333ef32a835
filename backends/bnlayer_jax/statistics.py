"""Batch statistics, in JAX: of each group of rows, of all replicas, and of all groups together."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .ghosts import Groups, NDArray
from .normalization import moments
from .replicas import Replicas
from .weights import Spread, Weights


@dataclass(frozen=True, eq=False)
class Moments:
    """The statistics of each group, in x's arithmetic; they broadcast against a split x.

    Attributes:
        shift: the mean, up to its rounding; carries no gradient.
        rest: what `shift` missed: the mean is `shift + rest`, and x - mean is most accurate as (x - shift) - rest.
        variance: biased.
        unbiased: with Bessel's correction; 0 where a single value has weight; carries no gradient.
        some: whether a group has weight; None: it certainly has.
    """

    shift: jax.Array
    rest: jax.Array
    variance: jax.Array
    unbiased: jax.Array
    some: jax.Array | None


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


def group_moments(x: jax.Array, groups: Groups, weights: Weights | None, *, one_pass: bool) -> Moments:
    """m = sum(w x)/W, v = sum(w (x-m)^2)/W and u = v/(1 - Q/W^2) over each group's positions of a channel.

    Args:
        x: in the plan's arithmetic, split, at least one element a channel; anything where the weight is 0.
        groups: of the call.
        weights: of the call, or None.
        one_pass: see `normalization.moments`.
    """
    if weights is not None:
        found = moments(x, groups.reduced, groups.counts, weights.proportions, weights.positive, one_pass=one_pass)
        unbiased = _unbiased(found[2], weights.spread.out())
        return Moments(*found, unbiased, ~(weights.total == 0))  # NaN counts, so that it gets about
    # A repeated row has no part in its group.
    shares = None if groups.present is None else jnp.where(groups.present, 1 / groups.counts, 0)
    found = moments(x, groups.reduced, groups.counts, shares, None, one_pass=one_pass)
    return Moments(*found, _bessel(found[2], groups.counts), None)


def replicated_moments(x: jax.Array, groups: Groups, weights: Weights | None, replicas: Replicas) -> Moments:
    """The statistics of all replicas together, by two all-reduces.

    With the mean of all as the shift s, c = sum(w (x-s))/W is what its rounding left, m = s + c, and
    v = sum(w (x-s)^2)/W - c^2: nothing cancels but where the variance is 0. This is sum(W_k (v_k + (m_k-m)^2))/W over
    the replicas' own W_k, m_k and v_k, without a division by a W_k that may be 0: the weights of a replica on which all
    are 0 have a gradient too. All that has one is in the second all-reduce, so there is one in the backward pass.

    Args:
        x, weights: as above, of this replica.
        groups: of the call; the batch is the one group.
        replicas: with whom.
    """

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(values, axis=groups.reduced, keepdims=True)

    def weighted(values: jax.Array) -> jax.Array:
        return values if weights is None else values * weights.relative

    def mean(sums: jax.Array, everything: list[jax.Array]) -> jax.Array:
        if weights is None:
            return sums / counts
        (w,) = everything
        return sums / jnp.where(w == 0, 1, w)

    stopped, counts = jax.lax.stop_gradient, groups.counts * replicas.number
    own = () if weights is None else (weights.total,)
    spread = () if weights is None else weights.spread

    sums, *others = replicas.sums(stopped(total(weighted(x))), *stopped(own), *spread)
    shift = mean(sums, others[: len(own)])
    shifted = x - shift
    sums, squares, *everything = replicas.sums(total(weighted(shifted)), total(weighted(shifted) * shifted), *own)
    rest = mean(sums, everything)
    variance = mean(squares, everything) - jnp.square(rest)
    variance += stopped(jnp.maximum(-variance, 0))  # rounding; the derivatives stay those of the formula
    if weights is None:
        return Moments(shift, rest, variance, _bessel(variance, counts), None)
    unbiased = _unbiased(variance, Spread(*others[1:]).out())
    return Moments(shift, rest, variance, unbiased, ~(everything[0] == 0))


def _bessel(variance: jax.Array, counts: NDArray) -> jax.Array:
    """v n/(n - 1), and 0 where n is 1."""
    single = counts == 1
    factor = counts / np.where(single, 1, counts - 1)
    return jnp.where(single, 0, jax.lax.stop_gradient(variance) * factor)


def _unbiased(variance: jax.Array, spread_out: jax.Array) -> jax.Array:
    """v/(1 - Q/W^2), and 0 where a single value has weight."""
    alone = spread_out == 0
    return jnp.where(alone, 0, jax.lax.stop_gradient(variance) / jnp.where(alone, 1, spread_out))


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
        some=None if batch.some is None else jnp.any(batch.some),
    )
