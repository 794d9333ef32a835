"""Judge the suite by its mutants: which vector catches which, by how much; `python -m bnlayer_conformance.mutants`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from .. import vector
from ..runner import run_vector
from ..vector import Vector
from .build import Mutant, build
from .catalogue import MUTANTS

MARGIN: Final = 10.0  # tolerances: a mistake closer than that could pass for rounding on another machine


@dataclass(frozen=True)
class Caught:
    """What caught a mutant: a vector, its observable, and the error in tolerances (infinite for NaN, shape, dtype)."""

    vector: str
    group: str
    observable: str
    ratio: float


@dataclass(frozen=True)
class Verdict:
    """One mutant and everything that catches it by at least `MARGIN`, in the vectors' order."""

    mutant: Mutant
    caught: tuple[Caught, ...]

    @property
    def groups(self) -> frozenset[str]:
        """The groups that catch it."""
        return frozenset(c.group for c in self.caught)


def judge(mutants: Iterable[Mutant] = MUTANTS, vectors: Sequence[Vector] | None = None) -> Iterator[Verdict]:
    """Run the mutants over the vectors that may catch them.

    A mutant counts as caught by a valid vector in float32 alone; one marked `only` by a vector of that dtype, or by an
    invalid one.
    """
    vectors = vector.load() if vectors is None else vectors
    for mutant in mutants:
        backend = build(mutant)
        caught = []
        for candidate in vectors:
            if not may_catch(candidate, mutant):
                continue
            result = run_vector(candidate, backend)
            if result.status == "fail" and result.ratio >= MARGIN:
                caught.append(Caught(candidate.id, candidate.group, result.observable, result.ratio))
        yield Verdict(mutant, tuple(caught))


def may_catch(candidate: Vector, mutant: Mutant) -> bool:
    """Whether a vector counts for a mutant."""
    if mutant.only == "invalid":
        return candidate.result == "invalid"
    if candidate.result != "valid":
        return False
    return dtypes(candidate) <= {"float32"} if not mutant.only else mutant.only in dtypes(candidate)


def dtypes(candidate: Vector) -> set[str]:
    """The float dtypes a vector computes with."""
    used = {str(candidate.spec["param_dtype"]), str(candidate.spec["stats_dtype"])}
    return used | {call.x.dtype.name for step in candidate.steps for call in step.calls}


def unique(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """For each group, the mutants that it catches and no other group does."""
    alone: dict[str, list[str]] = {}
    for verdict in verdicts:
        if len(verdict.groups) == 1:
            (group,) = verdict.groups
            alone.setdefault(group, []).append(verdict.mutant.name)
    return alone
