"""`bnlayer diff`: what differs between two checkpoints, and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .operations import opened

if TYPE_CHECKING:
    from bnlayer.surgery.diff import Difference, LayerDifference


@click.command(
    short_help="What differs between two checkpoints, and why.", epilog="\b\nExample:\n  bnlayer diff a.pt b.pt"
)
@click.argument("first", type=click.Path(path_type=Path), metavar="A")
@click.argument("second", type=click.Path(path_type=Path), metavar="B")
@click.option("--key", metavar="NAME", help="Which of several models in both files.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(first: Path, second: Path, key: str | None, as_json: bool) -> None:
    """Compare two checkpoints, and say why batch norms differ.

    Of one framework, by names. Of two, layers are matched as by `bnlayer port`, and compared in B's layouts. Causes
    that are known: epsilon, inverted momentum, statistics never trained, mean and variance exchanged, n/(n-1), a bias
    absorbed, another sign, rounding, moving averages of the weights, layers exchanged.

    \b
      bnlayer diff before.pt after.pt
      bnlayer diff model.weights.h5 ported.pt --json

    \b
    Exit codes: 0 equal bit by bit; 1 they differ; 2 usage; 3 a file cannot be read.
    """
    from bnlayer.surgery.diff import diff

    found = diff(opened(first, key), opened(second, key))
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show(found)
    sys.exit(0 if found.same else 1)


def _show(found: Difference) -> None:
    from .tables import show

    differ = [layer for layer in found.layers if not layer.same]
    count = len(found.layers) - len(differ)
    title = f"{count} layers are equal bit by bit, {len(differ)} differ"
    if differ:
        show(title, ("layer", "tensor", "absolute", "relative", "how"), [row for one in differ for row in _rows(one)])
    else:
        click.echo(title)
    for layer in differ:
        for cause in layer.causes:
            click.echo(f"\n{click.style('CAUSE', fg='yellow', bold=True)} {layer.name} ({cause.code}): {cause.message}")
    for reason in found.unmatched:
        click.echo(f"\nNOT COMPARED {reason}")


def _rows(layer: LayerDifference) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in layer.tensors:
        if one.status != "equal":
            numbers = ["" if n is None else f"{n:.2g}" for n in (one.absolute, one.relative)]
            rows.append(("" if rows else layer.name, one.name, *numbers, f"{one.status} {one.detail}".strip()))
    return rows or [(layer.name, "", "", "", "settings differ")]
