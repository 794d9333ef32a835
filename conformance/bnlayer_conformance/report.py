"""What a run says: the JSON document, and the table for people."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from bnlayer.contract import NativeBackend

from . import SUITE, deviations
from .runner import Result, Status, Target, lacking

_STYLE: dict[Status, str] = {
    "pass": "green",
    "fail": "bold red",
    "error": "bold red",
    "deviation": "yellow",
    "unsupported": "dim",
}
_BAD: dict[Status, str] = {"fail": "fail", "error": "error", "deviation": "deviate", "unsupported": "unsupp."}
SHOWN_FAILURES = 40


def document(targets: Sequence[Target], results: Sequence[Result]) -> dict[str, Any]:
    """The run as JSON values; a number that JSON cannot hold is null. A failure's `line` is the number, from 0, of the
    line of its target's `deviations` that explains it, or null."""
    return {
        "suite": SUITE,
        "targets": {
            t.name: {
                "version": t.version,
                "status": "ready" if t.ready else "absent",
                "reason": t.reason,
                "native": isinstance(t.backend, NativeBackend),
                "lacks": {} if t.backend is None else dict(lacking(t.backend)),
                "deviations": [asdict(line) for line in deviations.of(t)],
            }
            for t in targets
        },
        "results": [
            {
                "vector": r.vector,
                "group": r.group,
                "target": r.target,
                "status": r.status,
                "observable": r.observable,
                "error": _finite(r.error),
                "tolerance": _finite(r.tolerance),
                "reason": r.reason,
                "failures": [
                    {
                        "observable": f.observable,
                        "error": _finite(f.error),
                        "ratio": _finite(f.ratio),
                        "short": f.short,
                        "reason": f.reason,
                        "line": line,
                    }
                    for f, line in zip_longest(r.failures, r.lines)
                ],
            }
            for r in results
        ],
    }


def write_json(path: Path, targets: Sequence[Target], results: Sequence[Result]) -> None:
    """Write `document` to a file."""
    path.write_text(json.dumps(document(targets, results), indent=1, allow_nan=False) + "\n", "utf-8")


def write_svg(path: Path, targets: Sequence[Target], results: Sequence[Result]) -> None:
    """Write the table of the targets that ran as an SVG picture, which needs no font from elsewhere."""
    ready = [t for t in targets if t.ready]
    console = Console(
        record=True, file=StringIO(), width=34 + 13 * len(ready), color_system="truecolor", force_terminal=True
    )
    console.print(_table(ready, results))
    console.print(summary(ready, results), highlight=False)
    picture = console.export_svg(title="bnlayer conform", theme=DIMMED_MONOKAI)
    path.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL), "utf-8")


def show(console: Console, targets: Sequence[Target], results: Sequence[Result]) -> None:
    """The table group x target, then failures one by one, absent targets with their install command, the sum."""
    ready = [t for t in targets if t.ready]
    if ready:
        console.print(_table(ready, results))
    _show_failures(console, results)
    for text, count in Counter((r.target, r.reason) for r in results if r.status == "unsupported").items():
        console.print(f"{text[0]}: {count} unsupported: {text[1]}", style="dim", highlight=False, soft_wrap=True)
    for target in targets:
        if not target.ready:
            console.print(Text.assemble((f"{target.name} is absent: ", "yellow"), target.reason), soft_wrap=True)
    console.print(summary(targets, results), highlight=False, soft_wrap=True)


def summary(targets: Sequence[Target], results: Sequence[Result]) -> str:
    """One line: how many of what."""
    counts = Counter(r.status for r in results)
    parts = [f"{counts[status]} {status}" for status in ("pass", "fail", "error", "deviation", "unsupported")]
    ready = sum(t.ready for t in targets)
    return f"{ready} of {len(targets)} targets ready: {', '.join(parts)}"


def _table(targets: Sequence[Target], results: Sequence[Result]) -> Table:
    table = Table(title=f"Batch norm conformance, suite {SUITE}", title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("vectors", justify="right", overflow="fold")
    for target in targets:
        table.add_column(Text(f"{target.name}\n{target.version}"), justify="right", overflow="fold")
    for group in dict.fromkeys(r.group for r in results):
        of_group = [r for r in results if r.group == group]
        cells = [_cell([r for r in of_group if r.target == t.name]) for t in targets]
        table.add_row(group, str(len({r.vector for r in of_group})), *cells)
    table.add_section()
    cells = [_cell([r for r in results if r.target == t.name]) for t in targets]
    table.add_row("all", str(len({r.vector for r in results})), *cells)
    return table


def _cell(results: Sequence[Result]) -> Text:
    counts = Counter(r.status for r in results)
    cell = Text(f"{counts['pass']} ✓" if counts["pass"] else "", _STYLE["pass"])
    for status, short in _BAD.items():
        if counts[status]:
            cell.append(f"{' ' if cell.plain else ''}{counts[status]} {short}", _STYLE[status])
    return cell


def _show_failures(console: Console, results: Sequence[Result]) -> None:
    failures = [r for r in results if r.status in ("fail", "error")]
    for r in failures[:SHOWN_FAILURES]:
        line = Text(f"{r.status} ", _STYLE[r.status])
        line.append(f"{r.target}  {r.vector}", "bold")
        if r.observable:
            line.append(f"  {r.observable}")
        if r.error is not None and r.tolerance is not None:
            line.append(f"  error {r.error:.3g}, tolerance {r.tolerance:.3g}")
        line.append(f"\n     {r.reason}", "dim")
        console.print(line, soft_wrap=True)
    if len(failures) > SHOWN_FAILURES:
        console.print(f"... and {len(failures) - SHOWN_FAILURES} more; --json FILE has them all")


def _finite(number: float | None) -> float | None:
    return number if number is not None and isfinite(number) else None
