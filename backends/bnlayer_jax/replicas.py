"""The replicas of a synchronized layer, in JAX: the shards of a mapped axis, and what is exchanged among them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bnlayer.contract import NDArray
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec

AxisName = str | tuple[str, ...]


@dataclass(frozen=True)
class Replicas:
    """The members of a mapped axis: of `jax.shard_map`'s mesh, or of `jax.vmap` or `jax.pmap` with an axis name.

    Attributes:
        axis_name: of the axis, or of several that count as one.
        number: how many members it has.
    """

    axis_name: AxisName
    number: int

    def largest(self, values: jax.Array) -> jax.Array:
        """The largest over all replicas, element by element; carries no gradient."""
        largest: jax.Array = jax.lax.pmax(  # type: ignore[no-untyped-call]
            jax.lax.stop_gradient(values), self.axis_name
        )
        return largest

    def sums(self, *arrays: jax.Array) -> list[jax.Array]:
        """The sum of each array over all replicas, by one all-reduce for all; they have one dtype.

        Differentiable to every order, for a loss that is the sum of the replicas' losses: the gradient of an all-reduce
        sum is an all-reduce sum.
        """
        # JAX would lower a tree to one all-reduce a leaf, and not every compiler joins these.
        packed = jax.lax.psum(  # type: ignore[no-untyped-call]
            jnp.concatenate([array.reshape(-1) for array in arrays]), self.axis_name
        )
        parts = jnp.split(packed, np.cumsum([array.size for array in arrays])[:-1])
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def replicas_of(axis_name: AxisName | None, spec: BatchNormSpec, synchronized: bool) -> Replicas | None:
    """Who computes statistics together in this call; None: this replica for itself.

    Args:
        axis_name: what the caller gave.
        spec: of the layer.
        synchronized: whether this call's statistics are those of all replicas (`bnlayer.call.CallPlan`).

    Raises:
        InputError: the layer is not synchronized, or no such axis is mapped where the call is.
    """
    if axis_name is None:
        return None
    if not spec.synchronized:
        raise InputError(
            f"axis_name={axis_name!r} needs a synchronized layer, and this spec has synchronized=False. Build it with"
            " synchronized=True, or leave axis_name out for statistics of each replica's own."
        )
    if not synchronized:
        return None
    try:
        # Of a Python number: known while tracing, without a collective.
        number = jax.lax.psum(1, axis_name)  # type: ignore[no-untyped-call]
    except NameError as error:
        raise InputError(
            f"axis_name={axis_name!r} is no mapped axis here ({error}). Call under jax.shard_map over a mesh with that"
            " axis, or jax.vmap or jax.pmap with that axis_name; or leave axis_name out to run as one replica."
        ) from error
    return Replicas(axis_name, int(number))


def padded(array: ArrayLike, rows: int) -> tuple[jax.Array | NDArray, NDArray]:
    """An array with rows of zeros after its own, and the mask (rows,) that is False there.

    In JAX all replicas have arrays of one shape. Where they have different numbers of rows, pad each to the most that
    any has, and call with that mask as the weights (or with 0 in weights of your own): statistics, n of the unbiased
    variance, gradients and the state come out as if the padding were not there. A replica may have no row of its own.

        x, present = padded(x, rows)
        y, layer = layer(x, training=True, weights=present)     # y[: len(x)] is of the rows that were there

    Args:
        array: of one replica, rows first; a numpy array stays one.
        rows: how many the replica with the most has.

    Raises:
        InputError: the array has more rows than that.
    """
    own = array if isinstance(array, (jax.Array, np.ndarray)) else np.asarray(array)
    if len(own) > rows:
        raise InputError(f"padding to {rows} rows takes at most so many; got {len(own)}.")
    fill = (rows - len(own), *own.shape[1:])
    present = np.arange(rows) < len(own)
    if isinstance(own, np.ndarray):
        return np.concatenate([own, np.zeros(fill, own.dtype)]), present
    return jnp.concatenate([own, jnp.zeros(fill, own.dtype)]), present
