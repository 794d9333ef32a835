"""What differs between two checkpoints, tensor by tensor and layer by layer, and for batch norms why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..checkpoint.batch_norms import StoredBatchNorm, find
from ..checkpoint.checkpoint import Checkpoint
from ..porting.units import Unit, Units, units_of
from .causes import Cause, Side, alike, causes_of
from .edits import NDArray

Status = Literal["equal", "differs", "dtype", "shape", "only in the first", "only in the second"]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor. `equal` is bit by bit; "dtype": the same numbers in another dtype, or in both senses different.

    Attributes:
        name: the tensor's.
        status: what of it differs.
        absolute, relative: the largest difference, and that over the largest value; None where there is no comparing.
        detail: both dtypes or shapes, where those differ.
    """

    name: str
    status: Status
    absolute: float | None = None
    relative: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class LayerDifference:
    """One layer's tensors, and for a batch norm why they differ."""

    name: str
    kind: str
    tensors: tuple[TensorDifference, ...]
    causes: tuple[Cause, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs, settings included."""
        return not self.causes and all(one.status == "equal" for one in self.tensors)


@dataclass(frozen=True)
class Difference:
    """What `diff` found.

    Attributes:
        layers: every layer of either, and tensors of no known layer under their own names.
        unmatched: of two frameworks' checkpoints, what was not compared and why.
    """

    layers: tuple[LayerDifference, ...]
    unmatched: tuple[str, ...] = field(default=())

    @property
    def same(self) -> bool:
        """Whether everything was compared, and is equal bit by bit."""
        return not self.unmatched and all(layer.same for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "same": self.same,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "same": layer.same,
                    "causes": [{"code": cause.code, "message": cause.message} for cause in layer.causes],
                    "tensors": [vars(tensor) for tensor in layer.tensors],
                }
                for layer in self.layers
            ],
            "unmatched": list(self.unmatched),
        }


def diff(a: Checkpoint, b: Checkpoint, **options: Any) -> Difference:
    """Compare two checkpoints of one model.

    With no name in common they are taken for two frameworks': the first is then ported to the second's names and
    layouts as far as that is beyond doubt, and what results is compared.

    Args:
        a, b: the checkpoints.
        options: as of `bnlayer.porting.units.units_of`.

    Raises:
        CheckpointError: a tensor cannot be read, or nothing tells whose layouts the tensors have.
    """
    if a and b and not set(a) & set(b):
        return _across(a, b, options)
    return _same_names(units_of(a, **options), units_of(b, **options))


def _across(a: Checkpoint, b: Checkpoint, options: Mapping[str, Any]) -> Difference:
    from ..porting.planning import plan

    made = plan(a, b, source_options=options, target_options=options)
    ported = made.apply(allow_partial=True)
    matched = {match.target: match.source for match in made.matching.matches}
    layers = []
    for unit in made.target.units:
        if unit.name not in matched:
            continue
        tensors = [_compared(name, ported, b) for name in unit.parts.values()]
        causes: Sequence[Cause] = ()
        source = made.source[matched[unit.name]]
        if source.stored is not None and unit.stored is not None:
            # The ported numbers with what the source is: a setting that differs is a cause too.
            one = replace(unit.stored, checkpoint=ported, spec=source.stored.spec, sources=source.stored.sources)
            causes = _causes(one, unit.stored, None, None, tensors)
        layers.append(LayerDifference(f"{matched[unit.name]} -> {unit.name}", unit.kind, tuple(tensors), tuple(causes)))
    return Difference(tuple(layers), tuple(made.report.refusals))


def _same_names(a: Units, b: Units) -> Difference:
    others = {unit.name: unit for unit in b.units}
    layers: list[LayerDifference] = []
    seen: set[str] = set()
    for unit in a.units:
        other = others.get(unit.name)
        names = list(dict.fromkeys([*unit.parts.values(), *(other.parts.values() if other else ())]))
        seen |= set(names)
        tensors = [_compared(name, a.checkpoint, b.checkpoint) for name in names]
        causes: list[Cause] = []
        if unit.stored is not None and other is not None and other.stored is not None:
            causes = _causes(unit.stored, other.stored, _bias(a, unit), _bias(b, other), tensors)
            if any(one.status != "equal" for one in tensors):
                causes += [*_twin(a.checkpoint, unit, other), *_permuted(a, unit, other)]
        layers.append(LayerDifference(unit.name, unit.kind, tuple(tensors), tuple(causes)))
    known = {unit.name for unit in a.units}
    for unit in b.units:
        names = [name for name in unit.parts.values() if unit.name not in known and name not in seen]
        seen |= set(names)
        if names:
            tensors = [_compared(name, a.checkpoint, b.checkpoint) for name in names]
            layers.append(LayerDifference(unit.name, unit.kind, tuple(tensors)))
    rest = [name for name in dict.fromkeys([*a.checkpoint, *b.checkpoint]) if name not in seen]
    layers += [LayerDifference(name, "", (_compared(name, a.checkpoint, b.checkpoint),)) for name in rest]
    return Difference(tuple(layers))


def _compared(name: str, a: Checkpoint, b: Checkpoint) -> TensorDifference:
    if name not in a or name not in b:
        return TensorDifference(name, "only in the second" if name in b else "only in the first")
    x, y = a.tensors[name], b.tensors[name]
    if x.shape != y.shape:
        return TensorDifference(name, "shape", detail=f"{x.shape} and {y.shape}")
    one, two = x.read(), y.read()
    status: Status = "differs"
    if x.dtype != y.dtype:
        status = "dtype"
    elif np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(two).tobytes():
        return TensorDifference(name, "equal", 0.0, 0.0)
    wide = np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64
    with np.errstate(invalid="ignore"):
        change = np.abs(one.astype(wide) - two.astype(wide))
        largest = float(np.max(change, initial=0.0))
        relative = largest / max(float(np.max(np.abs(one.astype(wide)), initial=0.0)), 1e-300)
    detail = f"{x.dtype.name} and {y.dtype.name}" if x.dtype != y.dtype else ""
    if not np.isfinite(largest):
        return TensorDifference(name, status, detail=detail or "a number that is none")
    return TensorDifference(name, status, largest, relative, detail)


def _bias(units: Units, norm: Unit) -> NDArray | None:
    """Of the layer that it follows, as far as names tell."""
    owner = None if norm.owner is None else units[norm.owner]
    return None if owner is None or "bias" not in owner.parts else units.checkpoint[owner.parts["bias"]]


def _causes(
    a: StoredBatchNorm, b: StoredBatchNorm, p: NDArray | None, q: NDArray | None, tensors: Sequence[TensorDifference]
) -> list[Cause]:
    found = causes_of(Side(a, a.state(), p), Side(b, b.state(), q))
    differs = any(one.status in ("differs", "dtype") for one in tensors)
    return found if differs else [cause for cause in found if cause.code in ("epsilon", "decay", "momentum-inverted")]


def _twin(a: Checkpoint, unit: Unit, other: Unit) -> list[Cause]:
    """Whether one holds the exponential moving averages of the other's variables."""
    assert other.stored is not None
    twins = {one.name: one for one in find(a, ema="ema").batch_norms}
    twin = twins.get(unit.name)
    if twin is None or twin.parts == unit.parts or not _equal(twin, other.stored):
        return []
    return [Cause("ema", "the second holds the moving averages of the first's variables")]


def _permuted(a: Units, unit: Unit, other: Unit) -> list[Cause]:
    """Whether the other has what another layer of the first has."""
    assert other.stored is not None
    peers = [one for one in a.units if one.stored is not None and one.name != unit.name and one.shape == unit.shape]
    same = [one.name for one in peers if one.stored is not None and _equal(one.stored, other.stored)]
    if len(same) != 1:
        return []
    return [Cause("order", f"the second has here what the first has in {same[0]}: layers exchanged")]


def _equal(a: StoredBatchNorm, b: StoredBatchNorm) -> bool:
    one, two = a.state().arrays(), b.state().arrays()
    return one.keys() == two.keys() and all(
        alike(one[role].astype(np.float64), two[role].astype(np.float64)) for role in one
    )
