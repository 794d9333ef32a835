"""Moving statistics made those of a whole data set, for the weights that the model has now.

Each batch goes through the model in training mode: every batch norm normalizes with its own batch's statistics, as it
did when the weights were trained, and what comes into it is counted. (So layers further up see what they saw in
training, not what the new statistics would give them.) Batches and shards add up exactly, the differences between their
means included, which an average of variances loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..contract import LayerRecord
from ..errors import InputError
from ..porting.states import tensors_for
from ..porting.units import units_of
from ..registry import adapter
from ..spec import BatchNormSpec
from .edits import NDArray, Note, chosen, silent
from .formulas import with_statistics
from .moments import Moments


@dataclass(frozen=True, eq=False)
class Population:
    """What went through a model: each batch norm's moments by name, and how many batches there were.

    `+` joins those of several shards; the batches of all of them count.
    """

    layers: Mapping[str, Moments]
    batches: int

    def __add__(self, other: Population) -> Population:
        if self.layers.keys() != other.layers.keys():
            raise InputError(f"the shards are of different batch norms: {list(self.layers)}, {list(other.layers)}.")
        joined = {name: moments + other.layers[name] for name, moments in self.layers.items()}
        return Population(joined, self.batches + other.batches)


def population(model: Any, batches: Iterable[NDArray], names: str | Iterable[str] | None = None) -> Population:
    """The moments of what comes into each batch norm when it trains on these batches; the model is as it was after.

    A batch norm that is called several times is counted by its first call. One whose statistics are frozen, or that is
    not called, has none (count 0).

    Args:
        model: of any framework with an adapter.
        batches: arrays, the batch first and the channels last.
        names: of the batch norms, patterns; None: all.

    Raises:
        UnknownBackend: no adapter knows such a model.
        CheckpointError: a pattern matches nothing.
        InputError: a batch norm cannot be read.
    """
    reach = adapter(model)
    records = chosen(reach.batch_norms(model), names)
    tracked = {one.name: _spec(one) for one in records}
    tracked = {name: spec for name, spec in tracked.items() if spec.track_moving_stats}
    sums = {name: Moments.none(spec.num_features) for name, spec in tracked.items()}
    before, count = reach.read(model), 0
    moved: set[str] = set()
    try:
        for batch in batches:
            run = reach.run(model, np.asarray(batch), training=True, capture=True)
            model = run.model
            count += 1
            if count == 1:
                moved = _moved(before, reach.read(model))
            for name in sums.keys() & run.layers.keys() & moved:
                sums[name] += Moments.of(run.layers[name][0], tracked[name].axis)
    finally:
        reach.write(model, before)
    return Population(sums, count)


def recalibrate(
    model: Any,
    batches: Iterable[NDArray],
    names: str | Iterable[str] | None = None,
    *,
    reduce: Callable[[Population], Population] | None = None,
    note: Note = silent,
) -> Any:
    """The model with the moving statistics of these batches; all else keeps its bits.

    The variance is by the layer's own estimator, over all values of all batches. Counters stay, but for two: a
    cumulative average counts the batches, so that training goes on from them; a zero-debiased one is set to where its
    hidden average is the plain one.

    Args:
        model, batches, names: as of `population`.
        reduce: joins the populations of several processes, each of which has a shard of the data.
        note: told what was done.

    Returns:
        The model; the same object where the framework's models are mutable.

    Raises:
        As `population`; InputError: there was no batch.
    """
    found = population(model, batches, names)
    found = found if reduce is None else reduce(found)
    reach = adapter(model)
    before = reach.read(model)
    return reach.write(model, before.replace(statistics(before, found, note)))


def statistics(checkpoint: Checkpoint, found: Population, note: Note = silent) -> dict[str, NDArray]:
    """The tensors of a checkpoint that a population changes.

    Args:
        checkpoint: as `ModelAdapter.read` gives it.
        found: of the same model.
        note: told what was done.

    Raises:
        InputError: there was no batch.
    """
    if not found.batches:
        raise InputError("there was no batch to take statistics of.")
    norms = {unit.name: unit.stored for unit in units_of(checkpoint).units if unit.stored is not None}
    changes: dict[str, NDArray] = {}
    for name, moments in found.layers.items():
        if not moments.count:
            note("warnings", "not called, or its statistics are frozen: left as it was", name)
            continue
        stored = norms[name]
        spec, state = stored.spec, stored.state()
        state = with_statistics(state, spec, moments.mean, moments.variance(spec.moving_variance_estimator))
        if spec.decay == "cumulative":
            state = state.replace(num_updates=found.batches)
        made = tensors_for(stored, spec, state.replace(hidden_mean=None, hidden_variance=None), note)
        for role in ("renorm_mean", "renorm_stddev", "moving_stddev"):
            if role in stored.parts:
                tensor = stored.parts[role]
                made[tensor] = getattr(state, role).reshape(checkpoint.tensors[tensor].shape)
        changes |= made
        note("converted", f"statistics of {found.batches} batches", name)
    return changes


def _spec(record: LayerRecord) -> BatchNormSpec:
    if record.spec is None:
        raise InputError(f"{record.name} cannot be recalibrated: {record.reason}")
    return record.spec


def _moved(before: Checkpoint, after: Checkpoint) -> set[str]:
    """The batch norms whose statistics a batch has moved."""
    return {
        unit.name
        for unit in units_of(before).units
        if unit.stored is not None
        and any(
            not np.array_equal(before[name], after[name], equal_nan=True)
            for role, name in unit.parts.items()
            if role not in ("gamma", "beta")
        )
    }
