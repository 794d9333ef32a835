"""Known deviations of native layers: where a framework's own batch norm is known to differ from the vectors.

A file beside the target, one deviation a line, `#` for comments:

    GLOB OF VECTOR IDS | OBSERVABLE | REASON | PUBLIC REFERENCE OR -

A failure (or error) whose vector and observable match a line becomes a "deviation"; a line that matches no failure of
the vectors that ran is stale, and an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from bnlayer.errors import FileError

from .runner import Result


@dataclass(frozen=True)
class Deviation:
    """One line of a deviations file."""

    vectors: str
    observable: str
    reason: str
    reference: str

    def explains(self, result: Result) -> bool:
        """Whether this line is about that failure."""
        return (
            result.status in ("fail", "error")
            and fnmatchcase(result.vector, self.vectors)
            and fnmatchcase(result.observable or result.status, self.observable)
        )


def read(path: Path) -> list[Deviation]:
    """The deviations of a file.

    Raises:
        FileError: a line does not have its four parts; the message names it.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        parts = [part.strip() for part in text.split("|")]
        if len(parts) != 4 or not all(parts):
            raise FileError(
                f"{path.name}, line {number}: expected GLOB | OBSERVABLE | REASON | REFERENCE; got {text!r}."
            )
        found.append(Deviation(*parts))
    return found


def apply(results: Sequence[Result], known: Iterable[Deviation], vectors: Sequence[str]) -> list[Result]:
    """The results of one target with its known deviations marked, and a result of status "error" for each stale line.

    Args:
        results: of one target, over `vectors`.
        known: the target's deviations.
        vectors: the ids that ran: a line about none of them is not stale, it was not asked.
    """
    known = list(known)
    marked = [_marked(result, known) for result in results]
    target = results[0].target if results else ""
    for line in known:
        about = [vector for vector in vectors if fnmatchcase(vector, line.vectors)]
        if about and not any(line.explains(result) for result in results):
            reason = f"stale deviation: {line.vectors} | {line.observable} no longer happens; delete the line"
            marked.append(Result(about[0], about[0].split("/")[0], target, "error", line.observable, reason=reason))
    return marked


def _marked(result: Result, known: list[Deviation]) -> Result:
    line = next((line for line in known if line.explains(result)), None)
    if line is None:
        return result
    return replace(result, status="deviation", reason=f"{line.reason} ({line.reference}); {result.reason}")
