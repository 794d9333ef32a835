"""What the commands that write a checkpoint share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnlayer.errors import CheckpointError

if TYPE_CHECKING:
    from bnlayer.checkpoint import Checkpoint
    from bnlayer.surgery.edits import Notes

Command = Callable[..., Any]


def opened(path: Path, key: str | None = None) -> Checkpoint:
    """The checkpoint at this path.

    Raises:
        CheckpointError: it cannot be read.
    """
    from bnlayer import checkpoint

    try:
        return checkpoint.open(path, key=key)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.") from error


def saved(made: Checkpoint, path: Path, notes: Notes, *, force: bool) -> None:
    """Write it, say what was done, and exit with 1 if something was lost, else 0."""
    try:
        made.save(path, force=force)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.") from error
    for line in notes.lines():
        click.echo(line)
    click.echo(f"Wrote {path}.")
    sys.exit(1 if notes.notes["lossy"] else 0)


def source_and_target(function: Command) -> Command:
    """The arguments SRC and DST, and the options --key and --force."""
    for decorate in (
        click.option("--force", is_flag=True, help="Replace DST if it is there."),
        click.option("--key", metavar="NAME", help="Which of several models in SRC, such as model_ema."),
        click.argument("target", type=click.Path(path_type=Path), metavar="DST"),
        click.argument("source", type=click.Path(path_type=Path), metavar="SRC"),
    ):
        function = decorate(function)
    return function


def which(function: Command) -> Command:
    """The option --only."""
    text = "Of these batch norms alone, such as 'layer1.*'; may be given several times."
    return click.option("--only", multiple=True, metavar="PATTERN", help=text)(function)


def present_epsilon(name: str) -> Callable[[Command], Command]:
    """An option of this name for the epsilon that batch norms have, and --accept-assumed."""

    def decorate(function: Command) -> Command:
        accept = "Where the file does not say epsilon, take its framework's default."
        now = "The model's epsilon, where the file does not say it."
        function = click.option("--accept-assumed", is_flag=True, help=accept)(function)
        return click.option(name, "epsilon_now", type=click.FloatRange(min=0), metavar="X", help=now)(function)

    return decorate
