"""`BatchNormState` as a pytree of JAX arrays: its registration, the way from and to numpy, and its fit to a spec.

Every array is a leaf, the counter too, so that a state is what `jax.jit`, `jax.lax.scan` or `jax.vmap` carries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer

from bnlayer.contract import NDArray
from bnlayer.errors import StateError, UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype, array_names

jax.tree_util.register_dataclass(
    BatchNormState, data_fields=[f.name for f in dataclasses.fields(BatchNormState)], meta_fields=[]
)
# So that a function that takes or returns a state can be exported; the auxiliary data that a dataclass without static
# fields has is the empty tuple.
export.register_pytree_node_serialization(
    BatchNormState,
    serialized_name="bnlayer.BatchNormState",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
)


def owned(state: BatchNormState[Any], spec: BatchNormSpec) -> BatchNormState[jax.Array]:
    """A state of JAX arrays that shares no memory with `state`, whose arrays are numpy's or JAX's.

    Raises:
        StateError: the state does not fit the spec (see `BatchNormState.checked`); of traced arrays the values are
            not looked at.
        UnsupportedError: the counter does not fit the integers that JAX has without x64.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        check_names_and_shapes(state, spec)
        return BatchNormState(
            **{name: jnp.asarray(array, array_dtype(spec, name)) for name, array in state.arrays().items()},
            num_updates=counter_of(state),
        )
    own = state.checked(spec)
    dtype = counter_dtype()
    if int(own.num_updates) > np.iinfo(dtype).max:
        raise UnsupportedError(
            f"num_updates={own.num_updates} does not fit {dtype.name}, the largest integer that JAX has now. Turn on"
            " jax_enable_x64."
        )
    # `checked` copied every array, so JAX may take its memory over.
    return BatchNormState(
        **{name: jnp.asarray(array) for name, array in own.arrays().items()},
        num_updates=jnp.asarray(own.num_updates, dtype),
    )


def to_numpy(state: BatchNormState[jax.Array]) -> BatchNormState[NDArray]:
    """A numpy copy of the state, its counter an int."""
    return BatchNormState(
        **{name: np.array(array) for name, array in state.arrays().items()}, num_updates=int(state.num_updates)
    )


def counter_of(state: BatchNormState[Any]) -> jax.Array:
    """The counter as an array: a number becomes int32 (int64 under x64), an array keeps its dtype.

    Raises:
        StateError: the state has no counter.
    """
    counter = state.num_updates
    if counter is None:
        raise StateError("num_updates is None, and an update has to count; give the number of updates so far, or 0.")
    return counter if isinstance(counter, jax.Array) else jnp.asarray(counter, counter_dtype())


def counter_dtype() -> np.dtype[Any]:
    """The widest integer that JAX has now: int64 under x64, else int32."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.int64))


def check_names_and_shapes(state: BatchNormState[Any], spec: BatchNormSpec) -> None:
    """Check what can be checked of a traced state.

    Raises:
        StateError: an array is missing, extra, or not of shape (num_features,).
    """
    shapes = {name: jnp.shape(array) for name, array in state.arrays().items()}
    wanted = dict.fromkeys(array_names(spec), (spec.num_features,))
    if shapes != wanted:
        raise StateError(
            f"the state must have {_listed(wanted)} for this spec; it has {_listed(shapes)}. Build it from the spec."
        )


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no arrays"
