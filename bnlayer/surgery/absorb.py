"""A layer's bias taken off the moving mean of the batch norm after it: exact in training and in eval.

A batch norm takes the mean off its input, so a constant b before it changes nothing but that mean:

    batch_norm(x + b; moving_mean = m) = batch_norm(x; moving_mean = m - b)

for the batch's own mean, and for every average of such means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..porting.states import tensors_for
from ..porting.units import Unit, Units, units_of
from .edits import NDArray, Note, chosen, edited, silent
from .formulas import absorbed
from .owners import owners_of


def absorb(
    checkpoint: Checkpoint,
    names: str | Iterable[str] | None = None,
    *,
    keep: bool = False,
    note: Note = silent,
    **options: Any,
) -> Checkpoint:
    """Take the bias of each layer before a batch norm off that batch norm's moving mean.

    Args:
        checkpoint: stays as it is.
        names: of the batch norms, patterns; None: all. Those whose layer has no bias are left alone.
        keep: leave zeros in the bias's place, so that the same model loads it; else the bias is removed.
        note: told what was done and on what grounds.
        options: as of `bnlayer.porting.units.units_of`.

    Raises:
        CheckpointError: it is not certain which layer a batch norm follows, or the file's format has fixed tensors.
    """
    units = units_of(checkpoint, **options)
    norms = chosen([unit for unit in units.units if unit.kind == "batch norm"], names)
    pairs, refusals = owners_of(units, norms, note)
    if refusals:
        raise CheckpointError("no bias was absorbed:\n  " + "\n  ".join(refusals))
    changes: dict[str, NDArray] = {}
    gone: set[str] = set()
    for norm, owner in pairs:
        if "bias" in owner.parts:
            changes |= _without_bias(units, norm, owner, note)
            gone.add(owner.parts["bias"])
    if keep:
        changes |= {name: np.zeros_like(checkpoint[name]) for name in gone}
        gone = set()
    elif gone and checkpoint.format == "onnx":
        raise CheckpointError("an ONNX graph needs every tensor that it has; keep the biases (as zeros).")
    return edited(checkpoint, changes, removed=gone)


def _without_bias(units: Units, norm: Unit, owner: Unit, note: Note) -> dict[str, NDArray]:
    assert norm.stored is not None
    state = absorbed(norm.stored.state(), norm.stored.spec, units.checkpoint[owner.parts["bias"]])
    note("converted", "the bias before it taken off the moving mean: the same in training and in eval", norm.name)
    made = tensors_for(norm.stored, norm.stored.spec, state, note)
    if state.renorm_mean is not None:
        name = norm.stored.parts["renorm_mean"]
        made[name] = state.renorm_mean.reshape(units.checkpoint.tensors[name].shape)
    return made
