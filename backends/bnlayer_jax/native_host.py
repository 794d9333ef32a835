"""What the batch norms of JAX's libraries have in common as conformance targets. Imports neither JAX nor a library.

Their layers keep parameters and statistics apart from the module that computes, so a target's layer is both together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bnlayer.call import plan_call, trains
from bnlayer.contract import Call, CallOutcome, Missing, NDArray, Outcome, Request, require
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_names

if TYPE_CHECKING:
    import jax

Variables = dict[str, Any]  # by the names of BatchNormState


@dataclass(frozen=True, eq=False)
class NativeLayer:
    """A library's own batch norm with the variables that it is called with.

    Attributes:
        host: the target's name.
        spec: what was asked for; `extract` reads back what the module says of it.
        module: the library's layer.
        variables: its parameters and statistics, JAX arrays by the names of `BatchNormState`.
    """

    host: str
    spec: BatchNormSpec
    module: Any
    variables: Variables


class NativeHost(ABC):
    """A conformance target over one library's batch norm; it adds nothing to what that computes."""

    name: ClassVar[str]
    library: ClassVar[str]
    missing: ClassVar[Missing]
    functional: ClassVar[bool] = True  # the caller holds the variables, and may keep those from before a call
    counts: ClassVar[bool] = False  # there is a variable from which `num_updates` can be told

    @property
    def deviations(self) -> Path:
        """The file of the target's known deviations."""
        return Path(__file__).with_name("deviations") / f"{self.name}.txt"

    @property
    def lacks(self) -> Mapping[str, str]:
        """See `bnlayer.contract.NativeBackend`."""
        return {}

    @abstractmethod
    def module(self, spec: BatchNormSpec) -> Any:
        """The library's layer of this spec."""

    @abstractmethod
    def said(self, module: Any) -> dict[str, Any]:
        """The spec fields that the module says itself."""

    @abstractmethod
    def initial(self, spec: BatchNormSpec) -> Variables:
        """The variables of the library's layer as it builds it."""

    @abstractmethod
    def apply(
        self, spec: BatchNormSpec, variables: Variables, x: jax.Array, mask: jax.Array | None, *, training: bool
    ) -> tuple[jax.Array, Variables]:
        """One call of the library's layer: y, and the variables after. Traced."""

    @abstractmethod
    def lacks_of(self, spec: BatchNormSpec) -> str | None:
        """Which value of the spec the library's layer cannot have, beyond `missing`."""

    def lacks_in(self, spec: BatchNormSpec, call: Call) -> str | None:
        """What of a call the library's layer cannot take, beyond `missing`."""
        return None if call.weights is None else f"weights: {self.name} has no such argument"

    def refusals(self) -> tuple[type[Exception], ...]:
        """How the library refuses an input."""
        return (IndexError, TypeError, ValueError)

    def from_state(self, state: BatchNormState[NDArray]) -> Variables:
        """The variables that hold this state."""
        import jax.numpy as jnp

        held: Variables = {name: jnp.asarray(array) for name, array in state.arrays().items()}
        if self.counts:
            held["num_updates"] = jnp.asarray(state.num_updates, jnp.int32)
        return held

    def to_state(self, spec: BatchNormSpec, variables: Variables) -> BatchNormState[NDArray]:
        """The state that these variables hold, a numpy copy."""
        return BatchNormState(
            **{name: np.array(variables[name]) for name in array_names(spec)},
            num_updates=int(variables["num_updates"]) if self.counts else None,
        )

    # The contract

    def version(self) -> str:
        require("jax", "jax")
        return str(require(self.library, self.library).__version__)

    def owns(self, layer: Any) -> bool:
        return isinstance(layer, NativeLayer) and layer.host == self.name

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        reason = self.missing.reason(spec, request) or self.lacks_of(spec)
        if reason is not None or request is None:
            return reason
        if not self.functional and not request.update_stats and request.training:
            return f"update_stats: {self.name} always updates in training"
        return next((why for call in request.calls if (why := self.lacks_in(spec, call)) is not None), None)

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> NativeLayer:
        self._refuse(spec)
        if device is not None:
            raise UnsupportedError(f"backend {self.name!r} takes no device; choose it by jax.default_device.")
        require(self.library, self.library)
        from .precision import x64_where_asked

        with x64_where_asked(spec):
            variables = self.initial(spec) if state is None else self.from_state(state.checked(spec))
            return NativeLayer(self.name, spec, self.module(spec), variables)

    def extract(self, layer: NativeLayer) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        dtypes = {
            field: layer.variables[name].dtype.name
            for field, name in (("param_dtype", "gamma"), ("param_dtype", "beta"), ("stats_dtype", "moving_mean"))
            if name in layer.variables
        }
        spec = layer.spec.replace(**dtypes, **self.said(layer.module))
        return spec, self.to_state(spec, layer.variables)

    def load(self, layer: NativeLayer, state: BatchNormState[NDArray]) -> NativeLayer:
        return self.build(layer.spec, state)

    def step(self, layer: NativeLayer, request: Request) -> tuple[NativeLayer, Outcome]:
        self._refuse(layer.spec, request)
        from .native_step import run_step
        from .precision import x64_where_asked

        training = trains(layer.spec, request.training, request.frozen_statistics)
        dtypes = [a.dtype for c in request.calls for a in (c.x, c.dy) if a is not None]
        with ExitStack() as stack:
            stack.enter_context(x64_where_asked(layer.spec, *dtypes))
            masks = [_mask(layer.spec, call) for call in request.calls]
            try:
                ys, variables, gradients = run_step(
                    self, layer.spec, layer.variables, request.calls, masks,
                    training=training, keep=not request.update_stats,
                )  # fmt: skip
            except self.refusals() as error:
                shapes = ", ".join(f"{call.x.dtype.name} {call.x.shape}" for call in request.calls)
                raise InputError(f"{self.name} refuses x of {shapes}: {error}") from error
            after = replace(layer, variables=variables)
            return after, Outcome(
                tuple(
                    CallOutcome(np.asarray(y), dx=_numpy(dx), hvp=_numpy(hvp))
                    for y, dx, hvp in zip(ys, gradients.dx, gradients.hvp, strict=True)
                ),
                state=self.to_state(layer.spec, variables),
                dgamma=_numpy(gradients.parameters.get("gamma")),
                dbeta=_numpy(gradients.parameters.get("beta")),
            )

    def _refuse(self, spec: BatchNormSpec, request: Request | None = None) -> None:
        reason = self.unsupported(spec, request)
        if reason is not None:
            raise UnsupportedError(f"backend {self.name!r} does not support {reason}.")


def not_only(fields: Mapping[str, str], spec: BatchNormSpec) -> str | None:
    """The first of these flags that the spec switches off, and why it cannot be; None if none is."""
    return next((f"{name}: {why}" for name, why in fields.items() if not getattr(spec, name)), None)


def decay(spec: BatchNormSpec) -> float:
    """The spec's decay, where "cumulative" is unsupported."""
    assert not isinstance(spec.decay, str)
    return spec.decay


def one_axis(spec: BatchNormSpec, axis: int, rank: int) -> bool:
    """Whether the spec's axis of an input of this rank is `axis`, counted from the front."""
    return axis == (spec.axis + rank if spec.axis < 0 else spec.axis)


def _mask(spec: BatchNormSpec, call: Call) -> NDArray | None:
    """The weights in the shape in which they broadcast to x."""
    if call.weights is None:
        return None
    asked = spec.replace(single_value="allow")  # whether one value will do is the library's to say
    plan = plan_call(asked, call.x.shape, call.x.dtype.name, training=True, weights_shape=call.weights.shape)
    assert plan.weights_shape is not None
    return call.weights.reshape([int(length or 0) for length in plan.weights_shape])


def _numpy(array: jax.Array | None) -> NDArray | None:
    return None if array is None else np.asarray(array)
