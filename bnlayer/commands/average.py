"""`bnlayer average`: the mean of several checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from bnlayer.errors import CheckpointError

from .operations import opened, saved, specs_beside


@click.command(
    short_help="The mean of several checkpoints of one model.",
    epilog="\b\nExample:\n  bnlayer average epoch8.pt epoch9.pt mean.pt",
)
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SRC...")
@click.argument("target", type=click.Path(path_type=Path), metavar="DST")
@click.option("--weight", "weights", type=float, multiple=True, metavar="W", help="One for each SRC, in order.")
@click.option("--key", metavar="NAME", help="Which of several models in each SRC.")
@click.option("--force", is_flag=True, help="Replace DST if it is there.")
def command(sources: tuple[Path, ...], target: Path, weights: tuple[float, ...], key: str | None, force: bool) -> None:
    """Average checkpoints of the same names and shapes, in float64; write DST.

    Statistics are mixed: the spread of the means is part of the variance. Where the weights differ much, only
    `bnlayer recalibrate` gives statistics of the averaged model.

    \b
      bnlayer average epoch7.pt epoch8.pt epoch9.pt mean.pt
      bnlayer average old.pt new.pt mean.pt --weight 1 --weight 3

    \b
    Exit codes: 0 done; 1 done with a loss that it names; 2 usage; 3 refused, nothing was written.
    """
    from bnlayer.surgery.average import average
    from bnlayer.surgery.edits import Notes

    if weights and len(weights) != len(sources):
        raise click.UsageError(f"there are {len(sources)} checkpoints, and {len(weights)} weights.")
    beside, *others = (specs_beside(source) for source in sources)
    if any(other != beside for other in others):
        raise CheckpointError("the .bnlayer.json files beside the checkpoints differ: these are no checkpoints of one"
                              " model with the same settings.")  # fmt: skip
    notes = Notes()
    result = average([opened(source, key) for source in sources], weights or None, note=notes.add)
    saved(result, target, notes, force=force, specs=beside)
