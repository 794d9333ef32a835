"""Is a port right? Both models are run and compared, the cheap checks first, and every failure is explained.

found = verify(source_model, target_model)
print(found)
assert found.ok
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

from ..diagnostics import diagnose
from ..errors import InputError
from .explain import Cause, Explanation, first_difference
from .matching import Matching
from .noise import bound, difference, input_of, perturbed, tolerance_of
from .pairing import Pairing, Pairs
from .planning import Plan
from .replay import NDArray, Step
from .report import Report
from .sides import Pass, Side, values_of

Shape = tuple[int, ...]
SHAPES: Final[tuple[Shape, ...]] = ((2, 65, 65, 3), (2, 64, 64, 3))
_STATISTICS: Final = 1e-5  # of the batch's deviation: what moving statistics may differ by after a few steps
_LEFT_OUT: Final = ("never-trained",)  # a new model has no fault: random values are planted


@dataclass(frozen=True)
class Result:
    """One step of a verification.

    Attributes:
        name: "static", "round trip", "replay", "eval 2x65x65x3", "train".
        ok: whether it passed.
        text: what was found, with its numbers.
        details: a line for each layer that failed, by its name in the target.
    """

    name: str
    ok: bool
    text: str
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """What a verification found. Print it: a line a step, and the causes.

    Attributes:
        steps: what was checked, in this order.
        causes: why it failed, each proven; empty where nothing failed, or no hypothesis explains it.
        notes: what is worth knowing and no fault.
    """

    steps: tuple[Result, ...]
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every step passed."""
        return all(step.ok for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "ok": self.ok,
            "steps": [{"name": s.name, "ok": s.ok, "text": s.text, "details": s.details} for s in self.steps],
            "causes": [cause.to_dict() for cause in self.causes],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            lines.append(f"{'VERIFIED' if step.ok else 'FAILED':12}{step.name}: {step.text}")
            lines += [f"{'':12}  {name}: {text}" for name, text in list(step.details.items())[:5]]
            if len(step.details) > 5:
                lines.append(f"{'':12}  and {len(step.details) - 5} more")
        for cause in self.causes:
            named = ", ".join(cause.layers[:8]) + (
                f" and {len(cause.layers) - 8} more" if len(cause.layers) > 8 else ""
            )
            lines.append(f"{'CAUSE':12}{cause.code}{f' ({named})' if named else ''}: {cause.text}")
            lines += [f"{'':12}  {cause.proof}", f"{'':12}  {cause.remedy}"]
        if not self.ok and not self.causes:
            lines.append(f"{'':12}No hypothesis explains it: epsilon, momentum, estimator, mode, order and padding were"
                         " tried.")  # fmt: skip
        return "\n".join([*lines, *(f"{'NOTE':12}{note}" for note in self.notes)])


def verify(
    source_model: Any,
    target_model: Any,
    matches: Pairs | None = None,
    *,
    shapes: Sequence[Shape] = SHAPES,
    train_steps: int = 3,
    plan: Plan | None = None,
    randomize: bool | Literal["auto"] = "auto",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Compare a ported model with its source.

    Both get their own tensors and settings back, whatever happens.

    Args:
        source_model, target_model: live models, of any frameworks.
        matches: pairs of the names of layers, the source's first; None: as `plan` matches them, or a new plan does.
        shapes: inputs to compare at, batch first and channels last. The first shows the weights: its sizes are to be
            2^k + 1, at which all paddings are alike; another of even size then shows the padding.
        train_steps: forward passes in training mode, whose moving statistics are compared.
        plan: the port's, if there was one: it knows of flattened layers and shifted epsilons.
        randomize: plant random statistics and parameters in both models; "auto": where the source is a new model, in
            which mistakes do not show.
        seed: of the inputs and of what is planted.
        progress: called with what is done next.

    Raises:
        UnknownBackend: no adapter knows such a model.
        PortError: the models' batch norms cannot be paired.
        InputError: a shape or the number of steps makes no sense.
    """
    shapes = [tuple(shape) for shape in shapes]
    if not shapes or any(len(shape) < 2 or min(shape) < 1 for shape in shapes):
        raise InputError(f"shapes must be one or more of (batch, ..., channels); got {shapes}.")
    if train_steps < 0:
        raise InputError(f"train_steps must be 0 or more; got {train_steps}.")
    source = Side.of("source", source_model, plan.source.dialect if plan else None)
    target = Side.of("target", target_model, plan.target.dialect if plan else None)
    try:
        pairing = Pairing.of(source, target, matches, plan)
        if randomize is True or (randomize == "auto" and pairing.is_new):
            pairing = pairing.plant(seed)
        return _Work(pairing, shapes, train_steps, seed, progress or (lambda _: None)).result()
    finally:
        source.restore()
        target.restore()


@dataclass
class _Work:
    pairing: Pairing
    shapes: list[Shape]
    train_steps: int
    seed: int
    progress: Callable[[str], None]
    notes: list[str] = field(default_factory=list)

    def result(self) -> Verification:
        p = self.pairing
        if p.planted:
            self.notes.append("the source is a new model: random statistics and parameters stood in both")
        held = p.target.held
        inputs = {shape: input_of(shape, self.seed + i) for i, shape in enumerate(self.shapes)}
        batches = [input_of(self.shapes[0], self.seed + 100 + i) for i in range(self.train_steps)]
        steps: list[Result] = []
        for name, check in (("static checks", self._static), ("round trip", self._round_trip)):
            self.progress(name)
            steps.append(check())
        passes: list[tuple[Shape, Pass, Pass, float]] = []
        for shape, x in inputs.items():
            self.progress(f"eval at {_words(shape)}")
            mine, theirs = p.source.run(x), p.target.run(x)
            passes.append((shape, mine, theirs, tolerance_of(p.source, x, mine)))
        steps.append(self._replay(passes[0][1], passes[0][2]))
        steps += [self._eval(*each) for each in passes]
        if batches:
            self.progress(f"{len(batches)} training steps")
            steps.append(self._train(batches))
        causes: list[Cause] = []
        if not all(step.ok for step in steps):
            self.progress("explaining what differs")
            p.target.put(held)
            causes = Explanation(p, inputs, batches).found()
        return Verification(tuple(steps), tuple(causes), tuple(self.notes))

    def _static(self) -> Result:
        """The target's own numbers, without what is wrong with the source's too."""
        p = self.pairing
        units = p.target.units(p.target.held)
        mine = {(d.layer, d.code) for d in diagnose(_stored(p.plan.source))}
        details = {
            d.layer or "all": d.message
            for d in diagnose(_stored(units))
            if d.severity == "error" and d.code not in _LEFT_OUT and (p.partners.get(d.layer, ""), d.code) not in mine
        }
        for name, wanted in p.wanted.items():
            spec = p.target.specs.get(name)
            if spec is not None and (spec.num_features,) != wanted.mean.shape:
                details[name] = f"{spec.num_features} channels, and the source has {wanted.mean.size}"
        for unit in units.units:
            if unit.stored is not None and unit.name not in p.wanted:
                details[unit.name] = "is matched with no batch norm of the source, so nothing verifies it: give matches"
        text = f"{len(p.wanted)} batch norms finite, no variance below 0, statistics present"
        return Result("static", not details, text if not details else f"{len(details)} findings", details)

    def _round_trip(self) -> Result:
        """The target ported back, against the source: bits, and where the port converted, one rounding."""
        p = self.pairing
        back = Matching(
            tuple(replace(m, source=m.target, target=m.source, kind=p.plan.source[m.source].kind)
                  for m in p.plan.matching.matches), (), (), (),
        )  # fmt: skip
        reverse = Plan(
            p.target.units(p.target.held), p.plan.source, back, only_batch_norms=p.plan.only_batch_norms,
            epsilon=p.plan.epsilon, flatten={m.target: p.plan.flatten[m.source] for m in back.matches
                                             if m.source in p.plan.flatten}, report=Report(back),
        )  # fmt: skip
        made, held = reverse.apply(allow_partial=True), p.source.held
        converted = {n for r in (p.plan.report, reverse.report) for section in ("converted", "assumed", "lossy")
                     for names in r.notes[section].values() for n in names}  # fmt: skip
        details: dict[str, str] = {}
        exact = 0
        again = values_of(p.source.units(made))
        before = values_of(p.plan.source)
        for m in back.matches:
            unit = p.plan.source[m.target]
            parts = [t for role, t in unit.parts.items() if role in _COMPARED]
            if all(_bits(made[t], held[t]) for t in parts):
                exact += 1
                continue
            named = {unit.name, m.source, *unit.parts.values(), *p.plan.target[m.source].parts.values()} & converted
            if named and unit.stored is not None:
                bias = [_bias(p, unit, c) for c in (held, made)]
                a, b = before[unit.name], again[unit.name]
                pairs = [(a.mean - bias[0], b.mean - bias[1]), (a.gamma, b.gamma), (a.beta, b.beta)]
                scale = np.abs(a.mean) + np.abs(bias[0]) + np.abs(a.variance) + 1
                if all(bool((np.abs(x - y) <= 2.0**-22 * (scale + np.abs(x))).all()) for x, y in pairs):
                    continue
            elif named or not parts:
                continue
            worst = max(difference(held[t], made[t]) for t in parts)
            details[m.source] = f"comes back to {unit.name} with an error of {worst:.2g}"
        count = len(back.matches)
        text = f"{exact} of {count} layers come back bit by bit"
        if exact < count and not details:
            text += ", the rest, converted, within one rounding"
        return Result("round trip", not details, text, details)

    def _replay(self, mine: Pass, theirs: Pass) -> Result:
        """Every batch norm's output, from its input and its own tensors, in float64."""
        p = self.pairing
        details: dict[str, str] = {}
        worst, count = 0.0, 0
        for side, done in ((p.source, mine), (p.target, theirs)):
            held = values_of(side.units(side.held))
            for name in done.layers:
                spec = side.specs.get(name) or _spec(side.units(side.held)[name])
                seen = done.seen(name)
                error = seen.misfit(held[name], spec.epsilon, "moving" if spec.track_moving_stats else "batch")
                worst, count = max(worst, error), count + 1
                if error > seen.tolerance:
                    details[name if side is p.target else f"{name} of the source"] = (
                        f"does not compute what its tensors and settings say: off by {error:.2g}"
                    )
            for name in done.moved:
                details[name if side is p.target else f"{name} of the source"] = "its eval moves its statistics"
        missing = [name for name in p.wanted if name not in theirs.layers]
        if missing:
            self.notes.append(f"never called in eval: {', '.join(missing)}")
        return Result(
            "replay", not details, f"{count} batch norms of both models recomputed in float64, error {worst:.2g}",
            details,
        )  # fmt: skip

    def _eval(self, shape: Shape, mine: Pass, theirs: Pass, tolerance: float) -> Result:
        error = difference(mine.output, theirs.output)
        ok = error <= tolerance
        text = f"outputs differ by {error:.2g} of the largest; {tolerance:.2g} is rounding"
        details: dict[str, str] = {}
        if not ok:
            first = first_difference(self.pairing, mine, theirs, tolerance)
            if first is None:
                text += "; every batch norm agrees, so it is after the last"
            else:
                name, what, size = first
                text += f"; the first layer that differs is {name}"
                details[name] = f"its {what} differs by {size:.2g}"
            if mine.output.shape != theirs.output.shape:
                text += f"; the outputs have shapes {mine.output.shape} and {theirs.output.shape}"
        return Result(f"eval {_words(shape)}", ok, text, details)

    def _train(self, batches: list[NDArray]) -> Result:
        """The moving statistics after training steps; and the outputs' noise, for how far they may be apart."""
        p = self.pairing
        _, mine = p.source.train(batches)
        _, noisy = p.source.train([perturbed(x, i) for i, x in enumerate(batches)])
        _, theirs = p.target.train(batches)
        details: dict[str, str] = {}
        worst_mean = worst_variance = 0.0
        corrected = 0
        for name, steps in theirs.items():
            partner = p.partners.get(name)
            if partner is None or partner not in mine:
                continue
            decay = p.specs[name].decay
            depth = list(theirs).index(name) + 1
            floor = max(_apart(mine[partner], noisy[partner], 1.0, None))
            tolerance = max(_STATISTICS, bound(floor, depth))
            kept = None if isinstance(decay, str) else float(decay) ** len(steps)
            mean, raw = _apart(mine[partner], steps, 1.0, kept)
            n = steps[0].seen.count
            factors = (1.0,) if n < 2 else (1.0, (n - 1) / n, n / (n - 1))
            variances = [_apart(mine[partner], steps, factor, kept)[1] for factor in factors]
            variance = min(variances)
            corrected += raw > tolerance >= variance
            worst_mean, worst_variance = max(worst_mean, mean), max(worst_variance, variance)
            still = all(np.array_equal(s.before.mean, s.after.mean) for s in steps)
            moves = not all(np.array_equal(s.before.mean, s.after.mean) for s in mine[partner])
            if mean > tolerance or variance > tolerance:
                details[name] = f"moving mean off by {mean:.2g} of the deviation, variance by {variance:.2g}"
                if still and moves:
                    details[name] += "; it does not move at all"
        text = (
            f"after {len(batches)} steps moving means differ by {worst_mean:.2g} of the batches' deviation, variances"
            f" by {worst_variance:.2g}"
        )
        if corrected:
            text += f" ({corrected} of them after the n/(n-1) correction)"
        return Result("train", not details, text, details)


_COMPARED: Final = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance", "hidden_mean",
                    "hidden_variance")  # fmt: skip


def _apart(mine: list[Step], theirs: list[Step], factor: float, kept: float | None) -> tuple[float, float]:
    """How far two layers' moving statistics are apart after the steps: mean and variance, of the batch's deviation.

    Args:
        factor: of what the batches put into the first one's variance, to compare another estimator.
        kept: the share of the starting values that is left; None: compare the values themselves.
    """
    first, last = mine[0].before, mine[-1].after
    start, end = theirs[0].before, theirs[-1].after
    _, variance = mine[-1].seen.moments()
    deviation = np.sqrt(variance)
    # A channel that hardly varies is judged by the layer's usual one: its own deviation is rounding.
    deviation = np.maximum(deviation, 1e-2 * float(np.median(deviation)) + 1e-12)
    mean = np.abs((last.mean - first.mean) - (end.mean - start.mean))
    if kept is None:
        apart = np.abs(last.variance - end.variance)
    else:
        apart = np.abs((last.variance - kept * first.variance) * factor - (end.variance - kept * start.variance))
    if kept is not None:  # a bias put into the mean is there before and after; other differences are not
        offset = np.abs((last.mean - kept * first.mean) - (end.mean - kept * start.mean))
        mean = np.minimum(mean, offset)
    with np.errstate(all="ignore"):
        a, b = float((mean / deviation).max(initial=0)), float((apart / deviation**2).max(initial=0))
    return (a if np.isfinite(a) else float("inf")), (b if np.isfinite(b) else float("inf"))


def _stored(units: Any) -> list[Any]:
    return [replace(u.stored, name=u.name) for u in units.units if u.stored is not None]


def _spec(unit: Any) -> Any:
    return unit.stored.spec


def _bits(a: NDArray, b: NDArray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _bias(p: Pairing, unit: Any, checkpoint: Any) -> Any:
    """Of the layer that a batch norm belongs to, or 0."""
    owner = None if unit.owner is None else p.plan.source[unit.owner]
    if owner is None or "bias" not in owner.parts:
        return np.zeros(unit.shape)
    return checkpoint[owner.parts["bias"]].reshape(-1).astype(np.float64)


def _words(shape: Shape) -> str:
    return "x".join(map(str, shape))
