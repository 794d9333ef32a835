"""Tables for people: at most 100 columns, nothing cut off, and plain text when they are piped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

WIDTH: Final = 100
_GAP: Final = 2  # between two columns: one of padding, one of the box


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "") -> None:
    """Print a table to stdout; the first column names the row, and long cells wrap.

    Args:
        title: one line above it.
        columns: the column heads.
        rows: the cells; an empty first cell continues the row above.
        note: text below it.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    # A pipe has no width of its own, and rich's guess of 80 is another one than a reader's.
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    widths = column_widths([columns, *rows], console.width)
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold"
    )
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, width=width, overflow="fold")
    table.columns[0].style = "cyan"
    blank, above_wraps = [""] * len(columns), False
    for i, row in enumerate(rows):
        group = [row, *_continued(rows[i + 1 :])] if row[0] else []
        wraps = len(group) > 1 or any(len(cell) > width for cell, width in zip(row, widths, strict=True))
        if i and group and (wraps or above_wraps):  # what takes several lines needs air around it
            table.add_row(*blank)
        above_wraps = wraps if group else True
        table.add_row(*(Text(cell) for cell in row))
    with console.capture() as captured:
        console.print(Text(title, style="bold"), "", table, sep="\n")
        if note:
            console.print("", Text(note), sep="\n")
    for line in captured.get().splitlines():
        click.echo(line.rstrip(), color=console.is_terminal)


def column_widths(rows: Sequence[Sequence[str]], total: int) -> list[int]:
    """Widths that fit `total` columns: each as wide as its longest cell, the widest ones cut to an equal share."""
    natural = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    room = total - _GAP * len(natural)
    widths = list(natural)
    while sum(widths) > room:
        widest = max(widths)
        if widest <= 8:
            break  # a terminal too narrow for any table: let it overflow
        widths[widths.index(widest)] = widest - 1
    return widths


def _continued(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    following = []
    for row in rows:
        if row[0]:
            break
        following.append(row)
    return following
