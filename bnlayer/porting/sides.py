"""A live model under verification: its layers by the names that porting has for them, run and put back at will."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..contract import LayerRecord, ModelAdapter
from ..errors import PortError
from ..registry import adapter
from ..spec import BatchNormSpec
from .replay import NDArray, Seen, Step, Values
from .units import Unit, Units, units_of


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass.

    Attributes:
        output: the model's.
        layers: batch norms by the units' names, in the order of their calls, to (input, output), channels last.
        depth: how many layers it went through.
        moved: the batch norms whose moving statistics it moved.
    """

    output: NDArray
    layers: Mapping[str, tuple[NDArray, NDArray]]
    depth: int
    moved: tuple[str, ...] = ()

    def seen(self, name: str) -> Seen:
        """What went through a batch norm."""
        return Seen.of(self.layers[name], -1)


@dataclass
class Side:
    """One of the two models.

    Attributes:
        word: "source" or "target".
        reach: its adapter.
        model: as it is now; another object after a run where models are immutable.
        original: its tensors as they came.
        held: its tensors as `put` left them.
        records: its batch norms as they came, by the units' names.
        specs: the specs that it has now, likewise.
    """

    word: str
    reach: ModelAdapter
    model: Any
    original: Checkpoint
    held: Checkpoint
    records: dict[str, LayerRecord]
    specs: dict[str, BatchNormSpec]
    dialect: str | None = None

    @classmethod
    def of(cls, word: str, model: Any, dialect: str | None = None) -> Side:
        """A model, read.

        Raises:
            UnknownBackend: no adapter knows such a model.
            PortError: its batch norms are not those of its tensors.
        """
        reach = adapter(model)
        checkpoint = reach.read(model)
        units = units_of(checkpoint, dialect=dialect)
        found = reach.batch_norms(model)
        records = _by_unit(word, found, [u for u in units.units if u.kind == "batch norm"])
        specs = {name: r.spec for name, r in records.items() if r.spec is not None}
        return cls(word, reach, model, checkpoint, checkpoint, records, specs, dialect)

    def units(self, checkpoint: Checkpoint | None = None) -> Units:
        """Its layers, with the tensors that it holds now or with others under the same names."""
        return units_of(checkpoint or self.reach.read(self.model), dialect=self.dialect)

    def put(self, checkpoint: Checkpoint, specs: Mapping[str, BatchNormSpec] | None = None) -> None:
        """Give it other tensors, and its batch norms of these names other settings.

        Raises:
            UnsupportedError: the settings are in the model's code.
        """
        if specs:
            self.model = self.reach.configure(self.model, {self.records[n].name: spec for n, spec in specs.items()})
            self.specs.update(specs)
        self.model = self.reach.write(self.model, checkpoint)
        self.held = checkpoint

    def restore(self) -> None:
        """Give it its own back."""
        own = {name: r.spec for name, r in self.records.items() if r.spec is not None}
        self.put(self.original, {name: spec for name, spec in own.items() if spec != self.specs[name]})

    def run(self, x: NDArray, *, training: bool = False, keep: bool = False) -> Pass:
        """One forward pass. What it moves is put back, unless `keep`."""
        before = values_of(self.units(self.held)) if not keep else {}
        run = self.reach.run(self.model, x, training=training, capture=True)
        self.model = run.model
        moved: tuple[str, ...] = ()
        if not keep:
            after = values_of(self.units())
            moved = tuple(name for name, v in after.items() if not _same(v, before[name]))
            if moved or training:
                self.model = self.reach.write(self.model, self.held)
        names = {record.name: name for name, record in self.records.items()}
        layers = {
            names[name]: tuple(np.moveaxis(np.asarray(a), self._axis(names[name], a), -1) for a in pair)
            for name, pair in run.layers.items()
            if name in names
        }
        return Pass(np.asarray(run.output), layers, max(len(run.calls), len(layers), 1), moved)  # type: ignore[arg-type]

    def train(self, xs: list[NDArray]) -> tuple[list[NDArray], dict[str, list[Step]]]:
        """The outputs of training steps, and what each did to every batch norm; its tensors are put back after."""
        steps: dict[str, list[Step]] = {}
        outputs = []
        before = values_of(self.units())
        for x in xs:
            done = self.run(x, training=True, keep=True)
            outputs.append(done.output)
            after = values_of(self.units())
            for name in done.layers:
                steps.setdefault(name, []).append(Step(before[name], after[name], done.seen(name)))
            before = after
        self.model = self.reach.write(self.model, self.held)
        return outputs, steps

    def _axis(self, name: str, array: NDArray) -> int:
        spec = self.specs.get(name)
        return -1 if spec is None or not -array.ndim <= spec.axis < array.ndim else spec.axis


def values_of(units: Units) -> dict[str, Values]:
    """The numbers of every batch norm."""
    return {u.name: values(u) for u in units.units if u.kind == "batch norm"}


def values(unit: Unit) -> Values:
    """The numbers of a batch norm; a parameter that it has not is the neutral one."""
    assert unit.stored is not None
    state = unit.stored.state()

    def wide(array: NDArray | None, neutral: float) -> NDArray:
        return np.full(unit.shape, neutral) if array is None else np.asarray(array).reshape(-1).astype(np.float64)

    return Values(
        wide(state.gamma, 1), wide(state.beta, 0), wide(state.moving_mean, 0), wide(state.moving_variance, 1)
    )  # fmt: skip


def with_tensors(checkpoint: Checkpoint, tensors: Mapping[str, NDArray]) -> Checkpoint:
    """The checkpoint with some other values, none of them unknown."""
    return checkpoint.replace({name: a for name, a in tensors.items() if name in checkpoint.tensors})


def at_start(values: Values) -> bool:
    """Whether the moving statistics are a new layer's."""
    return bool((values.mean == 0).all() and ((values.variance == 1).all() or (values.variance == 0).all()))


def _same(a: Values, b: Values) -> bool:
    return np.array_equal(a.mean, b.mean, equal_nan=True) and np.array_equal(a.variance, b.variance, equal_nan=True)


def _by_unit(word: str, records: Any, units: list[Unit]) -> dict[str, LayerRecord]:
    """The records by the names of the units that they are: the same name, or else the same place."""
    found = {record.name: record for record in records}
    linked = {u.name: found.pop(u.name) for u in units if u.name in found}
    for u in units:
        if u.name not in linked and u.stored is not None and u.stored.name in found:
            linked[u.name] = found.pop(u.stored.name)
    left = [u for u in units if u.name not in linked]
    rest = list(found.values())
    sizes = [None if r.spec is None else r.spec.num_features for r in rest]
    if len(left) != len(rest) or any(n not in (None, u.channels) for n, u in zip(sizes, left, strict=True)):
        raise PortError(
            f"the {word} model's batch norms ({', '.join(r.name for r in rest[:5])}) are not those of its tensors"
            f" ({', '.join(u.name for u in left[:5])}); verify models that hold their batch norms as layers."
        )
    linked.update({u.name: r for u, r in zip(left, rest, strict=True)})
    return {u.name: replace(linked[u.name]) for u in units}
