"""Layers of equal shape, exchanged with the batch norms that belong to them: which is which, decided by running."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import UnsupportedError
from .matching import Match
from .noise import difference, input_of, tolerance_of
from .pairing import remade
from .planning import Plan
from .replay import NDArray
from .sides import Side, with_tensors
from .units import Unit, Units

_MOST_RUNS: Final = 100  # forward passes; a search beyond is no proof but luck
# A wrong order is an error of the size of the outputs; the right one, of their rounding. What lies between is neither.
_APART: Final = 100.0


@dataclass(frozen=True)
class Swap:
    """A pair of layers that a run decided.

    Attributes:
        source, target: their names.
        before: the outputs' error with the order that the files have.
        after: with the order that was chosen, this pair in it.
        next_best: the least error of those that exchange this pair with another.
    """

    source: str
    target: str
    before: float
    after: float
    next_best: float


def groups(units: Units) -> dict[str, tuple[Unit, ...]]:
    """Each layer with the batch norms that belong to it; batch norms of none stand alone."""
    found: dict[str, list[Unit]] = {}
    known = {u.name for u in units.units}
    for u in units.units:
        if u.stored is None or u.owner is None or u.owner not in known:
            found[u.name] = [u]
    for u in units.units:
        if u.stored is not None and u.owner is not None and u.owner in known:
            found[u.owner].append(u)
    return {name: tuple(members) for name, members in found.items()}


def exchanges(units: Units) -> list[tuple[str, str]]:
    """Every pair of groups whose tensors have the same shapes."""
    tensors = units.checkpoint.tensors
    classes: dict[Any, list[str]] = defaultdict(list)
    for name, members in groups(units).items():
        key = tuple((u.kind, tuple((role, tensors[t].shape) for role, t in sorted(u.parts.items()))) for u in members)
        classes[key].append(name)
    return [pair for names in classes.values() for pair in combinations(names, 2)]


def exchanged(checkpoint: Checkpoint, units: Units, a: str, b: str) -> Checkpoint:
    """The checkpoint with the tensors of two groups exchanged."""
    every = groups(units)
    changes: dict[str, NDArray] = {}
    for one, other in zip(every[a], every[b], strict=True):
        for role, tensor in one.parts.items():
            changes[tensor], changes[other.parts[role]] = checkpoint[other.parts[role]], checkpoint[tensor]
    return with_tensors(checkpoint, changes)


def find_exchanges(
    checkpoint: Checkpoint,
    units: Units,
    error: Callable[[Checkpoint], float],
    suspect: Callable[[Checkpoint], str | None],
    tolerance: float,
) -> tuple[list[tuple[str, str]], float]:
    """The exchanges that bring the error to rounding level, and what it is then; none where none do.

    Local improvement: the best exchange first, then the best after it, and so on.

    Args:
        error: of the outputs with these tensors.
        suspect: the group from which on the models differ: one of the exchanged; None: it cannot be told.
        tolerance: rounding level.
    """
    chosen: list[tuple[str, str]] = []
    every = exchanges(units)
    least, runs = np.inf, 0
    while True:
        first = suspect(checkpoint)
        pairs = [pair for pair in every if first is None or first in pair]
        if not pairs or runs + len(pairs) > _MOST_RUNS:
            break
        trials = []
        for a, b in pairs:
            trials.append((error(exchanged(checkpoint, units, a, b)), a, b))
            runs += 1
            if trials[-1][0] <= tolerance:
                break
        best, a, b = min(trials)
        if not best < least:
            break
        least, checkpoint = best, exchanged(checkpoint, units, a, b)
        chosen.append((a, b))
        if best <= tolerance:
            return chosen, best
    return [], float(least)


def try_swaps(
    plan: Plan, source_model: Any, target_model: Any, shape: tuple[int, ...] = (2, 65, 65, 3), *, seed: int = 0
) -> list[Swap]:
    """Decide what a plan could not: which layers of equal shape are which, by running both models.

    It starts from the order that the files have, exchanges pairs (each with its batch norms) while that lowers the
    outputs' error, and accepts a pair only if the error ends at rounding level, and every exchange of it is far worse.

    Args:
        plan: with ambiguous classes; their layers have the names that the live models' have.
        source_model, target_model: live; they get their own tensors back.
        shape: of the input; the batch first, channels last.

    Returns:
        The pairs that are certain now, as `Match` them by hand; empty where running does not tell.
    """
    source, target = Side.of("source", source_model), Side.of("target", target_model)
    start = _proposed(plan)
    if not start:
        return []
    x = input_of(shape, seed)
    try:
        done = source.run(x)
        tolerance = tolerance_of(source, x, done)

        def error(pairs: Mapping[str, str]) -> float:
            matches = (*plan.matching.matches, *(Match(s, t, "", ("run",)) for s, t in pairs.items()))
            trial = remade(source, target, matches, plan)
            target.put(trial.apply(allow_partial=True))
            return difference(done.output, target.run(x).output)

        _carry_epsilon(plan, start, source, target)
        before = best = error(start)
        chosen, classes = dict(start), _classes(plan, start)
        runs = 0
        improved = True
        while improved and best > tolerance and runs < _MOST_RUNS:
            improved = False
            for a, b in classes:
                trial = _exchanged(plan, chosen, a, b)
                found = error(trial)
                runs += 1
                if found < best:
                    best, chosen, improved = found, trial, True
        if best > tolerance:
            return []
        rivals: dict[str, float] = dict.fromkeys(chosen, np.inf)
        for a, b in classes:
            trial = _exchanged(plan, chosen, a, b)
            found = error(trial)
            for name, goal in trial.items():
                if chosen[name] != goal:
                    rivals[name] = min(rivals[name], found)
        return [
            Swap(s, t, before, best, rivals[s]) for s, t in chosen.items() if rivals[s] > _APART * max(best, tolerance)
        ]
    finally:
        source.restore()
        target.restore()


def _proposed(plan: Plan) -> dict[str, str]:
    """The order's proposals, batch norms following the layers that they belong to."""
    pairs = {s: t for one in plan.matching.ambiguous for s, t in one.proposal}
    return _following(plan, pairs)


def _following(plan: Plan, pairs: dict[str, str]) -> dict[str, str]:
    owned = {u.owner: u.name for u in plan.target.units if u.stored is not None and u.owner is not None}
    for s in list(pairs):
        owner = plan.source[s].owner
        if plan.source[s].stored is not None and owner in pairs and pairs[owner] in owned:
            pairs[s] = owned[pairs[owner]]
    return pairs


def _classes(plan: Plan, pairs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of source layers that may be exchanged: of one ambiguous class, and free to move by themselves."""
    owned = {u.owner for u in plan.target.units if u.stored is not None}

    def free(name: str) -> bool:
        owner = plan.source[name].owner
        return plan.source[name].stored is None or owner is None or pairs.get(owner) not in owned

    names = [[s for s, _ in one.proposal if free(s)] for one in plan.matching.ambiguous]
    return [pair for one in names for pair in combinations(one, 2)]


def _exchanged(plan: Plan, pairs: Mapping[str, str], a: str, b: str) -> dict[str, str]:
    return _following(plan, {**pairs, a: pairs[b], b: pairs[a]})


def _carry_epsilon(plan: Plan, pairs: Mapping[str, str], source: Side, target: Side) -> None:
    """Epsilon as the source has it, where the target's layers can have another: the order alone is asked for."""
    if plan.epsilon == "shift":
        return
    partners = {**{m.source: m.target for m in plan.matching.matches}, **pairs}
    specs = {
        t: replace(target.specs[t], epsilon=source.specs[s].epsilon)
        for s, t in partners.items()
        if s in source.specs and t in target.specs and source.specs[s].epsilon != target.specs[t].epsilon
    }
    try:
        target.put(target.held, specs)
    except UnsupportedError:
        return  # the code has it; the error stays, and the search then decides nothing
