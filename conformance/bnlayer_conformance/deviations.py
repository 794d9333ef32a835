"""Known deviations of native layers: where a framework's own batch norm is known to differ from the vectors.

A file beside the target, one deviation a line, `#` for comments:

    GLOB OF VECTOR IDS | OBSERVABLES | KIND | REASON | PUBLIC REFERENCE OR -

OBSERVABLES are globs with commas between them ("dx", "moving_*, y", "*"; "error" and "refusal" are a vector that raised
what it should not, and one that was not refused as it should be). A failing vector becomes a "deviation" where lines
explain every observable that failed, each by the first line that does. A line that is no failure's first, in the
vectors that ran, is stale, and an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from bnlayer.errors import FileError

from .compare import Finding
from .runner import Result, Target

KINDS: Final = {
    "definition": "another formula than the definition's",
    "accuracy": "the right formula, with more rounding error than a stable computation has",
    "gradient": "a wrong derivative of a right result",
    "edge": "empty batches, one value per channel, values that are not finite",
    "dtype": "another dtype than the definition's",
    "refusal": "accepts what has no meaning, or refuses what has one",
}


@dataclass(frozen=True)
class Deviation:
    """One line of a deviations file."""

    vectors: str
    observables: str
    kind: str
    reason: str
    reference: str

    def about(self, vector: str) -> bool:
        """Whether this line is about the vector of that id."""
        return fnmatchcase(vector, self.vectors)

    def explains(self, vector: str, failure: Finding) -> bool:
        """Whether this line is about that failure."""
        names = (name.strip() for name in self.observables.split(","))
        return self.about(vector) and any(fnmatchcase(failure.observable, name) for name in names)


def read(path: Path) -> list[Deviation]:
    """The deviations of a file.

    Raises:
        FileError: a line does not have its five parts, or its kind is unknown; the message names it.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        parts = [part.strip() for part in text.split("|")]
        if len(parts) != 5 or not all(parts):
            raise FileError(
                f"{path.name}, line {number}: expected GLOB | OBSERVABLES | KIND | REASON | REFERENCE; got {text!r}."
            )
        if parts[2] not in KINDS:
            raise FileError(
                f"{path.name}, line {number}: the kind must be one of {', '.join(KINDS)}; got {parts[2]!r}."
            )
        found.append(Deviation(*parts))
    return found


def of(target: Target) -> list[Deviation]:
    """The known deviations of a target; none for a backend of the full spec.

    Raises:
        FileError: as `read`.
    """
    from bnlayer.contract import NativeBackend

    return read(target.backend.deviations) if isinstance(target.backend, NativeBackend) else []


def mark(result: Result, known: Sequence[Deviation]) -> Result:
    """The result, a "deviation" where each of its failures is known, with the reasons before what happened."""
    if result.status not in ("fail", "error"):
        return result
    lines = tuple(
        next((number for number, line in enumerate(known) if line.explains(result.vector, failure)), None)
        for failure in result.failures
    )
    if None in lines:
        # What is not known comes first in the report.
        unknown = next(f for f, line in zip(result.failures, lines, strict=True) if line is None)
        return replace(
            result,
            lines=lines,
            observable="" if unknown.observable == "error" else unknown.observable,
            error=unknown.error,
            tolerance=unknown.tolerance,
            reason=unknown.reason,
            ratio=unknown.ratio,
        )
    reasons = dict.fromkeys(known[line].reason for line in lines if line is not None)
    return replace(result, status="deviation", reason=f"{'; '.join(reasons)}: {result.reason}", lines=lines)


def apply(results: Sequence[Result], known: Iterable[Deviation], vectors: Sequence[str]) -> list[Result]:
    """The results of one target with its known deviations marked, and a result of status "error" for each stale line.

    Args:
        results: of one target, over `vectors`.
        known: the target's deviations.
        vectors: the ids that ran: a line about none of them is not stale, it was not asked.
    """
    known = list(known)
    marked = [mark(result, known) for result in results]
    target = results[0].target if results else ""
    needed = {line for result in marked for line in result.lines}
    for number, line in enumerate(known):
        about = [vector for vector in vectors if line.about(vector)]
        if about and number not in needed:
            again = any(line.explains(r.vector, f) for r in results for f in r.failures)
            why = "says what lines before it say" if again else "no longer happens"
            reason = f"stale deviation: {line.vectors} | {line.observables} {why}; delete the line"
            marked.append(Result(about[0], about[0].split("/")[0], target, "error", line.observables, reason=reason))
    return marked
