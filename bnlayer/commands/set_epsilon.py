"""`bnlayer set-epsilon`: another epsilon with the same numbers in eval."""

from __future__ import annotations

from pathlib import Path

import click

from .operations import opened, present_epsilon, saved, source_and_target, which


@click.command(
    short_help="Another epsilon, the same numbers in eval.",
    epilog="\b\nExample:\n  bnlayer set-epsilon keras.weights.h5 same.weights.h5 1e-5 --from 1e-3",
)
@source_and_target
@click.argument("epsilon", type=click.FloatRange(min=0))
@which
@present_epsilon("--from")
def command(
    source: Path, target: Path, epsilon: float, key: str | None, force: bool, only: tuple[str, ...],
    epsilon_now: float | None, accept_assumed: bool,
) -> None:  # fmt: skip
    """Write DST for a model with another EPSILON that computes what SRC does in eval mode.

    The difference goes into the moving variances, or into gamma where a variance is too small for it. In training
    the batch's variance is used, so there the change of epsilon remains.

    \b
      bnlayer set-epsilon keras.weights.h5 same.weights.h5 1e-5 --from 1e-3

    \b
    Exit codes: 0 done; 1 done, and exact in eval mode alone; 2 usage; 3 refused, nothing was written.
    """
    from bnlayer.surgery.edits import Notes
    from bnlayer.surgery.epsilon import set_epsilon

    notes = Notes()
    result = set_epsilon(
        opened(source, key), epsilon, only or None, accept_assumed=accept_assumed, note=notes.add,
        epsilon_now=epsilon_now,
    )  # fmt: skip
    saved(result, target, notes, force=force)
