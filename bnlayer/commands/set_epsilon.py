"""`bnlayer set-epsilon`: another epsilon with the same numbers in eval."""

from __future__ import annotations

from pathlib import Path

import click

from .operations import (
    known_epsilon,
    layer_name,
    opened,
    present_epsilon,
    saved,
    source_and_target,
    specs_beside,
    which,
)


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
    the batch's variance is used, so there the change of epsilon remains. Where the format does not say epsilon, it is
    written to DST.bnlayer.json, and bnlayer.porting.load_into(model, DST) sets it.

    \b
      bnlayer set-epsilon keras.weights.h5 same.weights.h5 1e-5 --from 1e-3

    \b
    Exit codes: 0 nothing changed; 1 done, exact in eval mode alone; 2 usage; 3 refused, nothing written.
    """
    from bnlayer.surgery.edits import Notes, chosen
    from bnlayer.surgery.epsilon import set_epsilon

    before, beside, notes = opened(source, key), specs_beside(source), Notes()
    now = known_epsilon(epsilon_now, beside, only)
    result = set_epsilon(
        before, epsilon, only or None, accept_assumed=accept_assumed, note=notes.add, epsilon_now=now
    )  # fmt: skip
    specs = dict(beside)
    for one in chosen(before.batch_norms(), only or None):
        name = layer_name(before, one.name)
        if one.sources["epsilon"] != "file":
            specs[name] = beside.get(name, one.spec).replace(epsilon=epsilon)
            if name not in beside and one.sources["decay"] == "assumed":
                notes.add("assumed", f"decay {one.spec.decay} beside the new epsilon: the framework's default", name)
    saved(result, target, notes, force=force, specs=specs)
