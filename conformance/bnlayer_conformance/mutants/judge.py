"""Judge the suite by its mutants: which vector catches which, by how much; `python -m bnlayer_conformance.mutants`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Final

from .. import vector
from ..runner import run_vector
from ..vector import Vector
from . import base
from .build import Mutant, build, source
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
    invalid one. Vectors on which the base does not come to the mutant's line are left out: they cannot tell the two
    apart.
    """
    vectors = vector.load() if vectors is None else vectors
    reached = {candidate.id: _reached(candidate) for candidate in vectors}
    lines = source().splitlines()
    inside = _lines(compile(source(), base.__file__, "exec"), inside=False)
    for mutant in mutants:
        number = next((n for n, line in enumerate(lines, 1) if line.strip() == mutant.line), 0)
        backend = build(mutant)
        caught = []
        for candidate in vectors:
            if not may_catch(candidate, mutant) or (number in inside and number not in reached[candidate.id]):
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


def _reached(candidate: Vector) -> set[int]:
    """The numbers of the base's lines that run in this vector."""
    seen: set[int] = set()

    def in_the_base(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen.add(frame.f_lineno)
        return in_the_base

    def calls(frame: FrameType, _: str, __: Any) -> Any:
        return in_the_base if frame.f_code.co_filename == base.__file__ else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        run_vector(candidate, base.BACKEND)
    finally:
        sys.settrace(before)
    return seen


def _lines(code: CodeType, *, inside: bool = True) -> set[int]:
    """The numbers of the lines that the functions of a module run; what runs at its import is not among them."""
    own = (
        {line for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno} if inside else set()
    )
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            own |= _lines(constant, inside=not constant.co_name[0].isupper())  # a class body runs at import too
    return own


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
