"""Which layer a batch norm surely follows: by the file's order and names, or by running the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..contract import ModelAdapter
from ..porting.units import KERNELS, Unit, Units
from ..state import array_names
from .edits import NDArray, Note

Pairs = Sequence[tuple[Unit, Unit]]  # a batch norm, and the layer that it follows

# Names that a framework gave by counting each class apart: the same number is no sign of belonging together.
_COUNTED: Final = re.compile(r"(batch_normalization|BatchNorm|batch_norm)(_\d+)?$")
_WRONG: Final = 1e-3  # of the largest output: above rounding by far, and below what a fold into a wrong layer does


def owners_of(units: Units, norms: Sequence[Unit], note: Note) -> tuple[Pairs, list[str]]:
    """The layer that each batch norm surely follows as far as a file tells, and why the others are refused.

    Sure is: the names are the same but for what kind of layer they name, they are not merely counted by the framework,
    and in a file with the model's order the layer comes before the batch norm with no other layer between.
    """
    pairs: list[tuple[Unit, Unit]] = []
    refusals: list[str] = []
    for norm in norms:
        reason = _doubt(units, norm)
        if reason:
            refusals.append(f"{norm.name}: {reason}")
        else:
            assert norm.owner is not None
            pairs.append((norm, units[norm.owner]))
    refusals += _shared(units, pairs)
    for norm, owner in pairs:
        note("assumed", "it follows its layer directly, and nothing else takes that layer's output: names say so, a"
             " model would prove it", norm.name)  # fmt: skip
        if owner.kind == "conv" and "conv transpose" in owner.doubt:
            note("assumed", "a convolution, not a transposed one, which the file would not tell apart", owner.name)
    return pairs, refusals


def candidates(units: Units, norms: Sequence[Unit], calls: Sequence[str]) -> tuple[Pairs, list[str]]:
    """For each batch norm the layer that it may follow, for a run to prove: the last one called before it.

    Args:
        units: the model's.
        norms: of them.
        calls: layer names in the order in which the model called them.
    """
    pairs: list[tuple[Unit, Unit]] = []
    refusals: list[str] = []
    place = {name: i for i, name in enumerate(calls)}
    layers = [unit for unit in units.units if unit.kind in KERNELS and unit.kind != "embedding" and unit.name in place]
    for norm in norms:
        before = [one for one in layers if place[one.name] < place.get(norm.name, -1) and fits(one, norm)]
        named = [one for one in before if one.name == norm.owner and norm.certain_owner]
        if named or before:
            pairs.append((norm, (named or [max(before, key=lambda one: place[one.name])])[0]))
        else:
            refusals.append(f"{norm.name}: no layer that is called before it has its {norm.channels} channels")
    return pairs, refusals + _shared(units, pairs)


def fits(layer: Unit, norm: Unit) -> bool:
    """Whether the layer gives the batch norm's channels."""
    return layer.channels == norm.channels or (
        layer.kind == "conv transpose" and layer.groups is None and norm.channels % layer.shape[1] == 0
    )


def proven(
    reach: ModelAdapter,
    model: Any,
    checkpoint: Checkpoint,
    pairs: Pairs,
    fold: Callable[[Checkpoint, Pairs], Checkpoint],
    x: NDArray,
) -> tuple[Pairs, list[str]]:
    """The pairs that a run shows to be right, and why the others are not.

    Every batch norm gets other statistics and parameters than the checkpoint's, at which a mistake might not show.
    Folded so that each stays as an identity, each must then give what it gave, and so must the model.

    Args:
        reach, model: the live model, which has the checkpoint's values again after.
        checkpoint: of the model.
        pairs: what is to be proven.
        fold: folds these pairs of a checkpoint; its tensors stay those of the model.
        x: the model's input, the batch first and the channels last.
    """
    planted = checkpoint.replace(_planted(checkpoint, [norm for norm, _ in pairs]))
    try:
        run = reach.run(reach.write(model, planted), x, training=False, capture=True)
        uncalled = [norm.name for norm, _ in pairs if norm.name not in run.layers]
        asked = [(norm, owner) for norm, owner in pairs if norm.name in run.layers]

        def wrong(some: Pairs) -> str:
            other = reach.run(reach.write(model, fold(planted, some)), x, training=False, capture=True)
            outputs = {name: (y, other.layers[name][1]) for name, (_, y) in run.layers.items()}
            outputs["the model's output"] = run.output, other.output
            return next((name for name, (y, z) in outputs.items() if error(z, y) > _WRONG), "")

        refusals = [f"{name}: the model does not call it" for name in uncalled]
        if not wrong(asked):
            return asked, refusals
        right: list[tuple[Unit, Unit]] = []
        for norm, owner in asked:
            where = wrong([(norm, owner)])
            if where:
                refusals.append(f"{norm.name}: folded into {owner.name}, {where} becomes another; it does not follow it"
                                " directly, or more than the batch norm takes that layer's output")  # fmt: skip
            else:
                right.append((norm, owner))
        return right, refusals
    finally:
        reach.write(model, checkpoint)


def error(got: NDArray, wanted: NDArray) -> float:
    """The largest difference over the largest value; infinite where a number is none."""
    difference = float(np.max(np.abs(got.astype(np.float64) - wanted.astype(np.float64)), initial=0.0))
    if not np.isfinite(difference):
        return float("inf")
    return difference / max(float(np.max(np.abs(wanted), initial=0.0)), 1e-30)


def _planted(checkpoint: Checkpoint, norms: Sequence[Unit]) -> Mapping[str, NDArray]:
    """Gammas, betas and statistics a little off those that are there, and none where they change nothing."""
    rng = np.random.default_rng(0)
    changes = {}
    for norm in norms:
        assert norm.stored is not None
        for role in ("gamma", "beta", "moving_mean", "moving_variance"):
            if role not in norm.parts or role not in array_names(norm.stored.spec):
                continue
            name = norm.parts[role]
            old = checkpoint[name].astype(np.float64)
            if role in ("gamma", "moving_variance"):
                new = np.where(old == 0, 1.0, old) * rng.uniform(0.5, 2.0, old.shape)
            else:
                new = old + rng.uniform(-0.5, 0.5, old.shape)
            changes[name] = new.astype(checkpoint.tensors[name].dtype)
    return changes


def _doubt(units: Units, norm: Unit) -> str:
    """Why it is not sure which layer it follows, or ""."""
    if norm.owner is None:
        return "no layer in the file is surely the one that it follows; a model would prove which"
    if not norm.certain_owner:
        return f"it may follow {norm.owner}, which comes before it in the file; a model would prove it"
    owner = units[norm.owner]
    if units.ordered == "all":
        if owner.order > norm.order:
            return f"it comes before {owner.name} in the file: a batch norm is never folded into the layer after it"
        between = [one.name for one in units.units if owner.order < one.order < norm.order and one.kind != "batch norm"]
        if between:
            return f"{between[0]} comes between it and {owner.name}; a model would prove that it follows that"
    elif _COUNTED.search(norm.name):
        return f"its name and that of {owner.name} are merely counted; a model would prove that it follows that"
    return ""


def _shared(units: Units, pairs: Sequence[tuple[Unit, Unit]]) -> list[str]:
    """Layers with two batch norms, and kernels that are also another layer's."""
    counts = Counter(owner.name for _, owner in pairs)
    tied = units.checkpoint.metadata.get("tied", {})
    shared = {*tied, *tied.values()}
    users = Counter(name for unit in units.units for name in unit.parts.values())
    refusals = [f"{name}: {count} batch norms follow it" for name, count in counts.items() if count > 1]
    for norm, owner in pairs:
        both = [name for one in (norm, owner) for name in one.parts.values() if name in shared or users[name] > 1]
        if both:
            refusals.append(f"{norm.name}: {both[0]} is also another layer's")
    return refusals
