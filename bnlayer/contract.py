"""The contract of a backend: what it offers to users, to conformance and to porting.

A backend is one light object, importable without its framework, registered under the entry-point group
`bnlayer.backends` (see `bnlayer.registry`). docs/writing-a-backend.md builds one from nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from .errors import BackendUnavailable, UnsupportedError
from .spec import BatchNormSpec
from .state import BatchNormState

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

NDArray = np.ndarray[Any, np.dtype[Any]]
Layer = Any  # the framework's own kind of layer
Kind = Literal["bnlayer", "native"]  # whose layer
Part = Literal["statistics", "parameters"]  # what of a batch norm is frozen


@dataclass(frozen=True, eq=False)
class Call:
    """One forward pass of a layer, and the gradient that comes back to it.

    Attributes:
        x: the input; its memory layout (strides) is part of the case, so keep it where the framework has strides.
        dy: gradient of a scalar loss with respect to y, of y's shape and dtype; None: no gradients are asked for.
        weights: example weights or a mask, or None; real ones get a gradient, boolean and integer ones do not.
        adjustment: the pair (scale, bias) of the normalized values, each broadcastable to x, or None.
        direction: of x's shape and dtype; asks for the second order too (`CallOutcome.hvp`). Needs a dy.
    """

    x: NDArray
    _: KW_ONLY
    dy: NDArray | None = None
    weights: NDArray | None = None
    adjustment: tuple[NDArray, NDArray] | None = None
    direction: NDArray | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """One step of a layer: every call forward in order, then one backward pass through all of them.

    Attributes:
        calls: at least one; more than one means the same layer is used several times before the backward pass.
        training: whether the layer trains.
        update_stats: False: batch statistics normalize, but do not enter the moving ones.
        frozen_statistics: the layer's statistics are frozen, whatever `training` says.
        renorm_clips: "r_max", "r_min" or "d_max" to what holds instead of the spec's in this step; None is no clip.
        shards: how many rows of every call each replica gets, in order (0 allowed; they add up to the batch): the step
            runs on that many replicas of a synchronized layer, and the loss is the sum of theirs. None: on one.
            `bnlayer.shards` cuts the calls and joins the outcomes.
    """

    calls: tuple[Call, ...]
    _: KW_ONLY
    training: bool
    update_stats: bool = True
    frozen_statistics: bool = False
    renorm_clips: Mapping[str, float | None] | None = None
    shards: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class CallOutcome:
    """What one call gave, all numpy.

    Attributes:
        y: of x's shape and dtype.
        dx, dweights: where `dy` was given; dweights for real weights only.
        hvp: where a `direction` was given: the derivative of dx along it, which is the gradient with respect to x of
            sum(dx * direction), dy held constant. Of x's shape and dtype.
    """

    y: NDArray
    _: KW_ONLY
    dx: NDArray | None = None
    dweights: NDArray | None = None
    hvp: NDArray | None = None


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

    @property
    def lacks(self) -> Mapping[str, str]:
        """Observables that the framework's layer does not have at all, and why: {"num_updates": "it has no counter"}.

        They are neither asked for nor compared; without "dx" no gradients are. What it has and gets wrong is a
        deviation instead.
        """
        ...


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One batch norm inside a live model.

    Attributes:
        name: where it is, in the framework's own words ("layer1.0.bn1").
        layer: the object.
        kind: "bnlayer" for ours, "native" for the framework's own.
        spec, state: what it is and holds; None where `reason` says why that cannot be told. A layer that is several,
            stacked by vmap or scan, has a spec and a reason "", and no one state.
        reason: why it cannot be read or replaced (a subclass that may compute something else, a lazy layer that was
            never called); "" where it can.
    """

    name: str
    layer: Layer
    kind: Kind
    spec: BatchNormSpec | None
    state: BatchNormState[NDArray] | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass of a model.

    Attributes:
        model: the model after it; the same object where models are mutable.
        output: the first array of what the model returned, channels last, in float32 or wider.
        layers: for each batch norm that was called, in the order of the calls, its name to (input, output) of its first
            call: as the layer had them, channels where they are. Empty unless asked for.
        calls: the names of all layers that hold tensors, in the order of their first calls. Empty unless asked for.
    """

    model: Any
    output: NDArray
    layers: Mapping[str, tuple[NDArray, NDArray]] = field(default_factory=dict)
    calls: tuple[str, ...] = ()


@runtime_checkable
class ModelAdapter(Protocol):
    """The only way by which porting, surgery and parity testing reach the live models of a framework.

    Registered under the entry-point group `bnlayer.models`; importable without the framework. What a model is, the
    adapter says: a module, or a module with its variables where the framework keeps these apart.
    """

    @property
    def name(self) -> str:
        """Of the kind of model, such as "torch" or "flax.nnx"."""
        ...

    def owns(self, model: Any) -> bool:
        """Whether the other methods take this object. Does not import the framework."""
        ...

    def batch_norms(self, model: Any) -> Sequence[LayerRecord]:
        """The model's batch norms, ours and the framework's, in the order in which the model holds them.

        A layer that the model holds several times is listed once, by its first name.
        """
        ...

    def counterpart(self, record: LayerRecord, to: Kind) -> Layer:
        """A layer of the other kind with the same spec, state, device, mode and flags, to stand in the record's place.

        Raises:
            UnsupportedError: there is none that computes the same; the message names what it would lose.
        """
        ...

    def replace(self, model: Any, layers: Mapping[str, Layer]) -> Any:
        """The model with other layers in the places of the records of these names; everywhere, where it is shared.

        The same object where models are mutable.
        """
        ...

    def freeze(self, model: Any, names: Collection[str], frozen: bool, part: Part) -> Any:
        """The model with one part of these batch norms frozen, or free again.

        Raises:
            UnsupportedError: the framework's own layer has no such flag; convert the model first.
        """
        ...

    def read(self, model: Any) -> Checkpoint:
        """The model as a checkpoint: what the framework's own file of it would hold, under that file's names.

        Tensors come layer by layer, in the order in which the model holds its layers (`order_is_meaningful`), and
        `layers` says of each what it is: `Layer.kind` is a kind of `bnlayer.porting.units`, or else the class's name.
        """
        ...

    def write(self, model: Any, checkpoint: Checkpoint) -> Any:
        """The model with its tensors from a checkpoint of the names that `read` gives; the same object if mutable.

        Dtypes and devices stay the model's.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape; the model is as it was.
        """
        ...

    def configure(self, model: Any, specs: Mapping[str, BatchNormSpec]) -> Any:
        """The model with these batch norms' epsilon and decay; the same object where models are mutable.

        Raises:
            UnsupportedError: the framework's layer has them in the model's code, and they differ there.
        """
        ...

    def run(self, model: Any, x: NDArray, *, training: bool, capture: bool = False) -> Run:
        """One forward pass without gradients.

        Args:
            model: in any mode; the mode that it is in comes back after.
            x: the batch first and the channels last; moved to where the framework's models have them.
            training: batch norms train, and their moving statistics move; everything else (dropout, stochastic depth)
                is in eval mode either way.
            capture: fill `Run.layers` and `Run.calls`.
        """
        ...


@dataclass(frozen=True)
class Missing:
    """What a backend does not do, so that `unsupported` is a lookup.

    Attributes:
        fields: spec fields that must keep their default; a reason each.
        dtypes: x dtypes the framework lacks; a reason each.
        adjustment: why `adjustment` is not taken, or None if it is.
        shards: why a step cannot run on several replicas, or None if it can.
        direction: why there is no second order, or None if there is.
    """

    fields: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    adjustment: str | None = None
    shards: str | None = None
    direction: str | None = None

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
        if request is not None and request.shards is not None and self.shards is not None:
            return f"shards: {self.shards}"
        for call in request.calls if request is not None else ():
            if call.x.dtype.name in self.dtypes:
                return f"{call.x.dtype.name}: {self.dtypes[call.x.dtype.name]}"
            if call.adjustment is not None and self.adjustment is not None:
                return f"adjustment: {self.adjustment}"
            if call.direction is not None and self.direction is not None:
                return f"direction: {self.direction}"
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
