"""The vector tool: write the vectors from their cases, or check that the files are what it would write."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import click

from .. import SUITE
from ..vector import SCHEMA, parse
from . import cases
from .case import vector

FOLDER = Path(__file__).parent.parent / "vectors"


@click.group()
def main() -> None:
    """Write and check the conformance vectors.

    The cases are in authoring/cases, one module per group; the expected numbers come from the oracle. Nobody edits the
    JSON by hand.
    """


@main.command()
@click.argument("groups", nargs=-1)
def write(groups: tuple[str, ...]) -> None:
    """Write the vectors of GROUPS (all without any)."""
    for group in groups or names():
        text = render(document(group))
        (FOLDER / f"{group}.json").write_text(text, "utf-8")
        click.echo(f"{group}: {text.count(chr(10))} lines, {len(text) // 1024} KiB")


@main.command()
def check() -> None:
    """Regenerate every vector, compare byte for byte, and check the schema; exit 1 if a file differs."""
    stale = [group for group in names() if not _same(group)]
    extra = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem not in names())
    for group in stale:
        click.echo(
            f"{group}.json is not what its cases give; run: python -m bnlayer_conformance.authoring write {group}"
        )
    for group in extra:
        click.echo(f"{group}.json has no cases; delete it")
    problems = [problem for group in names() for problem in lint(document(group), group)]
    for problem in problems:
        click.echo(problem)
    if stale or extra or problems:
        sys.exit(1)
    click.echo(f"{len(names())} groups are up to date")


def names() -> list[str]:
    """The groups that have cases."""
    return sorted(module.name for module in iter_modules(cases.__path__))


def document(group: str) -> dict[str, Any]:
    """A group's vectors, as its file holds them."""
    module = import_module(f"{cases.__name__}.{group}")
    return {
        "schema": SCHEMA,
        "suite": SUITE,
        "group": group,
        "purpose": module.PURPOSE,
        "vectors": [vector(group, case) for case in module.CASES],
    }


def render(value: Any) -> str:
    """JSON with one line for each array of numbers, so that files can be read and compared by line."""
    return _render(value, 0) + "\n"


def lint(value: Any, group: str) -> list[str]:
    """What is wrong with a document: against the schema, and what no schema can say."""
    from jsonschema import Draft202012Validator

    schema = json.loads((files("bnlayer_conformance") / "schema.json").read_text("utf-8"))
    problems = [
        f"{group}: {error.json_path}: {error.message[:200]}"
        for error in Draft202012Validator(schema).iter_errors(value)
    ]
    seen: set[str] = set()
    for entry in value["vectors"]:
        if entry["id"] in seen or not entry["id"].startswith(f"{group}/"):
            problems.append(f"{group}: id {entry['id']!r} is not unique, or not of its group")
        seen.add(entry["id"])
    if not problems:
        list(parse(value, group))
    return problems


def _same(group: str) -> bool:
    path = FOLDER / f"{group}.json"
    return path.exists() and path.read_text("utf-8") == render(document(group))


def _render(value: Any, depth: int) -> str:
    flat = not isinstance(value, dict) and not (isinstance(value, list) and any(isinstance(v, dict) for v in value))
    if flat or not value:
        return json.dumps(value, allow_nan=False, separators=(", ", ": "))
    inside, outside = " " * (depth + 1), " " * depth
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {_render(v, depth + 1)}" for k, v in value.items()]
        if set(value) <= {"dtype", "shape", "data", "tolerance"}:
            return "{" + ", ".join(parts) + "}"
        opening, closing = "{", "}"
    else:
        parts = [_render(v, depth + 1) for v in value]
        opening, closing = "[", "]"
    return f"{opening}\n{inside}" + f",\n{inside}".join(parts) + f"\n{outside}{closing}"


if __name__ == "__main__":
    main()
