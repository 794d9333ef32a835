"""`bnlayer fold`: batch norms folded into the layers that they follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .operations import known_epsilon, model_of, opened, present_epsilon, saved, source_and_target, specs_beside, which


@click.command(
    short_help="Fold batch norms into the layers before them.",
    epilog="\b\nExample:\n  bnlayer fold model.pt folded.pt --model models:build --input 2,65,65,3",
)
@source_and_target
@which
@present_epsilon("--epsilon")
@click.option("--keep", is_flag=True, help="Leave each batch norm as an identity, so that the same model loads DST.")
@click.option(
    "--model",
    "factory",
    metavar="pkg.module:factory",
    help="A function that returns your model: a run of it proves the fold.",
)
@click.option(
    "--input", "shape", metavar="N,...,C", help="The model's input shape, channels last. Needed with --model."
)
@click.option("--tolerance", type=float, default=1e-6, show_default=True,
              help="By how much the output may change, of its largest value.")  # fmt: skip
@click.option("--allow-partial", is_flag=True, help="Fold what can be folded, and leave the rest.")
def command(
    source: Path, target: Path, key: str | None, force: bool, only: tuple[str, ...], epsilon_now: float | None,
    accept_assumed: bool, keep: bool, factory: str | None, shape: str | None, tolerance: float, allow_partial: bool,
) -> None:  # fmt: skip
    """Fold the batch norms of SRC into the convolutions and dense layers that they follow; write DST.

    DST is for the model without batch norms, in which those layers have biases; with --keep for the same model.
    A file's names and order only suggest which layer a batch norm follows. With --model and --input a run of your
    model proves it, finds layers whose output something else takes too, and tells epsilon.

    \b
      bnlayer fold model.pt folded.pt --epsilon 1e-5
      bnlayer fold model.weights.h5 folded.weights.h5 --keep --model models:build --input 2,65,65,3

    \b
    Exit codes: 0 done; 1 done with a loss that it names; 2 usage; 3 refused, nothing was written.
    """
    import numpy as np

    from bnlayer.surgery.edits import Notes
    from bnlayer.surgery.fold import fold

    from .factories import shape_of

    if (factory is None) != (shape is None):
        raise click.UsageError("--model and --input go together.")
    beside = specs_beside(source)
    more: dict[str, Any] = {}
    if factory is not None and shape is not None:
        x = np.random.default_rng(0).normal(size=shape_of(shape, "--input")).astype(np.float32)
        more = {"model": model_of(factory, beside), "x": x}
    notes = Notes()
    result = fold(
        opened(source, key), only or None, keep=keep, tolerance=tolerance, allow_partial=allow_partial,
        accept_assumed=accept_assumed, note=notes.add, epsilon=known_epsilon(epsilon_now, beside, only), **more,
    )  # fmt: skip
    saved(result, target, notes, force=force, specs=beside)
