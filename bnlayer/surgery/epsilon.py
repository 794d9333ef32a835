"""Another epsilon, with the same numbers in eval.

Eval computes gamma * (x - mean) / sqrt(variance + epsilon) + beta. With another epsilon e' that stays the same if

    variance' = variance + epsilon - e'

which is no variance where it is negative; then gamma makes up for it:

    gamma' = gamma * sqrt((variance + e') / (variance + epsilon))

In training the batch's own variance is used, so there the change of epsilon remains; and a shifted moving variance
drifts back to the data's as training goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from ..checkpoint.batch_norms import StoredBatchNorm, find
from ..checkpoint.checkpoint import Checkpoint, Layer
from ..errors import CheckpointError
from ..porting.states import tensors_for
from .edits import NDArray, Note, chosen, edited, refuse_assumed, silent
from .formulas import shifted


def set_epsilon(
    checkpoint: Checkpoint,
    epsilon: float,
    names: str | Iterable[str] | None = None,
    *,
    accept_assumed: bool = False,
    note: Note = silent,
    **options: Any,
) -> Checkpoint:
    """Make a checkpoint for layers of another epsilon, which compute the same in eval with it.

    Args:
        checkpoint: stays as it is.
        epsilon: what the layers that will load it have.
        names: of the batch norms, patterns; None: all.
        accept_assumed: take the framework's default where the file does not tell its epsilon.
        note: told of each layer how.
        options: as of `bnlayer.checkpoint.batch_norms.find`; `epsilon_now` is what they have where the file says not.

    Raises:
        CheckpointError: the epsilon is not known, is negative or not finite, or cannot be reached.
    """
    if not (np.isfinite(epsilon) and epsilon >= 0):
        raise CheckpointError(f"epsilon must be a number from 0 up; got {epsilon}.")
    if checkpoint.format == "onnx":
        raise CheckpointError("an ONNX graph has its epsilons in its nodes, which are not rewritten here.")
    now = options.pop("epsilon_now", None)
    norms = chosen(find(checkpoint, epsilon=now, **options).batch_norms, names)
    refuse_assumed(norms, accept_assumed, note)
    changes: dict[str, NDArray] = {}
    for one in norms:
        if one.spec.epsilon != epsilon:
            changes |= _moved(one, epsilon, note)
    done = {one.name for one in norms}
    layers = tuple(_said(layer, epsilon) if layer.name in done else layer for layer in checkpoint.layers)
    if any(one.sources["epsilon"] != "file" for one in norms):
        note("warnings", f"the format does not say epsilon: the model that loads it needs epsilon {epsilon:g}")
    return replace(edited(checkpoint, changes), layers=layers)


def _moved(one: StoredBatchNorm, epsilon: float, note: Note) -> dict[str, NDArray]:
    state, how = shifted(one.state(), one.spec, epsilon, one.name)
    note("lossy", f"epsilon {one.spec.epsilon:g} becomes {epsilon:g}: {how}, exact in eval mode alone", one.name)
    return tensors_for(one, one.spec, state, note)


def _said(layer: Layer, epsilon: float) -> Layer:
    """The layer's arguments with the new value, whatever its framework calls it."""
    word = next((word for word in ("epsilon", "eps") if word in layer.settings), None)
    if word is not None:
        return replace(layer, settings={**layer.settings, word: epsilon})
    if "spec" in layer.settings:
        return replace(layer, settings={**layer.settings, "spec": {**layer.settings["spec"], "epsilon": epsilon}})
    return layer
