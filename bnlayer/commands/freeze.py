"""`bnlayer freeze`: torch batch norms as FrozenBatchNorm2d's tensors."""

from __future__ import annotations

from pathlib import Path

import click

from .operations import known_epsilon, opened, present_epsilon, saved, source_and_target, specs_beside, which


@click.command(
    short_help="torch batch norms as a FrozenBatchNorm2d's tensors.",
    epilog="\b\nExample:\n  bnlayer freeze model.pt frozen.pt --from 1e-5",
)
@source_and_target
@which
@present_epsilon("--from")
@click.option("--epsilon", type=click.FloatRange(min=0), default=1e-5, show_default=True, help="The frozen class's.")
def command(
    source: Path, target: Path, key: str | None, force: bool, only: tuple[str, ...], epsilon_now: float | None,
    accept_assumed: bool, epsilon: float,
) -> None:  # fmt: skip
    """Write DST for a torch model whose batch norms are FrozenBatchNorm2d, as in torchvision and detectron2.

    Counters are removed, absent gammas and betas filled in, and a difference of epsilon shifted into the variances.

    \b
      bnlayer freeze model.pt frozen.pt --from 1e-3

    \b
    Exit codes: 0 done; 1 done with a loss that it names; 2 usage; 3 refused, nothing was written.
    """
    from bnlayer.surgery.edits import Notes
    from bnlayer.surgery.freeze import freeze

    notes = Notes()
    result = freeze(
        opened(source, key), only or None, epsilon=epsilon, accept_assumed=accept_assumed, note=notes.add,
        epsilon_now=known_epsilon(epsilon_now, specs_beside(source), only),
    )  # fmt: skip
    saved(result, target, notes, force=force)
