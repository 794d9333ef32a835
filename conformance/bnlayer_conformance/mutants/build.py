"""Make a mutant: the base's source with one line changed, run as a module of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import files
from types import ModuleType
from typing import Any

from bnlayer.errors import BatchNormError


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what is wrong, in a few words.
        line: the base's line that is changed (without its indentation; it occurs once there).
        becomes: what it is changed to.
        seen: where this mistake was made: a framework, a public issue, or "" for an invented one.
        only: dtype or result that alone can show it ("float16", "float64", "invalid"), or "" where float32 must.
    """

    name: str
    line: str
    becomes: str
    seen: str = ""
    only: str = ""


class MutantError(BatchNormError):
    """A mutant's line does not occur in the base, or not once."""


def source() -> str:
    """The base's source text."""
    return (files("bnlayer_conformance.mutants") / "base.py").read_text("utf-8")


def build(mutant: Mutant) -> Any:
    """The mutant's backend object.

    Raises:
        MutantError: its line does not occur exactly once in the base, or the change is none.
    """
    lines = source().splitlines()
    at = [i for i, line in enumerate(lines) if line.strip() == mutant.line]
    if len(at) != 1 or mutant.becomes == mutant.line or "\n" in mutant.becomes:
        raise MutantError(f"mutant {mutant.name!r}: its line occurs {len(at)} times in the base, or is not changed.")
    indentation = lines[at[0]][: len(lines[at[0]]) - len(mutant.line)]
    lines[at[0]] = indentation + mutant.becomes
    module = ModuleType(f"{__package__}.made.{mutant.name.replace(' ', '_')}")
    sys.modules[module.__name__] = module  # dataclasses look their module up while the class is made
    try:
        exec(compile("\n".join(lines), f"<mutant: {mutant.name}>", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module.__dict__["BACKEND"]
