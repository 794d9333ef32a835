"""What the commands that write a checkpoint share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnlayer.errors import CheckpointError

if TYPE_CHECKING:
    from bnlayer.checkpoint import Checkpoint
    from bnlayer.spec import BatchNormSpec
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


def saved(
    made: Checkpoint, path: Path, notes: Notes, *, force: bool, specs: Mapping[str, BatchNormSpec] | None = None
) -> None:
    """Write it, say what was done, and exit with 1 if something was lost, else 0.

    Args:
        made: what is written.
        path: DST.
        notes: what was done.
        force: replace DST, and what is beside it.
        specs: of batch norms whose epsilon the format does not say, for `PATH.bnlayer.json`; those of names that are
            no batch norm in it are left out.

    Raises:
        CheckpointError: DST or the file beside it is there and may not be replaced, or cannot be written.
    """
    from bnlayer.porting.sidecars import sidecar, write_sidecar

    beside = sidecar(path)
    if beside.exists() and not force:
        raise CheckpointError(f"{beside} is there already, and would be taken for what {path} needs; --force replaces"
                              " it.")  # fmt: skip
    known = {layer_name(made, one.name) for one in made.batch_norms()}
    kept = {name: spec for name, spec in (specs or {}).items() if name in known}
    try:
        made.save(path, force=force)
        if kept:
            write_sidecar(path, kept, force=force)
        else:
            beside.unlink(missing_ok=True)  # of the file that was replaced
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.") from error
    for line in notes.lines():
        click.echo(line)
    click.echo(f"Wrote {path}" + (f" and {beside}." if kept else "."))
    sys.exit(1 if notes.notes["lossy"] else 0)


def layer_name(checkpoint: Checkpoint, name: str) -> str:
    """What a live model calls the batch norm of this name in a file: what `PATH.bnlayer.json` calls it."""
    return str(checkpoint.metadata.get("layer_names", {}).get(name, name))


def specs_beside(path: Path) -> dict[str, BatchNormSpec]:
    """The specs in `PATH.bnlayer.json`, which `bnlayer port` writes; empty where there is none."""
    from bnlayer.porting.sidecars import read_sidecar

    return read_sidecar(path)


def model_of(factory: str, specs: Mapping[str, BatchNormSpec]) -> Any:
    """The model that `--model` names, with the epsilon and decay that the file beside SRC says."""
    from bnlayer.registry import adapter

    from .factories import made

    model = made(factory, "--model")
    return adapter(model).configure(model, specs) if specs else model


def known_epsilon(given: float | None, specs: Mapping[str, BatchNormSpec], only: Iterable[str]) -> float | None:
    """The epsilon that batch norms have: as given, or else as the file beside SRC says.

    Raises:
        CheckpointError: they have several.
    """
    patterns = list(only) or ["*"]
    named = [spec for name, spec in specs.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
    values = sorted({spec.epsilon for spec in named})
    if given is None and len(values) > 1:
        listed = ", ".join(f"{value:g}" for value in values)
        raise CheckpointError(f"the batch norms have several epsilons ({listed}), by the file beside it; choose those"
                              " of one with --only, and the others after.")  # fmt: skip
    return given if given is not None or not values else values[0]


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
