"""`bnlayer absorb`: biases before batch norms taken off the moving means."""

from __future__ import annotations

from pathlib import Path

import click

from .operations import opened, saved, source_and_target, specs_beside, which


@click.command(
    short_help="Take biases off the moving means of the batch norms after.",
    epilog="\b\nExample:\n  bnlayer absorb model.pt without_biases.pt",
)
@source_and_target
@which
@click.option("--keep", is_flag=True, help="Leave zeros in the biases' places, so that the same model loads DST.")
def command(source: Path, target: Path, key: str | None, force: bool, only: tuple[str, ...], keep: bool) -> None:
    """Take the bias of each layer before a batch norm off its moving mean: exact in training and in eval.

    \b
      bnlayer absorb model.pt without_biases.pt

    \b
    Exit codes: 0 done; 1 done with a loss that it names; 2 usage; 3 refused, nothing was written.
    """
    from bnlayer.surgery.absorb import absorb
    from bnlayer.surgery.edits import Notes

    notes = Notes()
    result = absorb(opened(source, key), only or None, keep=keep, note=notes.add)
    saved(result, target, notes, force=force, specs=specs_beside(source))
