"""The benchmarks' command: a process for each suite, a table, and on request JSON and a picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import Progress

from .backends import SUITES
from .machine import machine
from .memory import ENVIRONMENT
from .table import show

Rows = dict[str, dict[str, Any]]  # by the suite's and the case's name
_ROOT: Final = Path(__file__).parents[1]


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SUITES)), help="These suites; else all.")
@click.option("--match", default="*", metavar="GLOB", help="Cases by name, such as '*NCHW*grad'.")
@click.option("--bars", is_flag=True, help="Only cases that have a bar to reach.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]), help="To compute on.")
@click.option(
    "--rounds", default=21, show_default=True, type=click.IntRange(min=1), help="How often each case is timed."
)
@click.option("--no-memory", is_flag=True, help="Leave memory out, and save its second process.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw them.")
@click.option("--list", "listed", is_flag=True, help="Name the cases and end.")
def main(
    only: tuple[str, ...],
    match: str,
    bars: bool,
    device: str,
    rounds: int,
    no_memory: bool,
    path: Path | None,
    plot: Path | None,
    listed: bool,
) -> None:
    """Time batch norms against what they replace, and the core's jobs against what they may take.

    Every figure is a ratio, ours / peer: the median of paired measurements in one process, with the 95 % interval of
    that median; a bar is reached if the interval's lower end is at or below it. "copies" is ours against copying the
    input as often as the mode has to move it at the least: 1 is the limit. "memory" is the most that one call takes,
    in sizes of its results. Results are compared before anything is timed.

    \b
      python -m benchmarks --only numpy
      python -m benchmarks --only keras-torch --match '*NHWC*' --json keras.json
      python -m benchmarks --only torch --only jax --device cuda

    \b
    Exit codes: 0 every bar is reached; 1 one is not, or results differ; 2 usage; 3 what was asked for cannot run here.
    """
    asked = device, match, str(rounds), "bars" if bars else "all"
    cases = {name: [row["name"] for row in _measured("list", name, *asked)] for name in _runnable(only, device)}
    if not any(cases.values()):
        raise click.UsageError(f"no case of {', '.join(cases)} matches {match!r}; --list names all that there are.")
    if listed:
        click.echo("\n".join(f"{name}: {case}" for name, found in cases.items() for case in found))
        return
    rows: Rows = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks = ("time",) if no_memory else ("time", "memory")
        bar = progress.add_task("", total=sum(map(len, cases.values())) * len(tasks))
        for name, found in cases.items():
            for task in tasks if found else ():
                for row in _measured(task, name, *asked):
                    rows.setdefault(f"{name}/{row['name']}", {"suite": name}).update(row)
                    progress.update(bar, description=row["name"], advance=1)
    show(list(rows.values()))
    if path is not None:
        document = {"machine": machine(device), "rows": list(rows.values())}
        path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if plot is not None:
        from .plot import draw

        draw([row for row in rows.values() if "ratio" in row], plot)
    bad = [row for row in rows.values() if "failed" in row or row.get("reached") is False or row.get("fits") is False]
    sys.exit(1 if bad else 0)


def _runnable(only: tuple[str, ...], device: str) -> list[str]:
    """The suites to run; what was asked for by name has to be there."""
    names = []
    for name in only or SUITES:
        why = SUITES[name].absence(device)
        if why is None:
            names.append(name)
        elif only:
            _refuse(f"{name}: {why}.")
        else:
            click.echo(f"{name}: left out, {why}", err=True)
    return names


def _measured(task: str, name: str, *asked: str) -> Iterator[dict[str, Any]]:
    """The rows of one suite, as its process finds them."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **SUITES[name].environment}
    if task == "memory":
        environment |= ENVIRONMENT
    command = [sys.executable, "-m", "benchmarks.worker", task, name, *asked]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=_ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        _refuse(f"{name}: {' '.join(command)} ended with exit code {process.returncode}; what it said stands above.")


def _refuse(why: str) -> None:
    error = click.ClickException(why)
    error.exit_code = 3
    raise error


if __name__ == "__main__":
    main()
