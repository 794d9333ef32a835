"""`bnlayer conform`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from bnlayer.errors import UnknownBackend

if TYPE_CHECKING:
    from .runner import Result, Target
    from .vector import Vector

_PIPED_WIDTH: Final = 240


@click.command("conform", epilog="\b\nExample:\n  bnlayer conform")
@click.option("--backend", "names", multiple=True, metavar="NAME",
              help="A target: a registered name, or package.module:ATTRIBUTE. May be repeated.")  # fmt: skip
@click.option("--native", is_flag=True, help="Add the frameworks' own layers.")
@click.option("--device", default=None, help="Where to build the layers, in the framework's words: cpu, cuda, ...")
@click.option("--vectors", "pattern", default="*", metavar="GLOB",
              help='Only vectors (and checks) whose id matches, such as "weights/*".')  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write every result to a file.")  # fmt: skip
@click.option("--svg", "svg_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the table as a picture.")  # fmt: skip
def command(
    names: tuple[str, ...],
    native: bool,
    device: str | None,
    pattern: str,
    json_file: Path | None,
    svg_file: Path | None,
) -> None:
    """Run one set of vectors against batch norms in any framework.

    Without --backend: every backend of bnlayer whose framework is installed; the others are listed with their install
    command. Each vector compares y, dx, dgamma, dbeta, dweights, moving statistics and the counter with exact numbers,
    within a forward error bound.

    \b
      bnlayer conform                                  # all of ours
      bnlayer conform --backend torch --backend jax    # these two
      bnlayer conform --native                         # and the frameworks' own layers
      bnlayer conform --backend my_package.bn:BACKEND  # yours, registered or not
      bnlayer conform --vectors "weights/*" --json out.json

    \b
    Exit codes: 0 all passed (deviations that are listed, and what a backend says it lacks, included);
    1 a failure, an error, or a target asked for by name that is absent; 2 usage.
    """
    from rich.console import Console

    from . import report

    for option, file in (("--json", json_file), ("--svg", svg_file)):
        if file is not None and not file.parent.is_dir():
            raise click.BadParameter(f"{file}: there is no such folder; create it first.", param_hint=option)
    vectors, checks = _chosen(pattern)  # before the frameworks are imported, which takes long
    targets = _targets(names, native, device)
    # What is no terminal has no width: a table in a file or a pipe is as wide as its targets need.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH)
    results: list[Result] = []
    for target in targets:
        if target.ready:
            results += _run(target, vectors, checks, device)
    report.show(console, targets, results)
    if json_file is not None:
        report.write_json(json_file, targets, results)
    if svg_file is not None:
        report.write_svg(svg_file, targets, results)
    failed = any(r.status in ("fail", "error") for r in results)
    asked_but_absent = bool(names) and any(not t.ready for t in targets if t.name in names)
    sys.exit(1 if failed or asked_but_absent or not any(t.ready for t in targets) else 0)


def _targets(names: tuple[str, ...], native: bool, device: str | None) -> list[Target]:
    from bnlayer import registry

    from .runner import find

    chosen = list(names) or [name for name, entry in registry.known().items() if registry.is_ours(entry)]
    if native:
        chosen += registry.known(registry.NATIVE)
    try:
        return [find(name, registry.backend, device) for name in dict.fromkeys(chosen)]
    except UnknownBackend as error:
        raise click.UsageError(str(error)) from error


def _chosen(pattern: str) -> tuple[list[Vector], list[str]]:
    from . import metamorphic, vector

    vectors, checks = vector.load(pattern), metamorphic.names(pattern)
    if not vectors and not checks:
        groups = ", ".join([*vector.groups(), metamorphic.GROUP])
        raise click.UsageError(f"no vector matches {pattern!r}; ids are GROUP/NAME, and the groups are {groups}.")
    return vectors, checks


def _run(target: Target, vectors: list[Vector], checks: list[str], device: Any) -> list[Result]:
    from . import deviations, metamorphic, runner

    known = deviations.of(target)  # before the run: a damaged file need not wait for it
    results: list[Result] = []
    with _progress(target.name, len(vectors) + len(checks)) as advance:
        for result in runner.run(vectors, target, device):
            results.append(result)
            advance()
        for result in metamorphic.run(checks, target, device):
            results.append(result)
            advance()
    return deviations.apply(results, known, [v.id for v in vectors] + checks)


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr while a target runs; where stderr is no terminal, one line before it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(f"{name}: {total} vectors and checks ...", err=True)
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=total)
        yield lambda: progress.advance(task)
