"""The `bnlayer` command. Its subcommands arrive by the entry-point group `bnlayer.commands`, a stranger's too.

A subcommand is a click command. The first line of its epilog that begins with `bnlayer` is its example in
`bnlayer --help`. It may let a `BatchNormError` escape: that becomes one line on stderr and exit code 3.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import click

from . import __version__
from .errors import BatchNormError, UnknownBackend

COMMANDS: Final = "bnlayer.commands"
_FIRST: Final = ("conform", "explain", "backends")  # the main job first; the rest by name


class Refused(click.ClickException):
    """What was asked for was refused or unreadable, and nothing was written: exit code 3."""

    exit_code = 3


class Commands(click.Group):
    """A click group whose commands are entry points, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The registered names, the main job first."""
        names = _entries(ctx).keys()
        return [*(name for name in _FIRST if name in names), *sorted(names - set(_FIRST))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; one that cannot be imported says so when it is run."""
        entry = _entries(ctx).get(cmd_name)
        return None if entry is None else _load(entry)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its errors become one line and an exit code."""
        try:
            return super().invoke(ctx)
        except UnknownBackend as error:
            raise click.UsageError(str(error)) from error
        except BatchNormError as error:
            raise Refused(str(error)) from error

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One example per command, and the exit codes."""
        with formatter.section("Examples"):
            for name in self.list_commands(ctx):
                command = self.get_command(ctx, name)
                lines = (command.epilog or "").splitlines() if command is not None else []
                examples = [line.strip() for line in lines if line.strip().startswith("bnlayer ")]
                formatter.write_text((examples or [f"bnlayer {name} --help"])[0])
        with formatter.section("Exit codes"):
            formatter.write_dl(
                [
                    ("0", "nothing to report"),
                    ("1", "findings, failures, or losses that were allowed"),
                    ("2", "wrong usage"),
                    ("3", "refused or unreadable; nothing was written"),
                ]
            )


def _entries(ctx: click.Context) -> dict[str, EntryPoint]:
    """The registered commands by name, looked up once a run, for that reads a file of every installed distribution."""
    found: dict[str, EntryPoint] | None = ctx.meta.get(COMMANDS)
    if found is None:
        found = ctx.meta[COMMANDS] = {entry.name: entry for entry in reversed(entry_points(group=COMMANDS))}
    return found


def _load(entry: EntryPoint) -> click.Command:
    try:
        found = entry.load()
    except Exception as error:  # a stranger's module may raise anything while it is imported
        return _broken(entry, f"{type(error).__name__}: {error}")
    if not isinstance(found, click.Command):
        return _broken(entry, f"it is a {type(found).__name__}, not a click command")
    return found


def _broken(entry: EntryPoint, why: str) -> click.Command:
    reason = f"cannot be loaded from {entry.value} ({why})"

    def refuse() -> None:
        raise Refused(f"the command {entry.name!r} {reason}.")

    return click.Command(
        entry.name,
        callback=_ignoring_arguments(refuse),
        short_help=f"BROKEN: {reason}",
        add_help_option=False,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
    )


def _ignoring_arguments(function: Callable[[], None]) -> Callable[..., None]:
    return lambda **_: function()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bnlayer")
def main() -> None:
    """Batch normalization, exactly specified, in every framework.

    The same layer means different things in different frameworks: momentum is the weight on the new batch or on the
    old average, the moving variance is biased or not, epsilon defaults to 1e-5 or 1e-3. bnlayer says what a batch norm
    is in one spec, builds it natively in NumPy, PyTorch, TensorFlow, JAX and Keras, and proves with one set of test
    vectors that they agree.
    """
