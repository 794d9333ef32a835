"""torch batch norms as the tensors of a frozen one: gamma, beta and statistics, all four, and no counter.

That is what the class FrozenBatchNorm2d of torchvision and detectron2 holds. It computes what the batch norm computes
in eval, if its epsilon is the same: theirs is 1e-5, and torchvision's was 0 before 0.8.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..checkpoint.batch_norms import find
from ..checkpoint.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..porting.states import tensors_for
from ..porting.units import dialect_of
from .edits import NDArray, Note, chosen, edited, refuse_assumed, silent
from .formulas import shifted


def freeze(
    checkpoint: Checkpoint,
    names: str | Iterable[str] | None = None,
    *,
    epsilon: float = 1e-5,
    accept_assumed: bool = False,
    note: Note = silent,
    **options: Any,
) -> Checkpoint:
    """The checkpoint with frozen batch norms: counters removed, absent parameters filled in.

    Args:
        checkpoint: of a torch model; stays as it is.
        names: of the batch norms, patterns; None: all.
        epsilon: the frozen class's; a difference is shifted into the variance, or made up for by gamma.
        accept_assumed: take torch's default where the file does not tell its epsilon.
        note: told what was done.
        options: as of `bnlayer.checkpoint.batch_norms.find`; `epsilon_now` is what they have where the file says not.

    Raises:
        CheckpointError: it is no torch checkpoint; its epsilon is not known, or cannot be reached.
    """
    if checkpoint.format == "onnx" or dialect_of(checkpoint) != "torch":
        raise CheckpointError(
            "only torch has a frozen batch norm with tensors of its own. Elsewhere a frozen layer's file is the same:"
            " set layer.trainable = False in Keras, use_running_average=True in Flax, is_training=False in Haiku,"
            " inference=True in Equinox; or freeze the model with bnlayer.freeze."
        )
    now = options.pop("epsilon_now", None)
    norms = chosen(find(checkpoint, epsilon=now, **options).batch_norms, names)
    refuse_assumed(norms, accept_assumed, note)
    changes: dict[str, NDArray] = {}
    added: dict[str, tuple[str, NDArray]] = {}
    removed: set[str] = set()
    for one in norms:
        state = one.state()
        mean = one.parts["moving_mean"]
        if "gamma" not in one.parts:
            state = state.replace(gamma=np.ones_like(checkpoint[mean]))
        if one.spec.epsilon != epsilon:
            state, how = shifted(state, one.spec, epsilon, one.name)
            note("converted", f"epsilon {one.spec.epsilon:g} becomes {epsilon:g}: {how}", one.name)
        kept = state if "gamma" in one.parts else state.replace(gamma=None)
        changes |= tensors_for(one, one.spec, kept, note)
        base = mean.removesuffix("running_mean")
        assert state.gamma is not None
        beta = np.zeros_like(state.gamma) if state.beta is None else state.beta
        if "gamma" not in one.parts:
            added |= {mean: (f"{base}weight", state.gamma), one.parts["moving_variance"]: (f"{base}bias", beta)}
            note("converted", "gamma and beta added, which a frozen one has", one.name)
        if "num_updates" in one.parts:
            removed.add(one.parts["num_updates"])
            note("converted", "its counter removed, which a frozen one has not", one.name)
    note("warnings", f"build the model with frozen batch norms of epsilon {epsilon:g}")
    return edited(checkpoint, {n: a for n, a in changes.items() if n not in removed}, removed=removed, added=added)
