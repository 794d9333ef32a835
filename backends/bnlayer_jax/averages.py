"""The moving averages, in JAX: plain, cumulative, zero-debiased, and those of batch renormalization."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .state import counter_of
from .statistics import Entering

Average = Callable[[str, jax.Array], jax.Array]  # a state array's name and what enters it: its new value


def updated(state: BatchNormState[jax.Array], batch: Entering, spec: BatchNormSpec) -> BatchNormState[jax.Array]:
    """The state after one batch's statistics entered it; no gradient passes through.

    Args:
        state: with moving statistics; a numpy array in it becomes JAX's.
        batch: what enters.
        spec: of the layer.
    """
    counter = counter_of(state)
    t = counter + 1
    stored = jnp.dtype(spec.stats_dtype)
    arithmetic = jnp.promote_types(stored, batch.variance.dtype)
    steps = t.astype(arithmetic)
    # 1/t is the accurate one of the two: 1 - (1 - 1/t) would lose its digits.
    new: jax.Array | float = 1 / steps if spec.decay == "cumulative" else 1.0 - float(spec.decay)
    old: jax.Array | float = 1 - new if spec.decay == "cumulative" else float(spec.decay)
    before = {name: jnp.asarray(array, arithmetic) for name, array in state.arrays().items()}

    def average(name: str, value: jax.Array) -> jax.Array:
        return old * before[name] + new * value.astype(arithmetic)

    if spec.renorm is not None:
        after = _of_renorm(batch, spec, before, average)
    else:
        variance = batch.unbiased if spec.moving_variance_estimator == "unbiased" else batch.variance
        after = _of_variance(batch.mean, variance, spec, steps, average)
    enters = jnp.ones(spec.num_features, bool) if batch.some is None else batch.some
    if spec.nonfinite == "keep":
        # The mean and the biased variance decide: the unbiased variance is derived from them.
        enters &= jnp.isfinite(batch.mean) & jnp.isfinite(batch.variance)
    chosen = {
        name: jax.lax.stop_gradient(jnp.where(enters, value.astype(stored), jnp.asarray(getattr(state, name), stored)))
        for name, value in after.items()
    }
    return state.replace(**chosen, num_updates=t if batch.some is None else jnp.where(batch.some, t, counter))


def _of_variance(
    mean: jax.Array, variance: jax.Array, spec: BatchNormSpec, steps: jax.Array, average: Average
) -> dict[str, jax.Array]:
    """d s + (1-d) batch of mean and variance; where debiased, from 0, and divided by 1 - d^t.

    Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, section 3.
    """
    debiased = {"none": (), "mean": ("mean",), "all": ("mean", "variance")}[spec.zero_debias]
    after = {}
    for name, value in (("mean", mean), ("variance", variance)):
        if name in debiased:
            hidden = after[f"hidden_{name}"] = average(f"hidden_{name}", value)
            after[f"moving_{name}"] = hidden / _seen(float(spec.decay), steps)
        else:
            after[f"moving_{name}"] = average(f"moving_{name}", value)
    return after


def _seen(decay: float, steps: jax.Array) -> jax.Array:
    """1 - decay^steps, in which no digit is lost for a decay near 1."""
    return jnp.ones_like(steps) if decay == 0 else -jnp.expm1(steps * math.log(decay))


def _of_renorm(
    batch: Entering, spec: BatchNormSpec, before: dict[str, jax.Array], average: Average
) -> dict[str, jax.Array]:
    """The averages of mean and standard deviation, under the layer's decay and under renorm's own."""
    assert spec.renorm is not None
    slow = spec.renorm.decay
    stddev = jnp.sqrt(batch.variance + spec.epsilon)
    moving = average("moving_stddev", stddev)
    return {
        "moving_mean": average("moving_mean", batch.mean),
        "moving_variance": jnp.maximum(jnp.square(moving) - spec.epsilon, 0),
        "renorm_mean": slow * before["renorm_mean"] + (1.0 - slow) * batch.mean,
        "renorm_stddev": slow * before["renorm_stddev"] + (1.0 - slow) * stddev,
        "moving_stddev": moving,
    }
