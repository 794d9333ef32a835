"""Mean and variance of a batch, and y from them: both with derivatives of their own, right to every order.

They are `custom_jvp`s: each derivative is written down, in a form that is linear in the tangents, and JAX transposes it
into the backward pass and differentiates it again. What that spares is memory traffic, which these calls wait for. XLA
sums an array, or the product of two, as fast as it can read them; anything else, a centered x for instance, it writes
to memory before it sums it. So in one pass ("one-pass" of `paths`) the sums are those of x, x^2, dy and dy x, and the
rest is arithmetic on channels: the forward pass reads x three times and writes y, the backward pass reads dy three
times and x twice, and writes dx.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Triple = tuple[jax.Array, jax.Array, jax.Array]


def dominance(count: float) -> float:
    """The largest m^2/v up to which mean(x^2) - m^2 is as accurate as the variance of so many elements has to be.

    With u the unit roundoff, and sums that are off by s u, relative to the sum of magnitudes: mean(x^2) is off by
    (1 + s) u (v + m^2), m^2 by 2 s u |m| sqrt(v + m^2) and 1 u m^2 more, and their difference, with k = m^2/v, by at
    most u v ((1 + s)(1 + k) + 2 s (k + 1/2) + k). XLA adds in blocks: s is 2 to 3, measured on up to a million
    elements. That makes 8 k + 5 for s = 2, and the variance may be off by 8 + sqrt(count), in units of u v.

    Capped at 16, a mean of four standard deviations: further out more digits are lost than are worth the time.
    """
    return min(16.0, math.sqrt(count) / 8)


def moments(
    x: jax.Array,
    reduced: tuple[int, ...],
    counts: Any,
    proportions: jax.Array | None,
    positive: jax.Array | None,
    *,
    one_pass: bool,
) -> Triple:
    """shift, rest and variance: the mean is shift + rest, x - mean is most accurate as (x - shift) - rest, and the
    variance is biased. shift carries no gradient.

    Args:
        x: in the arithmetic's dtype, split by group, at least one element a channel; anything where the weight is 0.
        reduced: the axes of the sums.
        counts: elements per channel of each group; broadcasts against x.
        proportions: w/W, of which each group's sum to 1, or are all 0; None: all 1/counts.
        positive: where the weight is above 0; None: everywhere.
        one_pass: sums of x and x^2 first, and more only where some channel's mean dominates its standard deviation;
            where none does, shift is 0. False: always centered.
    """
    dominant = dominance(float(counts.min())) if one_pass else None
    found: Triple = _moments(reduced, dominant, x, counts, proportions, positive)
    return found


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@partial(jax.jit, static_argnums=(0, 1), inline=True)  # so that outside of jit, too, `cond` is compiled once
def _moments(
    reduced: tuple[int, ...],
    dominant: float | None,
    x: jax.Array,
    counts: Any,
    proportions: jax.Array | None,
    positive: jax.Array | None,
) -> Triple:
    mean = partial(_mean, reduced, counts, proportions)

    def centered() -> Triple:
        finite = seen(x, positive, 0)
        shift = mean(finite)
        shifted = finite - shift
        rest = mean(shifted)
        deviation = shifted - rest
        return shift, rest, mean(deviation, deviation)

    if dominant is None:
        return centered()
    first = mean(x)
    variance = mean(x, x) - jnp.square(first)
    # NaN, too, is not in order: it may come of what lies under a weight of 0.
    in_order = jnp.all(jnp.square(first) <= dominant * variance)
    found: Triple = jax.lax.cond(in_order, lambda: (jnp.zeros_like(first), first, variance), centered)
    return found


@partial(_moments.defjvp, symbolic_zeros=True)
def _moments_jvp(
    reduced: tuple[int, ...], dominant: float | None, primals: Any, tangents: Any
) -> tuple[Triple, Triple]:
    """m' = sum(p x' + p' (x - m)) and v' = sum(2 p (x - m) x' + p' (x - m)^2), since the p' sum to 0.

    The shift does not change what m and v are, only how they round.
    """
    x, counts, proportions, positive = primals
    dx, _, dproportions, _ = tangents
    shift, rest, variance = _moments(reduced, dominant, *primals)
    deviation = (seen(x, positive, shift + rest) - shift) - rest
    drest, dvariance = jnp.zeros_like(rest), jnp.zeros_like(variance)
    if not isinstance(dx, SymbolicZero):
        drest += _mean(reduced, counts, proportions, dx)
        dvariance += 2 * _mean(reduced, counts, proportions, deviation, dx)
    if dproportions is not None and not isinstance(dproportions, SymbolicZero):
        weighted = dproportions * deviation
        drest += jnp.sum(weighted, axis=reduced, keepdims=True)
        dvariance += jnp.sum(weighted * deviation, axis=reduced, keepdims=True)
    return (shift, rest, variance), (jnp.zeros_like(shift), drest, dvariance)


def _mean(reduced: tuple[int, ...], counts: Any, proportions: jax.Array | None, *factors: jax.Array) -> jax.Array:
    """The weighted mean of one array, or of the product of two.

    Weighted before they are multiplied: under a mask the product may overflow, and 0 times that is NaN.
    """
    first, *others = factors
    product = first if proportions is None else first * proportions
    for other in others:
        product = product * other
    total = jnp.sum(product, axis=reduced, keepdims=True)
    return total / counts if proportions is None else total


def seen(x: jax.Array, positive: jax.Array | None, otherwise: jax.Array | float) -> jax.Array:
    """x, and `otherwise` where it is not finite and has no weight: such a value must not reach a sum, nor may a
    gradient of 0 be multiplied by it."""
    return x if positive is None else jnp.where(positive | jnp.isfinite(x), x, otherwise)


def scaled(
    x: jax.Array,
    shift: jax.Array,
    rest: jax.Array,
    scale: jax.Array,
    offset: jax.Array | float,
    positive: jax.Array | None,
    *,
    one_pass: bool,
) -> jax.Array:
    """((x - shift) - rest) scale + offset.

    A position of weight 0 whose x is not finite counts as the mean in the gradient of `scale`; its y and dx are what
    the formula says.

    Args:
        x: split by group.
        shift, rest, scale, offset: per channel (and group); they broadcast against x.
        positive: as of `moments`.
        one_pass: the gradient of `scale` is sum(dy x) - m sum(dy), in place of sum(dy (x - m)). Under a large mean it
            is then that of an x moved by its own rounding, as good as x is.
    """
    return _scaled(one_pass, x, shift, rest, scale, jnp.broadcast_to(offset, scale.shape).astype(x.dtype), positive)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scaled(
    one_pass: bool,
    x: jax.Array,
    shift: jax.Array,
    rest: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    positive: jax.Array | None,
) -> jax.Array:
    return ((x - shift) - rest) * scale + offset


@partial(_scaled.defjvp, symbolic_zeros=True)
def _scaled_jvp(one_pass: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, shift, rest, scale, _, positive = primals
    dx, dshift, drest, dscale, doffset, _ = tangents
    # Collected per channel first, so that the backward pass sums dy, and dy x, and not what they are multiplied by.
    change = jnp.zeros_like(shift + scale)
    if not isinstance(doffset, SymbolicZero):
        change += doffset
    for moved in (dshift, drest):
        if not isinstance(moved, SymbolicZero):
            change -= scale * moved
    dy = jnp.zeros_like(x) if isinstance(dx, SymbolicZero) else scale * dx
    if not isinstance(dscale, SymbolicZero):
        mean = shift + rest
        finite = seen(x, positive, mean)
        if one_pass:
            change -= mean * dscale
            dy += finite * dscale
        else:
            dy += ((finite - shift) - rest) * dscale
    return _scaled(one_pass, *primals), dy + change
