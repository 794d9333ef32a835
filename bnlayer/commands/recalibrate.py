"""`bnlayer recalibrate`: moving statistics of a whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from .operations import model_of, opened, saved, source_and_target, specs_beside, which


@click.command(
    short_help="Moving statistics made those of a data set.",
    epilog="\b\nExample:\n  bnlayer recalibrate model.pt new.pt --model models:build --data data.npz",
)
@source_and_target
@which
@click.option(
    "--model", "factory", required=True, metavar="pkg.module:factory", help="Returns the model that loads SRC."
)
@click.option("--data", required=True, metavar="pkg.module:factory|FILE.npz",
              help="Yields batches, or an .npz whose only array, or x, is the inputs: channels last.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Of an .npz.")
def command(
    source: Path, target: Path, key: str | None, force: bool, only: tuple[str, ...], factory: str, data: str,
    batch_size: int,
) -> None:  # fmt: skip
    """Run data through the model and make the moving statistics those of all of it; write DST.

    Each batch is normalized with its own statistics, as in training, and all batches add up exactly: the spread
    between them is in the variance. Everything else keeps its bits.

    \b
      bnlayer recalibrate model.pt new.pt --model models:build --data data:batches
      bnlayer recalibrate model.weights.h5 new.weights.h5 --model models:build --data inputs.npz

    \b
    Exit codes: 0 done; 1 done with a loss that it names; 2 usage; 3 refused, nothing was written.
    """
    from bnlayer.registry import adapter
    from bnlayer.surgery.edits import Notes
    from bnlayer.surgery.recalibrate import population, statistics

    from .factories import made

    before = opened(source, key)
    batches = _npz(Path(data), batch_size) if data.endswith(".npz") else made(data, "--data")
    beside = specs_beside(source)
    model: Any = model_of(factory, beside)
    reach = adapter(model)
    model = reach.write(model, before)
    notes = Notes()
    found = population(model, batches, only or None)
    result = before.replace(statistics(reach.read(model), found, notes.add))
    saved(result, target, notes, force=force, specs=beside)


def _npz(path: Path, size: int) -> Iterable[Any]:
    arrays = opened(path)
    name = "x" if "x" in arrays else next(iter(arrays))
    if name != "x" and len(arrays) != 1:
        raise click.BadParameter(f"{path} has {', '.join(arrays)}; call the inputs x.", param_hint="--data")
    x = arrays[name]

    def batches() -> Iterator[Any]:
        for start in range(0, len(x), size):
            yield x[start : start + size]

    return batches()
