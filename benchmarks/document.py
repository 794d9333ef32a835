"""Writes the figures of several runs into a page of the documentation: `python -m benchmarks.document --help`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from .cases import MODES, length

_BEGIN: Final = "<!-- figures: written by python -m benchmarks.document -->"
_END: Final = "<!-- /figures -->"
_MARKS: Final = {True: "✓", False: "**missed**"}
_LIMIT: Final = " (not ours: "  # in a peer's name: what is timed is not our call, but the least that one can take
Row = dict[str, Any]
Limits = dict[tuple[str, ...], list[Row]]


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--write", "page", required=True, type=click.Path(exists=True, path_type=Path), help="The page.")
def main(runs: tuple[Path, ...], page: Path) -> None:
    """Put the figures of RUNS (JSON files of `python -m benchmarks --json`) between the page's two marks.

    A cell has each run's median ratio, then the bar, whether every run reached it, and, where not, the ratio of
    what was timed as the least that such a call can take.
    """
    documents = [json.loads(run.read_text("utf-8")) for run in runs]
    found: dict[str, list[Row]] = {}
    for document in documents:
        for row in document["rows"]:
            found.setdefault(f"{row['suite']}/{row['name']}", []).append(row)
    incomplete = [name for name, rows in found.items() if len(rows) != len(runs) or any("failed" in r for r in rows)]
    if incomplete:
        raise click.ClickException(f"not in every run, or failed: {', '.join(incomplete)}")
    text = page.read_text("utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise click.ClickException(f"{page} has no {_BEGIN} and {_END}")
    figures = "\n".join(_figures(found, documents[0]["machine"]))
    page.write_text(f"{before}{_BEGIN}\n\n{figures}\n{_END}{after}", "utf-8")


def _figures(found: dict[str, list[Row]], machine: dict[str, str]) -> Iterable[str]:
    yield "Measured with " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "."
    yield ""
    yield _summary([rows for rows in found.values() if rows[0]["bar"] is not None])
    yield ""
    core = [rows for rows in found.values() if rows[0]["backend"] == "core"]
    if core:
        yield from _table(("the core", "against", "runs"), (_job(rows) for rows in core))
    layers = [rows for rows in found.values() if rows[0]["backend"] != "core"]
    limits: Limits = {}
    for rows in layers:
        if _LIMIT in rows[0]["peer"]:
            limits[_call_of(rows[0])] = min(limits.get(_call_of(rows[0]), rows), rows, key=_mean)
    for suite in dict.fromkeys(rows[0]["suite"] for rows in layers):
        of_suite = [rows for rows in layers if rows[0]["suite"] == suite]
        for peer in dict.fromkeys(rows[0]["peer"] for rows in of_suite):
            lines: dict[tuple[str, ...], dict[str, list[Row]]] = {}
            for rows in of_suite:
                if rows[0]["peer"] == peer:
                    key = rows[0]["layout"], length(rows[0]["shape"]), rows[0]["dtype"]
                    lines.setdefault(key, {})[rows[0]["mode"]] = rows
            heads = (f"{suite} against {peer}", "eval", "train", "train and gradient", "copies", "memory")
            yield from _table(heads, (_call(key, modes, limits) for key, modes in lines.items()))


def _summary(cells: Sequence[list[Row]]) -> str:
    """How many cells with a bar reach it, and in how many runs."""
    runs = len(cells[0]) if cells else 0
    times = [sum(row["reached"] for row in rows) for rows in cells]
    alone = ", ".join(str(sum(rows[run]["reached"] for rows in cells)) for run in range(runs))
    fewer = ", ".join(f"{times.count(number)} in {number}" for number in range(runs - 1, -1, -1))
    return (
        f"{times.count(runs)} of {len(cells)} cells with a bar reach it in all {runs} runs;"
        f" in each run alone {alone} do. Of the others, by the number of runs: {fewer}."
    )


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for line in lines:
        yield "| " + " | ".join(line) + " |"
    yield ""


def _call_of(row: Row) -> tuple[str, ...]:
    """What tells a call, and its limit, from others."""
    return row["suite"], row["peer"].split(_LIMIT)[0], row["layout"], length(row["shape"]), row["dtype"], row["mode"]


def _call(key: tuple[str, ...], modes: dict[str, list[Row]], limits: Limits) -> list[str]:
    layout, shape, dtype = key
    name = f"{layout} {shape}" + ("" if dtype == "float32" else f" {dtype}")
    there = [modes.get(mode) for mode in MODES]
    extras = [
        " / ".join(_number(rows, what, digits) for rows in there) for what, digits in (("copies", 1), ("memory", 2))
    ]
    return [name, *("" if rows is None else _cell(rows, limits) for rows in there), *extras]


def _number(rows: list[Row] | None, what: str, digits: int) -> str:
    values = [] if rows is None else [row[what] for row in rows if row.get(what) is not None]
    return f"{min(values):.{digits}f}" if values else "–"


def _cell(rows: list[Row], limits: Limits) -> str:
    runs = _ratios(rows)
    if rows[0]["bar"] is None:
        return runs
    reached = all(row["reached"] for row in rows)
    limit = None if reached or rows[0]["backend"] == "core" else limits.get(_call_of(rows[0]))
    least = "" if limit is None else f"; limit {_ratios(limit)}"
    return f"{runs} (bar {rows[0]['bar']:.2f} {_MARKS[reached]}{least})"


def _mean(rows: list[Row]) -> float:
    return sum(float(row["ratio"]) for row in rows) / len(rows)


def _ratios(rows: list[Row]) -> str:
    return " ".join(f"{row['ratio']:.2f}" for row in rows)


def _job(rows: list[Row]) -> list[str]:
    cell, measured = _cell(rows, {}), [row for row in rows if row.get("megabytes") is not None]  # some runs go without
    if measured:
        cell += f"; at most {max(row['megabytes'] for row in measured):.0f} MB"
        if "memory_bar" in measured[0]:
            cell += f" (bar {measured[0]['memory_bar']:.0f} {_MARKS[all(row['fits'] for row in measured)]})"
    return [rows[0]["layout"], rows[0]["peer"], cell]


if __name__ == "__main__":
    main()
