"""The contract of a backend: what it offers to users, to conformance and to porting.

A backend is one light object, importable without its framework, registered under the entry-point group
`bnlayer.backends` (see `bnlayer.registry`). docs/writing-a-backend.md builds one from nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .errors import BackendUnavailable, UnsupportedError
from .spec import BatchNormSpec
from .state import BatchNormState

NDArray = np.ndarray[Any, np.dtype[Any]]
Layer = Any  # the framework's own kind of layer


@dataclass(frozen=True, eq=False)
class Call:
    """One forward pass of a layer, and the gradient that comes back to it.

    Attributes:
        x: the input; its memory layout (strides) is part of the case, so keep it where the framework has strides.
        dy: gradient of a scalar loss with respect to y, of y's shape and dtype; None: no gradients are asked for.
        weights: example weights or a mask, or None; real ones get a gradient, boolean and integer ones do not.
        adjustment: the pair (scale, bias) of the normalized values, each broadcastable to x, or None.
    """

    x: NDArray
    _: KW_ONLY
    dy: NDArray | None = None
    weights: NDArray | None = None
    adjustment: tuple[NDArray, NDArray] | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """One step of a layer: every call forward in order, then one backward pass through all of them.

    Attributes:
        calls: at least one; more than one means the same layer is used several times before the backward pass.
        training: whether the layer trains.
        update_stats: False: batch statistics normalize, but do not enter the moving ones.
        frozen_statistics: the layer's statistics are frozen, whatever `training` says.
        renorm_clips: "r_max", "r_min" or "d_max" to what holds instead of the spec's in this step; None is no clip.
    """

    calls: tuple[Call, ...]
    _: KW_ONLY
    training: bool
    update_stats: bool = True
    frozen_statistics: bool = False
    renorm_clips: Mapping[str, float | None] | None = None


@dataclass(frozen=True, eq=False)
class CallOutcome:
    """What one call gave: y, and where `dy` was given dx and (for real weights) dweights, all numpy."""

    y: NDArray
    _: KW_ONLY
    dx: NDArray | None = None
    dweights: NDArray | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one step gave, all numpy: per-call outcomes, parameter gradients over all calls, the state after."""

    calls: tuple[CallOutcome, ...]
    _: KW_ONLY
    state: BatchNormState[NDArray]
    dgamma: NDArray | None = None
    dbeta: NDArray | None = None


@runtime_checkable
class Backend(Protocol):
    """A framework's batch norm, for the full spec (or saying by name what it lacks)."""

    @property
    def name(self) -> str:
        """Unique, such as "torch" or "torch.nn"."""
        ...

    def version(self) -> str:
        """The framework's version.

        Raises:
            BackendUnavailable: the framework cannot be imported (see `require`).
        """
        ...

    def owns(self, layer: Layer) -> bool:
        """Whether `extract` and `load` take this object. Does not import the framework."""
        ...

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        """Why this spec (and request) cannot be run here, naming the field or argument; None if it can."""
        ...

    def build(self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None) -> Layer:
        """A new native layer of this spec; its state is copied in, or initial.

        Raises:
            UnsupportedError: `unsupported(spec)` has a reason.
            StateError: the state does not fit the spec.
        """
        ...

    def extract(self, layer: Layer) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        """The layer's spec and a copy of its state."""
        ...

    def load(self, layer: Layer, state: BatchNormState[NDArray]) -> Layer:
        """The layer with this state in it: the same object where layers are mutable.

        Raises:
            StateError: the state does not fit the layer's spec.
        """
        ...

    def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
        """Run one step, numpy in and numpy out. For conformance and parity; users call the native layer.

        Raises:
            InputError: the request does not fit the layer.
            UnsupportedError: `unsupported(spec, request)` has a reason.
        """
        ...


@runtime_checkable
class NativeBackend(Backend, Protocol):
    """A framework's own layer, judged by the same vectors, with its known deviations in a file beside it."""

    @property
    def deviations(self) -> Path:
        """The deviations file (format: `bnlayer_conformance.deviations`)."""
        ...


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One batch norm inside a live model: its name there, the layer, its spec and state."""

    name: str
    layer: Layer
    spec: BatchNormSpec
    state: BatchNormState[NDArray]


class ModelAdapter(Protocol):
    """The only way by which porting, surgery and parity testing reach the live models of a framework."""

    @property
    def name(self) -> str:
        """The backend's name."""
        ...

    def batch_norms(self, model: Any) -> Sequence[LayerRecord]:
        """The model's batch norms in execution order."""
        ...

    def capture(self, model: Any, inputs: Sequence[NDArray]) -> dict[str, tuple[NDArray, NDArray]]:
        """One eval forward pass; each layer's input and output by the layer's name."""
        ...

    def train_steps(self, model: Any, batches: Iterable[Sequence[NDArray]]) -> Any:
        """One training forward pass a batch, statistics updated, parameters untouched; the model after."""
        ...

    def replace(self, model: Any, function: Callable[[LayerRecord], Layer]) -> Any:
        """The model with each batch norm replaced by what `function` returns for it."""
        ...

    def read(self, model: Any) -> dict[str, NDArray]:
        """Every named tensor of the model."""
        ...

    def write(self, model: Any, tensors: dict[str, NDArray], specs: dict[str, BatchNormSpec]) -> Any:
        """The model with these tensors, and each batch norm's epsilon and momentum, set."""
        ...


@dataclass(frozen=True)
class Missing:
    """What a backend does not do, so that `unsupported` is a lookup.

    Attributes:
        fields: spec fields that must keep their default; a reason each.
        dtypes: x dtypes the framework lacks; a reason each.
        adjustment: why `adjustment` is not taken, or None if it is.
    """

    fields: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    adjustment: str | None = None

    def reason(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        """The first thing that `spec` or `request` asks for and this lacks, or None."""
        plain = BatchNormSpec(num_features=spec.num_features)
        for name, why in self.fields.items():
            if getattr(spec, name) != getattr(plain, name):
                return f"{name}: {why}"
        for dtype in (spec.param_dtype, spec.stats_dtype):
            if dtype in self.dtypes:
                return f"{dtype}: {self.dtypes[dtype]}"
        if request is not None and request.renorm_clips is not None and "renorm" in self.fields:
            return f"renorm: {self.fields['renorm']}"  # the clips are renorm's
        for call in request.calls if request is not None else ():
            if call.x.dtype.name in self.dtypes:
                return f"{call.x.dtype.name}: {self.dtypes[call.x.dtype.name]}"
            if call.adjustment is not None and self.adjustment is not None:
                return f"adjustment: {self.adjustment}"
        return None

    def refuse(self, name: str, spec: BatchNormSpec, request: Request | None = None) -> None:
        """Raise what `reason` finds.

        Raises:
            UnsupportedError: with the backend's name and the reason.
        """
        reason = self.reason(spec, request)
        if reason is not None:
            raise UnsupportedError(f"backend {name!r} does not support {reason}.")


def require(module: str, extra: str) -> ModuleType:
    """Import a framework, or say how to install it.

    Raises:
        BackendUnavailable: the module is absent, or is there and fails to import.
    """
    install = f"pip install 'bnlayer[{extra}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] == error.name.split(".")[0]:
            raise BackendUnavailable(f"{module} is not installed. Run: {install}") from error
        raise BackendUnavailable(f"{module} is installed, but lacks {error.name}. Run: {install}") from error
    except Exception as error:  # a broken framework may raise anything while it loads its libraries
        raise BackendUnavailable(
            f"{module} fails to import ({type(error).__name__}: {error}). Run: {install}"
        ) from error
