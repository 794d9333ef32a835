"""What a port did with every tensor: exact, converted, assumed, lossy, not carried, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .matching import Matching

SECTIONS: Final = ("exact", "converted", "assumed", "lossy", "not_carried", "warnings")
_TITLES: Final = {"exact": "EXACT", "converted": "CONVERTED", "assumed": "ASSUMED", "lossy": "LOSSY",
                  "not_carried": "NOT CARRIED", "warnings": "WARNING"}  # fmt: skip
_SHOWN: Final = 3


@dataclass(frozen=True)
class Note:
    """One line: what happened, and to which tensors or layers."""

    what: str
    names: tuple[str, ...]


@dataclass
class Report:
    """A port's report.

    Attributes:
        matching: which layer got whose weights, and what could not be decided.
        notes: by section (`SECTIONS`), what happened to which names.
        refusals: why nothing was written, or what `--allow-partial` let pass.
        verification: what running both models found; empty where nobody asked.
    """

    matching: Matching
    notes: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {section: {} for section in SECTIONS})
    refusals: list[str] = field(default_factory=list)
    verification: dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, what: str, *names: str) -> None:
        """Say that `what` happened to these names; equal words are gathered."""
        self.notes[section].setdefault(what, []).extend(names)

    def section(self, section: str) -> list[Note]:
        """The notes of a section."""
        return [Note(what, tuple(names)) for what, names in self.notes[section].items()]

    @property
    def losses(self) -> bool:
        """Whether anything was lost or left behind."""
        return bool(self.notes["lossy"] or self.notes["not_carried"] or self.refusals)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        m = self.matching
        return {
            "matches": [
                {"source": one.source, "target": one.target, "kind": one.kind, "votes": list(one.votes)}
                for one in m.matches
            ],
            **{
                section: [{"what": n.what, "names": list(n.names)} for n in self.section(section)]
                for section in SECTIONS
            },
            "ambiguous": [
                {"sources": list(one.sources), "targets": list(one.targets), "reason": one.reason}
                for one in m.ambiguous
            ],
            "unmatched_source": list(m.unmatched_source),
            "unmatched_target": list(m.unmatched_target),
            "refusals": list(self.refusals),
            "verification": self.verification,
        }

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        votes: dict[str, int] = {}
        for one in self.matching.matches:
            kinds[one.kind] = kinds.get(one.kind, 0) + 1
            votes["+".join(one.votes)] = votes.get("+".join(one.votes), 0) + 1
        lines = [
            f"{len(self.matching.matches)} layers matched: {_counted(kinds)}",
            f"  by {_counted(votes)}" if votes else "",
        ]
        rows = [(_TITLES[section], f"{n.what}{_some(n.names)}") for section in SECTIONS for n in self.section(section)]
        rows += [
            ("AMBIGUOUS", f"{one.reason}: {_listed(one.sources)} -> {_listed(one.targets)}")
            for one in self.matching.ambiguous
        ]
        rows += [("REFUSED", refusal) for refusal in self.refusals]
        steps, causes = self.verification.get("steps", ()), self.verification.get("causes", ())
        rows += [("VERIFIED" if step["ok"] else "FAILED", f"{step['name']}: {step['text']}") for step in steps]
        rows += [("CAUSE", cause["text"]) for cause in causes]
        lines += [f"{title:12}{text}" for title, text in rows]
        return "\n".join(line for line in lines if line)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), key=lambda item: -item[1]))


def _some(names: tuple[str, ...]) -> str:
    return f" ({len(names)}: {_listed(names)})" if len(names) > 1 else f" ({names[0]})" if names else ""


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
