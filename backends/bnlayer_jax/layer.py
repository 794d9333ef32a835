"""`BatchNorm`: a small immutable layer over `batch_norm`, for JAX; a pytree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import jax
from jax import export
from jax.typing import ArrayLike

from bnlayer.call import trains
from bnlayer.errors import StateError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .function import batch_norm
from .precision import refuse_missing_float64
from .replicas import AxisName, replicas_of
from .state import owned
from .support import MISSING


class BatchNorm:
    """Batch normalization that carries its own state: every call returns the layer after.

        layer = BatchNorm(BatchNormSpec(3))
        y, layer = layer(x, training=True)

    A pytree whose leaves are the state's arrays: pass it through jit, scan or vmap as it is. To differentiate, take
    the floating-point part out, since the counter has no gradient:

        def loss(parameters, layer, x):
            y, layer = layer.with_parameters(parameters)(x, training=True)
            return jnp.mean(y**2), layer

        gradients, layer = jax.grad(loss, has_aux=True)(layer.parameters, layer, x)

    Attributes:
        spec: what the layer is; static.
        state: parameters and moving statistics, JAX arrays.
        frozen_statistics: True: the moving statistics normalize and stay as they are, in training too; static.
        axis_name: the mapped axis over which the statistics of a synchronized layer are taken, or None; static.
    """

    __slots__ = ("axis_name", "frozen_statistics", "spec", "state")

    spec: BatchNormSpec
    state: BatchNormState[jax.Array]
    frozen_statistics: bool
    axis_name: AxisName | None

    def __init__(
        self,
        spec: BatchNormSpec,
        state: BatchNormState[Any] | None = None,
        *,
        frozen_statistics: bool = False,
        axis_name: AxisName | None = None,
    ) -> None:
        """A layer of this spec.

        Args:
            spec: what the layer is.
            state: numpy or JAX arrays, copied and checked (traced ones but for their values); None: the initial ones.
            frozen_statistics: see the attribute.
            axis_name: see `bnlayer_jax.batch_norm`.

        Raises:
            InputError: `axis_name` is given to a layer that is not synchronized.
            UnsupportedError: the spec asks for what this backend lacks, or for float64 without x64.
            StateError: the state does not fit the spec.
        """
        MISSING.refuse("jax", spec)
        refuse_missing_float64(spec, "")
        replicas_of(axis_name, spec, synchronized=False)  # here too, where the mistake was made
        state = owned(BatchNormState.initial(spec) if state is None else state, spec)
        _fill(self, (spec, frozen_statistics, axis_name), state)

    def __call__(
        self,
        x: ArrayLike,
        *,
        training: bool,
        weights: ArrayLike | None = None,
        update_stats: bool = True,
        adjustment: tuple[ArrayLike, ArrayLike] | None = None,
        renorm_clips: Mapping[str, ArrayLike | None] | None = None,
    ) -> tuple[jax.Array, BatchNorm]:
        """Normalize x; see `bnlayer_jax.batch_norm`. Returns y and the layer after."""
        y, state = batch_norm(
            x,
            self.state,
            self.spec,
            training=trains(self.spec, training, self.frozen_statistics),
            weights=weights,
            update_stats=update_stats,
            adjustment=adjustment,
            renorm_clips=renorm_clips,
            axis_name=self.axis_name,
        )
        return y, self.replace(state=state)

    @property
    def parameters(self) -> dict[str, jax.Array]:
        """Those of "gamma" and "beta" that the spec has: what an optimizer moves."""
        return {name: array for name, array in self.state.arrays().items() if name in ("gamma", "beta")}

    def with_parameters(self, parameters: Mapping[str, jax.Array]) -> BatchNorm:
        """This layer with other parameters.

        Raises:
            StateError: the names are not those of `parameters`.
        """
        if set(parameters) != set(self.parameters):
            raise StateError(
                f"the parameters of this layer are {', '.join(self.parameters) or 'none'}; got"
                f" {', '.join(sorted(parameters)) or 'none'}."
            )
        return self.replace(state=self.state.replace(**parameters))

    def replace(
        self,
        *,
        state: BatchNormState[jax.Array] | None = None,
        frozen_statistics: bool | None = None,
        axis_name: AxisName | EllipsisType | None = ...,
    ) -> BatchNorm:
        """This layer with another state, frozen or not, or over another axis; the state is taken as it is, traced or
        not.

        Raises:
            InputError: an `axis_name` is given to a layer that is not synchronized.
        """
        axis = self.axis_name if isinstance(axis_name, EllipsisType) else axis_name
        replicas_of(axis, self.spec, synchronized=False)
        frozen = self.frozen_statistics if frozen_statistics is None else frozen_statistics
        return _assembled((self.spec, frozen, axis), (self.state if state is None else state,))

    def __reduce__(self) -> tuple[Any, ...]:
        children, static = _parts(self)
        return _assembled, (static, tuple(child for _, child in children))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a BatchNorm of bnlayer_jax is immutable; to change {name}, use what replace() returns.")

    def __repr__(self) -> str:
        axis = "" if self.axis_name is None else f", axis_name={self.axis_name!r}"
        return f"BatchNorm({self.spec}, frozen_statistics={self.frozen_statistics}{axis})"


Static = tuple[BatchNormSpec, bool, AxisName | None]


def _fill(layer: BatchNorm, static: Static, state: Any) -> None:
    put = object.__setattr__
    for name, value in zip(("spec", "frozen_statistics", "axis_name"), static, strict=True):
        put(layer, name, value)
    put(layer, "state", state)


def _assembled(static: Static, children: Any) -> BatchNorm:
    """A layer of these parts, unchecked: JAX rebuilds pytrees around placeholders too."""
    layer = object.__new__(BatchNorm)
    _fill(layer, static, children[0])
    return layer


def _parts(layer: BatchNorm) -> tuple[tuple[tuple[Any, Any]], Static]:
    static = layer.spec, layer.frozen_statistics, layer.axis_name
    return ((jax.tree_util.GetAttrKey("state"), layer.state),), static


jax.tree_util.register_pytree_with_keys(BatchNorm, _parts, _assembled)


def _to_bytes(static: Static) -> bytes:
    spec, frozen, axis = static
    return json.dumps([spec.to_dict(), frozen, axis], allow_nan=False).encode()


def _from_bytes(data: bytes) -> Static:
    spec, frozen, axis = json.loads(data)
    return BatchNormSpec.from_dict(spec), frozen, tuple(axis) if isinstance(axis, list) else axis


export.register_pytree_node_serialization(
    BatchNorm, serialized_name="bnlayer_jax.BatchNorm", serialize_auxdata=_to_bytes, deserialize_auxdata=_from_bytes
)
