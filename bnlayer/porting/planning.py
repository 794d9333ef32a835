"""A port: planned from names, shapes and settings, and applied once nothing is in doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..checkpoint.batch_norms import StoredBatchNorm
from ..checkpoint.checkpoint import Checkpoint, NDArray, Tensor
from ..errors import CheckpointError, PortError
from ..spec import BatchNormSpec
from ..surgery.formulas import absorbed, shifted
from . import matching, rules
from .kernels import flattens, kernel_for
from .layouts import Shape
from .report import Report
from .rules import Rules
from .sidecars import write_sidecar
from .states import tensors_for
from .units import Unit, Units, units_of

Epsilon = Literal["carry", "shift"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which layer gets whose weights, and what happens to them on the way. Nothing has been read but shapes.

    Attributes:
        source, target: both checkpoints' layers.
        matching: the pairs, and what could not be decided.
        only_batch_norms: everything else keeps the template's values.
        epsilon: "carry" writes the source's epsilon beside the checkpoint, for `load_into`; "shift" keeps the
            template's, and shifts the difference into the moving variances, which is exact in eval mode alone.
        flatten: of dense layers by target name, (channels, *spatial) before the input was flattened.
        report: what is known already; `apply` adds to it.
    """

    source: Units
    target: Units
    matching: matching.Matching
    _: KW_ONLY
    only_batch_norms: bool = False
    epsilon: Epsilon = "carry"
    flatten: Mapping[str, Shape] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    report: Report

    @property
    def refused(self) -> bool:
        """Whether something is undecided, unmatched or not understood."""
        return bool(self.report.refusals)

    def specs(self) -> dict[str, BatchNormSpec]:
        """For each batch norm of the target that gets a state, its spec: by the target's name."""
        return {t.name: self._spec(s, t) for s, t in self._pairs() if s.stored is not None and t.stored is not None}

    def apply(self, *, allow_partial: bool = False) -> Checkpoint:
        """Read the source, and make the target's checkpoint of it.

        Args:
            allow_partial: leave the template's values where the plan is refused, instead of raising.

        Raises:
            PortError: the plan is refused; the message lists why.
            CheckpointError: a tensor cannot be read, or its values have no place in the target.
        """
        if self.refused and not allow_partial:
            raise PortError(
                f"{len(self.report.refusals)} things stand in the way of this port, so nothing was done"
                " (allow_partial leaves them as the template has them):\n  " + "\n  ".join(self.report.refusals)
            )
        changes: dict[str, NDArray] = {}
        shifts: dict[str, NDArray] = {}
        norms = [(s, t) for s, t in self._pairs() if t.kind == "batch norm"]
        for s, t in self._pairs():
            if t.kind != "batch norm":
                tensors, bias = self._layer(s, t)
                changes.update(tensors)
                if bias is not None and (taker := self._follower(s, t)) is not None:
                    shifts[taker] = bias
        for s, t in norms:
            changes.update(self._batch_norm(s, t, shifts.get(t.name)))
        for name, tensor in self.target.checkpoint.tensors.items():
            if name in changes and changes[name].shape != tensor.shape:
                raise CheckpointError(f"{name}: {changes[name].shape} was made for a tensor of shape {tensor.shape}.")
        like = self.target.checkpoint
        for alias, first in like.metadata.get("tied", {}).items():  # one tensor under two names
            if first in changes and alias in like.tensors:
                changes[alias] = changes[first]
        made = {name: Tensor.of(changes[name]) if name in changes else like.tensors[name] for name in like.tensors}
        return with_fields(like, tensors=made)

    def save(
        self, path: str | Path, format: str | None = None, *, force: bool = False, allow_partial: bool = False
    ) -> Checkpoint:
        """Apply it, and write the checkpoint with its batch norms' specs beside it, for `load_into`.

        Args:
            path, format, force: as of `bnlayer.checkpoint.save`; the specs go to `PATH.bnlayer.json`.
            allow_partial: as of `apply`, which says what is raised.
        """
        made = self.apply(allow_partial=allow_partial)
        made.save(path, format, force=force)
        write_sidecar(path, self.specs(), force=force)
        return made

    def _pairs(self) -> list[tuple[Unit, Unit]]:
        pairs = [(self.source[m.source], self.target[m.target]) for m in self.matching.matches]
        return [(s, t) for s, t in pairs if t.kind == "batch norm" or not self.only_batch_norms]

    def _follower(self, s: Unit, t: Unit) -> str | None:
        """The one batch norm of the target that surely comes right after this layer, so that it can take its bias."""
        after = [
            (a, b)
            for a, b in self._pairs()
            if a.kind == "batch norm"
            and (a.owner == s.name or b.owner == t.name)
            and a.owner in (s.name, None)
            and b.owner in (t.name, None)
        ]
        sure = len(after) == 1 and (after[0][0].certain_owner or after[0][1].certain_owner)
        return after[0][1].name if sure else None

    def _read(self, unit: Unit, role: str) -> NDArray:
        return self.source.checkpoint[unit.parts[role]]

    def _layer(self, s: Unit, t: Unit) -> tuple[dict[str, NDArray], NDArray | None]:
        """The tensors of a layer that is no batch norm, and a bias that has no place in it."""
        tensors, report = self.target.checkpoint.tensors, self.report
        made: dict[str, NDArray] = {}
        if t.kind == "norm":
            for role in ("gamma", "beta"):
                if role in t.parts and role in s.parts:
                    made[t.parts[role]] = self._read(s, role).reshape(tensors[t.parts[role]].shape)
                elif role in t.parts:
                    neutral = 1.0 if role == "gamma" else 0.0
                    report.add("converted", f"{role} filled with {neutral:g}: the source has none, which is the same",
                               t.parts[role])  # fmt: skip
                    made[t.parts[role]] = np.full(tensors[t.parts[role]].shape, neutral, self._dtype(s))
            report.add("exact", "norms copied", t.name)
            return made, None
        shape = tensors[t.parts["kernel"]].shape
        flatten, _ = flattens(self.source, self.target, s, t, self.flatten.get(t.name))
        made[t.parts["kernel"]] = kernel_for(s, t, self._read(s, "kernel"), shape, flatten)
        if flatten is not None:
            report.add("converted", f"columns put into the other order of a flattened {flatten}", t.name)
        if s.layout.name == t.layout.name:
            report.add("exact", "kernels copied", t.name)
        else:
            report.add("converted", f"kernel {s.layout.name} to {t.layout.name}", t.name)
        bias = self._read(s, "bias") if "bias" in s.parts else None
        if "bias" in t.parts:
            goal = tensors[t.parts["bias"]].shape
            if bias is None:
                report.add("converted", "bias filled with 0: the source has none, which is the same", t.parts["bias"])
                bias = np.zeros(goal, self._dtype(s))
            made[t.parts["bias"]] = bias.reshape(goal)
            return made, None
        return made, bias

    def _dtype(self, unit: Unit) -> np.dtype[Any]:
        return self.source.checkpoint.tensors[next(iter(unit.parts.values()))].dtype

    def _batch_norm(self, s: Unit, t: Unit, bias: NDArray | None) -> dict[str, NDArray]:
        """The tensors of a batch norm. `bias`: of the layer before it, which has no place of its own in the target."""
        assert s.stored is not None and t.stored is not None
        report, state = self.report, s.stored.state()
        if bias is not None:
            state = absorbed(state, s.stored.spec, bias)
            report.add("converted", "bias of the layer before taken off the moving mean (exact in training and eval)",
                       t.name)  # fmt: skip
        if self.epsilon == "shift" and s.stored.spec.epsilon != t.stored.spec.epsilon:
            state, how = shifted(state, s.stored.spec, t.stored.spec.epsilon, t.name)
            report.add("lossy", f"epsilon {s.stored.spec.epsilon:g} is {t.stored.spec.epsilon:g} there: {how}, exact in"
                       " eval mode alone", t.name)  # fmt: skip
        made = tensors_for(t.stored, s.stored.spec, state, report.add)
        if bias is None:
            report.add("exact", "batch norms carried bit by bit", t.name)
        return made

    def _spec(self, s: Unit, t: Unit) -> BatchNormSpec:
        assert s.stored is not None and t.stored is not None
        mine, theirs = s.stored.spec, t.stored.spec
        return theirs.replace(epsilon=theirs.epsilon if self.epsilon == "shift" else mine.epsilon, decay=mine.decay)


def plan(
    source: Checkpoint,
    template: Checkpoint,
    *,
    given: Rules | None = None,
    pairs: Mapping[str, str] | None = None,
    only_batch_norms: bool = False,
    epsilon: Epsilon = "carry",
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a port of the source's weights into a checkpoint like the template.

    Args:
        source: where the weights are; of a file, or `ModelAdapter.read` of a live model, which tells more.
        template: the names, shapes and order of what is wanted, likewise.
        given: a rules file, for what the votes cannot decide.
        pairs: more layers that are certain, the source's name to the template's: as a run has decided.
        only_batch_norms: carry batch norms alone; everything else keeps the template's values.
        epsilon: as of `Plan`.
        source_options, target_options: as of `units_of`: dialect, names, ema, epsilon, decay.

    Raises:
        CheckpointError: nothing tells whose layouts the tensors have.
        FileError: a rule does not fit.
    """
    given = given or Rules()
    told = {"epsilon": given.epsilon, "decay": given.decay, **(source_options or {})}
    froms, tos = units_of(source, **told), units_of(template, **(target_options or {}))
    said, flatten = given.pairs(froms, tos)
    left_out = {u.name for u in froms.units if rules.ignored(given.ignored_source, u.name)}
    kept = {u.name for u in tos.units if rules.ignored(given.ignored_target, u.name)}
    froms, tos = _without(froms, left_out), _without(tos, kept)
    found = matching.match(froms, tos, {**(pairs or {}), **said})
    made = Plan(
        froms, tos, found, only_batch_norms=only_batch_norms, epsilon=epsilon, flatten=flatten,
        ignored=frozenset(left_out | kept), report=Report(found),
    )  # fmt: skip
    _tell(made, given, left_out, kept)
    return made


def _without(units: Units, names: set[str]) -> Units:
    return with_fields(units, units=tuple(u for u in units.units if u.name not in names)) if names else units


def _tell(plan: Plan, given: Rules, left_out: set[str], kept: set[str]) -> None:
    """Everything that is known before a tensor is read."""
    report, found, only = plan.report, plan.matching, plan.only_batch_norms
    refuse = report.refusals.append

    def matters(units: Units, name: str) -> bool:
        return not only or units[name].kind == "batch norm"

    for one in found.ambiguous:
        if any(matters(plan.source, name) for name in one.sources):
            refuse(f"{one.reason}: {', '.join(one.sources)} -> {', '.join(one.targets)}")
    for name in found.unmatched_source:
        if matters(plan.source, name):
            u = plan.source[name]
            refuse(f"{name} ({u.kind} {u.shape}) of the source has no counterpart in the template")
            report.add("not_carried", f"{u.kind} without a counterpart", name)
    for name in found.unmatched_target:
        if matters(plan.target, name):
            u = plan.target[name]
            refuse(f"{name} ({u.kind} {u.shape}) of the template has no counterpart in the source")
            report.add("warnings", "keeps the template's values", name)
    for side, units, patterns in (
        ("source", plan.source, given.ignored_source), ("template", plan.target, given.ignored_target)
    ):  # fmt: skip
        for odd in units.strange:
            if odd.harmless:
                if side == "source":
                    report.add("warnings", "left behind: no weights of the model", *odd.tensors)
            elif rules.ignored(patterns, odd.name):
                report.add("not_carried", f"ignored, as the rules say: {odd.reason}", odd.name)
            elif not only:
                refuse(f"{odd.name} of the {side} is not understood: {odd.reason}")
                if side == "source":
                    report.add("not_carried", f"not understood: {odd.reason}", odd.name)
    for name in sorted(left_out):
        report.add("not_carried", "ignored, as the rules say", name)
    for name in sorted(kept):
        report.add("warnings", "keeps the template's values, as the rules say", name)
    for s, t in plan._pairs():
        if s.stored is not None and t.stored is not None:
            _tell_batch_norm(plan, s.stored, t.stored, t.name)
        elif t.kind == "norm":
            for part in (s.parts[role] for role in ("gamma", "beta") if role in s.parts and role not in t.parts):
                refuse(f"{part} has no place in {t.name}, which has none")
        elif "bias" in s.parts and "bias" not in t.parts and plan._follower(s, t) is None:
            refuse(f"{s.parts['bias']} has no place in {t.name}, and no batch norm surely follows that could take it")
        _, unclear = flattens(plan.source, plan.target, s, t, plan.flatten.get(t.name))
        if unclear:
            refuse(f"{s.name} -> {t.name}: {unclear}")


def _tell_batch_norm(plan: Plan, s: StoredBatchNorm, t: StoredBatchNorm, name: str) -> None:
    report = plan.report
    for what, value in (("epsilon", s.spec.epsilon), ("decay", s.spec.decay)):
        if s.sources[what] == "assumed":
            report.add("assumed", f"{what} {value}: the source does not say, and this is its framework's default", name)
    if s.sources["kind"] == "assumed":
        report.add("assumed", "a batch norm: an instance norm would have the same names", name)
    if plan.epsilon == "carry" and s.spec.epsilon != t.spec.epsilon:
        report.add("converted", f"epsilon {s.spec.epsilon:g}, where the template has {t.spec.epsilon:g}: load_into sets"
                   " it", name)  # fmt: skip
    if s.spec.decay != t.spec.decay:
        report.add("converted", f"decay {s.spec.decay}, where the template has {t.spec.decay}: load_into sets it", name)
    mine, theirs = s.spec.moving_variance_estimator, t.spec.moving_variance_estimator
    if mine != theirs:
        report.add("warnings", f"the moving variance is {theirs} there and {mine} in the source: while it trains on it"
                   " differs by n/(n-1), n being the values per channel", name)  # fmt: skip
    for what in ("renorm", "virtual_batch_size"):
        if getattr(s.spec, what) is not None and getattr(s.spec, what) != getattr(t.spec, what):
            report.add("lossy", f"{what} is not carried: it trains on as a plain batch norm", name)
