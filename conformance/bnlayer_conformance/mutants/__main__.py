"""Run every mutant over the vectors and print the page that says which vector catches which."""

from __future__ import annotations

import sys
from math import isfinite
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track

from .. import vector
from .catalogue import MUTANTS
from .judge import MARGIN, Verdict, judge, unique


@click.command()
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Write the page to a file.")
def main(write: Path | None) -> None:
    """Judge the suite by the mistakes it catches. Exit code 1 if a mutant escapes."""
    console = Console(stderr=True)
    verdicts = list(track(judge(), "mutants", total=len(MUTANTS), console=console))
    text = page(verdicts)
    if write is None:
        click.echo(text)
    else:
        write.write_text(text, "utf-8")
    escaped = [v.mutant.name for v in verdicts if not v.caught]
    for name in escaped:
        click.echo(f"escaped: {name}", err=True)
    sys.exit(1 if escaped else 0)


def page(verdicts: list[Verdict]) -> str:
    """docs/mutants.md."""
    alone = unique(verdicts)
    lines = [
        "# Which vector catches which mistake",
        "",
        "Written by `python -m bnlayer_conformance.mutants --write docs/mutants.md`; a test runs the same.",
        "",
        f"{len(verdicts)} mutants, each one line away from a correct batch norm"
        " (`conformance/bnlayer_conformance/mutants/base.py`). A mutant counts as caught by a valid vector in float32"
        f" with an error of at least {MARGIN:g} tolerances, unless only another dtype, or only an invalid vector, can"
        ' show it. "Clearest" is the vector with the largest error; ∞ stands for NaN, a wrong dtype or counter.',
        "",
        "| mistake | seen in | only | clearest | observable | error / tolerance | vectors | groups |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        best = max(v.caught, key=lambda c: c.ratio, default=None)
        clearest = ("**none**", "", "") if best is None else (f"`{best.vector}`", best.observable, _ratio(best.ratio))
        cells = [v.mutant.name, v.mutant.seen or "-", v.mutant.only or "-", *clearest, str(len(v.caught)),
                 str(len(v.groups))]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## What each group alone catches",
        "",
        "| group | mutants that no other group catches |",
        "|---|---|",
    ]
    lines += [f"| {group} | {', '.join(alone.get(group, [])) or '-'} |" for group in vector.groups()]
    return "\n".join(lines) + "\n"


def _ratio(ratio: float) -> str:
    return f"{ratio:.3g}" if isfinite(ratio) else "∞"


if __name__ == "__main__":
    main()
