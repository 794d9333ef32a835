"""The figures as a table for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

_MARKS: Final = {True: "[green]reached", False: "[red]MISSED", None: ""}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of one run."""
    table = Table(box=None)
    table.add_column("case")
    for title in ("ours / peer", "95 %", "bar"):
        table.add_column(title, justify="right")
    table.add_column("")
    for title in ("copies", "memory"):
        table.add_column(title, justify="right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["name"], "", "", "", f"[red]{row['failed']}", "", "")
            continue
        table.add_row(
            row["name"], _number(row.get("ratio")),
            f"{_number(row.get('low'))} - {_number(row.get('high'))}" if "low" in row else "",
            _number(row.get("bar")), _MARKS[row.get("reached")], _number(row.get("copies"), 1), _memory(row),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _memory(row: dict[str, Any]) -> str:
    if row.get("megabytes") is not None:
        over = "" if row.get("fits", True) else f" [red]> {row['memory_bar']:.0f}"
        return f"{row['megabytes']:.0f} MB{over}"
    return _number(row.get("memory"))


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
