"""The benchmarks' command: checks each case, times it, and shows a table; JSON and a picture on request."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .cases import PASSES, Case
from .timing import measured, ratio

# Backend to its module here, and to what must be installed.
BACKENDS: Final = {
    "numpy": ("on_numpy", ("numpy",)),
    "torch": ("on_torch", ("torch",)),
    "tensorflow": ("on_tensorflow", ("tensorflow", "keras")),
    "jax": ("on_jax", ("jax", "flax")),
    "keras": ("on_keras", ("keras",)),
}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(BACKENDS)), help="These backends; else all.")
@click.option("--match", default="*", metavar="GLOB", help="Cases by name, such as '*NCHW*grad'.")
@click.option("--rounds", default=21, show_default=True, help="How often each is timed.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw them.")
@click.option("--list", "listed", is_flag=True, help="Name the cases and end.")
def main(only: tuple[str, ...], match: str, rounds: int, path: Path | None, plot: Path | None, listed: bool) -> None:
    """Time batch norms against what they replace.

    Every figure is a ratio, ours / peer: the median of paired measurements in one process, with the 95 % interval of
    that median. "copies" is ours against copying the input as often as the mode has to move it at the least: 1 is the
    limit. Results are compared before anything is timed.

    \b
      python -m benchmarks --only numpy
      KERAS_BACKEND=torch python -m benchmarks --only keras --match '*NHWC*' --json keras-torch.json

    \b
    Exit codes: 0 every bar is reached; 1 one is not; 2 usage.
    """
    cases = [case for name in (only or BACKENDS) for case in _cases(name) if fnmatchcase(case.name, match)]
    if listed:
        click.echo("\n".join(case.name for case in cases))
        return
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            rows.append(_row(case, rounds))
            progress.advance(task)
    _show(rows)
    if path is not None:
        path.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n", "utf-8")
    if plot is not None:
        from .plot import draw

        draw(rows, plot)
    sys.exit(0 if all(row["reached"] is not False for row in rows) else 1)


def _cases(backend: str) -> Iterator[Case]:
    module, needed = BACKENDS[backend]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        click.echo(f"{backend}: left out, {', '.join(missing)} is not installed", err=True)
        return
    yield from import_module(f".{module}", __package__).cases()


def _row(case: Case, rounds: int) -> dict[str, Any]:
    pair = case.make()
    _compare(case, *pair.results(), pair.tolerance)
    source = np.empty(case.shape, case.dtype)
    target = np.empty_like(source)
    source[...], target[...] = 1, 0

    def copies() -> None:
        for _ in range(PASSES[case.mode] // 2):
            np.copyto(target, source)

    seconds = measured({"ours": pair.ours, "peer": pair.peer, "copies": copies}, rounds)
    found = ratio(seconds["ours"], seconds["peer"])
    limit = ratio(seconds["ours"], seconds["copies"])
    scale = PASSES[case.mode] / (2 * (PASSES[case.mode] // 2))  # a copy moves the bytes twice: read and written
    return {
        "name": case.name, "backend": case.backend, "peer": case.peer, "mode": case.mode, "layout": case.layout,
        "shape": list(case.shape), "dtype": case.dtype, "ratio": found.median, "low": found.low, "high": found.high,
        "bar": case.bar, "reached": None if case.bar is None else found.low <= case.bar,
        "copies": limit.median / scale,
        "memory": None if pair.memory is None else pair.memory() / source.nbytes,
    }  # fmt: skip


def _compare(case: Case, ours: tuple[Any, ...], peer: tuple[Any, ...], tolerance: float) -> None:
    for mine, theirs in zip(ours, peer, strict=True):
        error = np.abs(mine.astype(np.float64) - theirs).max() / np.abs(theirs).max()
        if not error <= tolerance:
            raise click.ClickException(f"{case.name}: results differ by {error:.2g} of the largest; nothing was timed.")


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for title, side in (("case", "left"), ("ours / peer", "right"), ("95 %", "right"), ("bar", "right"),
                        ("", "left"), ("copies", "right"), ("memory", "right")):  # fmt: skip
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for row in rows:
        mark = {True: "[green]reached", False: "[red]MISSED", None: ""}[row["reached"]]
        table.add_row(
            row["name"], f"{row['ratio']:.2f}", f"{row['low']:.2f} - {row['high']:.2f}",
            "" if row["bar"] is None else f"{row['bar']:.2f}", mark, f"{row['copies']:.1f}",
            "" if row["memory"] is None else f"{row['memory']:.2f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _machine() -> dict[str, Any]:
    names = ("bnlayer", "numpy", "torch", "tensorflow", "tensorflow-cpu", "keras", "jax", "flax")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "system": platform.platform(), "processor": _processor(), **versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


if __name__ == "__main__":
    main()
