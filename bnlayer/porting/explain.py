"""Why a port does not compute what its source does: hypotheses, each accepted only if it removes an error.

First the tensors are judged against what the port gives, then every batch norm on its own recorded input, with the
tensors set right, then both models with everything set right that can be. So several mistakes, in the same layer too,
do not hide each other, and what a mistake does to the layers after it is not taken for another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import UnsupportedError
from .noise import difference, tolerance_of
from .pairing import Pairing, alike, close
from .replay import NDArray, Seen, Values, solved_update, update_error, update_tolerance
from .sides import Pass, at_start, values_of, with_tensors
from .swaps import find_exchanges
from .units import Unit


@dataclass(frozen=True)
class Cause:
    """What is wrong, and how that is known.

    Attributes:
        code: for programs: "epsilon", "momentum-inverted", "momentum", "estimator", "statistics-at-start",
            "mean-and-variance-swapped", "order", "padding", "never-training", "train-mode", "values".
        layers: the target's layers that have it; empty where it is the model's.
        text: what is wrong.
        proof: the error before and after the hypothesis is applied, in words.
        before, after: the two.
        remedy: what to do.
    """

    code: str
    layers: tuple[str, ...]
    text: str
    proof: str
    before: float
    after: float
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `text` says all of it, in one sentence or two."""
        return {
            "code": self.code, "layers": list(self.layers), "text": f"{self.text} {self.proof} {self.remedy}",
            "before": _json(self.before), "after": _json(self.after),
        }  # fmt: skip


@dataclass(frozen=True)
class _Form:
    """How a layer's tensors came about: another layer's values, or in a wrong form."""

    other: str
    form: str = ""  # "swapped", "start", "values"


@dataclass
class Explanation:
    """The search for causes; `causes` gathers them.

    Attributes:
        pairing: both models, as they are judged.
        inputs: by shape; the first is the one for weights.
        steps: the training steps' inputs.
    """

    pairing: Pairing
    inputs: Mapping[tuple[int, ...], NDArray]
    steps: list[NDArray]
    causes: list[Cause] = field(default_factory=list)
    _training: bool = False  # how models are compared: in eval, unless a layer's eval is wrong for good
    _blind: bool = False  # neither mode compares them

    def found(self) -> list[Cause]:
        """Every cause that is proven. Leaves both models in any state."""
        forms = self._forms()
        own = self.pairing.target.held
        self.pairing.target.put(self.pairing.expected)
        epsilons = self._behavior()
        never = self._updates()
        self._training = any(c.code == "train-mode" for c in self.causes)
        self._blind = self._training and never
        self._tensors(forms, own, epsilons)
        if not self._blind:
            self._models()
        return self.causes

    # Tensors

    def _forms(self) -> dict[str, _Form]:
        """Of every layer whose tensors are not the port's, how they came about."""
        p = self.pairing
        held = values_of(p.target.units(p.target.held))
        forms: dict[str, _Form] = {}
        for name, wanted in p.wanted.items():
            if not alike(held[name], wanted):
                forms[name] = self._batch_norm_form(name, held[name])
        for unit in p.kernels():
            if not self._holds(unit, unit):
                others = (u for u in p.kernels() if u is not unit and self._holds(unit, u))
                other = next(others, None)
                forms[unit.name] = _Form(unit.name, "values") if other is None else _Form(other.name)
        return forms

    def _batch_norm_form(self, name: str, held: Values) -> _Form:
        for other in (name, *(each for each in self.pairing.wanted if each != name)):
            wanted = self.pairing.wanted[other]
            if wanted.mean.shape != held.mean.shape:
                continue
            if not (close(held.gamma, wanted.gamma) and close(held.beta, wanted.beta)):
                continue
            if close(held.mean, wanted.mean) and close(held.variance, wanted.variance):
                return _Form(other)
            if close(held.mean, wanted.variance) and close(held.variance, wanted.mean):
                return _Form(other, "swapped")
            if at_start(held):
                return _Form(other, "start")
        return _Form(name, "values")

    def _holds(self, unit: Unit, other: Unit) -> bool:
        """Whether a layer holds what the port gives another."""
        held, expected = self.pairing.target.held, self.pairing.expected
        return unit.parts.keys() == other.parts.keys() and all(
            close(held[tensor], expected[other.parts[role]]) for role, tensor in unit.parts.items()
        )

    def _as(self, name: str, form: _Form) -> dict[str, NDArray]:
        """A layer's tensors in a wrong form, made of the right ones."""
        units, expected = self.pairing.plan.target, self.pairing.expected
        parts, other = units[name].parts, units[form.other].parts
        source = dict(other)
        if form.form == "swapped":
            for a, b in (("moving_mean", "moving_variance"), ("hidden_mean", "hidden_variance")):
                if a in source and b in source:
                    source[a], source[b] = source[b], source[a]
        made = {tensor: expected[source[role]] for role, tensor in parts.items() if role in source}
        if form.form == "start":
            for role, value in (("moving_mean", 0.0), ("moving_variance", 1.0)):
                made[parts[role]] = np.full_like(made[parts[role]], value)
        return made

    def _tensors(self, forms: Mapping[str, _Form], own: Any, epsilons: Mapping[str, float]) -> None:
        """The causes in the tensors and in epsilon, each proven by a run with everything set right but it."""
        p = self.pairing
        # Everything at once: what one cause costs beside the others is hidden by none of them.
        fixed = self._set_epsilon(epsilons)
        after = self._error(p.expected)
        wrong = {
            "order": {n: _Form(f.other) for n, f in forms.items() if f.other != n},
            "mean-and-variance-swapped": {n: _Form(n, "swapped") for n, f in forms.items() if f.form == "swapped"},
            "statistics-at-start": {n: _Form(n, "start") for n, f in forms.items() if f.form == "start"},
            "values": {n: f for n, f in forms.items() if f.form == "values"},
        }
        for code, layers in wrong.items():
            if not layers:
                continue
            changes: dict[str, NDArray] = {}
            for name, form in layers.items():
                if code == "values":
                    changes.update({tensor: own[tensor] for tensor in p.plan.target[name].parts.values()})
                else:
                    changes.update(self._as(name, form))
            before = self._error(with_tensors(p.expected, changes))
            if not before > after:  # a layer whose statistics no run reads; the tensors themselves tell
                before, proof = _deviation(p.expected, changes), "They deviate by {} of the largest; set right, by 0."
                self._add(code, tuple(layers), _text(code, layers), proof.format(_number(before)), before, 0.0)
            else:
                self._add(code, tuple(layers), _text(code, layers), self._ran(before, after), before, after)
        if fixed:
            p.target.put(p.expected)

    # Single layers

    def _behavior(self) -> dict[str, float]:
        """Layers that do not compute what they should from the right tensors: epsilon, and whose statistics."""
        p = self.pairing
        done = p.target.run(self._x)
        held = values_of(p.target.units(p.target.held))
        epsilons: dict[str, float] = {}
        by_epsilon: dict[tuple[float, float], list[tuple[str, float, float]]] = {}
        batch: list[tuple[str, float, float]] = []
        for name in done.layers:
            if name not in p.wanted:
                continue
            seen, spec = done.seen(name), p.specs[name]
            told = (spec.epsilon, p.target.specs[name].epsilon) if name in p.target.specs else (spec.epsilon,)
            found = seen.explained(held[name], told)
            if found is None:
                continue
            mode, epsilon, left = found
            before = seen.misfit(held[name], spec.epsilon, mode)
            if epsilon != spec.epsilon and before > seen.tolerance:
                by_epsilon.setdefault((spec.epsilon, epsilon), []).append((name, before, left))
                epsilons[name] = epsilon
            if mode == "batch" and spec.track_moving_stats:
                batch.append((name, seen.misfit(held[name], epsilon, "moving"), left))
        for (right, wrong), layers in by_epsilon.items():
            names, before, left = _worst(layers)
            self._add(
                "epsilon", names, f"Epsilon is {wrong:g} and was {right:g} in the source.",
                f"On the layers' own inputs, {right:g} is off by {_number(before)}, {wrong:g} by {_number(left)}.",
                before, left,
            )  # fmt: skip
        if batch:
            names, before, left = _worst(batch)
            moved = any(name in done.moved for name in names)
            self._add(
                "train-mode", names,
                "Eval normalizes with the batch's own statistics" + (" and moves the moving ones." if moved else "."),
                f"On the layers' own inputs, the moving statistics are off by {_number(before)}, the batch's by"
                f" {_number(left)}.", before, left,
            )  # fmt: skip
        return epsilons

    def _updates(self) -> bool:
        """Layers whose moving statistics do not move as they should; returns whether one never trains."""
        p = self.pairing
        if not self.steps:
            return False
        _, theirs = p.target.train(self.steps)
        _, mine = p.source.train(self.steps)
        never: list[tuple[str, float, float]] = []
        other: dict[tuple[str, str], list[tuple[str, float, float]]] = {}
        for name, steps in theirs.items():
            if name not in p.wanted:
                continue
            spec = p.specs[name]
            moved = any(not np.array_equal(s.before.mean, s.after.mean) for s in steps)
            unlike = spec.decay != 1 and any(not np.allclose(s.seen.moments()[0], s.before.mean) for s in steps)
            source_moved = any(not np.array_equal(s.before.mean, s.after.mean) for s in mine.get(p.partners[name], ()))
            decay = None if isinstance(spec.decay, str) else float(spec.decay)
            if not moved:
                if unlike and source_moved and p.target.specs.get(name, spec).decay != 1:
                    lost = 1.0 if decay is None else update_error(steps, decay, False)
                    never.append((name, lost, 0.0))
                continue
            if decay is None or spec.renorm is not None:
                continue  # such averages have no one decay to solve for; the comparison itself judges them
            corrected = spec.moving_variance_estimator == "unbiased"
            before = update_error(steps, decay, corrected)
            found = solved_update(steps)
            if before <= update_tolerance(steps) or found is None:
                continue
            after = update_error(steps, *found)
            if after > update_tolerance(steps):
                continue
            for code, text in _update_texts(decay, corrected, *found):
                other.setdefault((code, text), []).append((name, before, after))
        for (code, text), layers in other.items():
            names, before, after = _worst(layers)
            self._add(
                code, names, text, f"With the source's the layers' statistics are off by {_number(before)} of the"
                f" batches' deviation, with this by {_number(after)}.", before, after,
            )  # fmt: skip
        if never:
            names, before, _ = _worst(never)
            self._add(
                "never-training", names, "The moving statistics do not move in training, where the source's do.",
                f"They are {_number(before)} of the batches' deviation from what the batches make of them, and equal"
                f" to what they were before {len(self.steps)} steps, to the bit.", before, 0.0,
            )  # fmt: skip
        return bool(never)

    # Whole models

    def _models(self) -> None:
        """With everything set right that can be: an order that the matching itself has wrong, and padding."""
        p = self.pairing
        tolerance = self._tolerance(self._x)
        error = self._error(p.expected)
        if error > tolerance:
            units = p.target.units(p.expected)
            chosen, after = find_exchanges(p.expected, units, self._error, self._suspect, tolerance)
            if not chosen:
                return
            pairs = ", ".join(f"{a} and {b}" for a, b in chosen)
            self._add(
                "order", tuple(name for pair in chosen for name in pair),
                f"The matching has layers of equal shape in the wrong order: {pairs} hold each other's values.",
                self._ran(error, after), error, after,
            )  # fmt: skip
            for a, b in chosen:
                p.expected = _exchange(p, a, b)
            p.target.put(p.expected)
            error = after
        for shape, x in list(self.inputs.items())[1:]:
            limit, other = self._tolerance(x), self._error(p.expected, x)
            if other > limit:
                first = first_difference(
                    p, p.source.run(x, training=self._training), p.target.run(x, training=self._training), limit
                )
                where = f" It begins before {first[0]}." if first else ""
                self._add(
                    "padding", (first[0],) if first else (),
                    f"The weights agree and the edges do not: the models pad differently at {_shape(shape)}.{where}",
                    f"The outputs differ by {_number(other)} there, and by {_number(error)} at"
                    f" {_shape(next(iter(self.inputs)))}, where every padding is the same.", other, error,
                )  # fmt: skip
                return

    # Runs

    @property
    def _x(self) -> NDArray:
        return next(iter(self.inputs.values()))

    def _tolerance(self, x: NDArray) -> float:
        source = self.pairing.source
        return tolerance_of(source, x, source.run(x, training=self._training), training=self._training)

    def _error(self, checkpoint: Any, x: NDArray | None = None) -> float:
        """The outputs' difference with these tensors in the target."""
        p = self.pairing
        x = self._x if x is None else x
        p.target.put(checkpoint)
        return difference(
            p.source.run(x, training=self._training).output, p.target.run(x, training=self._training).output
        )

    def _suspect(self, checkpoint: Checkpoint) -> str | None:
        """The layer that the first batch norm belongs to whose output differs with these tensors in the target."""
        p = self.pairing
        p.target.put(checkpoint)
        mine, theirs = (side.run(self._x, training=self._training) for side in (p.source, p.target))
        tolerance, units = self._tolerance(self._x), p.target.units(checkpoint)
        for name, (_, output) in theirs.layers.items():
            partner = mine.layers.get(p.partners.get(name, ""))
            if partner is not None and difference(partner[1], output) > tolerance:
                return units[name].owner
        return None

    def _set_epsilon(self, epsilons: Mapping[str, float]) -> bool:
        """Set the source's epsilon in the target; where the target's code has it, the target's in the source."""
        p = self.pairing
        right = {n: replace(p.target.specs[n], epsilon=p.specs[n].epsilon) for n in epsilons if n in p.target.specs}
        try:
            p.target.put(p.expected, right)
            done = p.target.run(self._x)
            held = values_of(p.target.units(p.target.held))
            if all(_fits(done.seen(n), held[n], p.specs[n].epsilon) for n in right):
                return bool(right)
        except UnsupportedError:
            pass
        wrong = {
            p.partners[n]: replace(p.source.specs[p.partners[n]], epsilon=epsilon)
            for n, epsilon in epsilons.items() if p.partners[n] in p.source.specs
        }  # fmt: skip
        try:
            p.source.put(p.source.held, wrong)
        except UnsupportedError:
            self._blind = True  # both have it in their code: the layers' own replay has proven it
        return bool(wrong)

    def _ran(self, before: float, after: float) -> str:
        mode = "training mode" if self._training else "eval"
        return f"The outputs differ by {_number(before)} in {mode}; set right, by {_number(after)}."

    def _add(self, code: str, layers: tuple[str, ...], text: str, proof: str, before: float, after: float) -> None:
        self.causes.append(Cause(code, layers, text, proof, before, after, _REMEDIES[code]))


_REMEDIES = {
    "epsilon": "Set the layers' epsilon (`load_into` does), or port with epsilon shifted.",
    "momentum-inverted": "Set decay = 1 - momentum: momentum is the new batch's weight in torch, the old average's"
    " elsewhere.",
    "momentum": "Set the layers' momentum to the source's (`load_into` does).",
    "estimator": "Use a layer with the source's estimator, or accept a share of 1/n while it trains on.",
    "statistics-at-start": "Carry the moving statistics too: all variables, not the trainable ones alone.",
    "mean-and-variance-swapped": "Swap the two where the file is written or read.",
    "order": "Say which is which in a rules file, and port again.",
    "padding": "Pad as the source does: TensorFlow's SAME pads more after than before, torch as much on both sides.",
    "never-training": "See that the layer's mode follows the model's, and that it is not frozen.",
    "train-mode": "Put the layers into eval mode (training=False, use_running_average=True) in inference and export.",
    "values": "Port again; these tensors are not those of the source.",
}


def first_difference(p: Pairing, mine: Pass, theirs: Pass, tolerance: float) -> tuple[str, str, float] | None:
    """The first batch norm, in the order of the target's calls, at which the models differ.

    Returns:
        Its name in the target, whether its "input" or its "output" differs, and by how much; None if none does. Inputs
        are compared but for a constant a channel: a bias that the port put into the moving mean is one.
    """
    for name, (x, y) in theirs.layers.items():
        partner = p.partners.get(name)
        if partner is None or partner not in mine.layers:
            continue
        x0, y0 = mine.layers[partner]
        for what, a, b in (("input", _centered(x0), _centered(x)), ("output", y0, y)):
            error = difference(a, b)
            if error > tolerance:
                return name, what, error
    return None


def _centered(array: NDArray) -> NDArray:
    wide: NDArray = array.astype(np.float64)
    centered: NDArray = wide - wide.mean(axis=tuple(range(wide.ndim - 1)), keepdims=True)
    return centered


def _exchange(p: Pairing, a: str, b: str) -> Any:
    """The expected tensors with two groups exchanged, and their batch norms' partners with them."""
    from .swaps import exchanged, groups

    units = p.target.units(p.expected)
    every = groups(units)
    for one, other in zip(every[a], every[b], strict=True):
        if one.name in p.partners and other.name in p.partners:
            p.partners[one.name], p.partners[other.name] = p.partners[other.name], p.partners[one.name]
    return exchanged(p.expected, units, a, b)


def _fits(seen: Seen, held: Values, epsilon: float) -> bool:
    return min(seen.misfit(held, epsilon, "moving"), seen.misfit(held, epsilon, "batch")) <= seen.tolerance


def _update_texts(decay: float, corrected: bool, found: float, correction: bool) -> list[tuple[str, str]]:
    texts = []
    if abs(found - (1 - decay)) < 1e-3 and abs(decay - 0.5) > 1e-3:
        texts.append(("momentum-inverted", f"Momentum is inverted: the old statistics weigh {found:g} and should weigh"
                      f" {decay:g}."))  # fmt: skip
    elif abs(found - decay) > 1e-3:
        texts.append(("momentum", f"The old statistics weigh {found:g} in an update and should weigh {decay:g}."))
    if correction != corrected:
        words = ("biased", "unbiased")
        texts.append(("estimator", f"The {words[correction]} variance enters the average, and the layer's spec says"
                      f" {words[corrected]}."))  # fmt: skip
    return texts


def _text(code: str, layers: Mapping[str, _Form]) -> str:
    if code == "order":
        pairs = ", ".join(f"{name} has {form.other}'s" for name, form in layers.items())
        return f"Layers of equal shape hold each other's values: {pairs}."
    return {
        "mean-and-variance-swapped": "The moving mean and the moving variance are each other's.",
        "statistics-at-start": "The moving statistics are a new layer's, 0 and 1, and the source's are not.",
        "values": "The tensors are not those that the port gives.",
    }[code]


def _worst(layers: list[tuple[str, float, float]]) -> tuple[tuple[str, ...], float, float]:
    return tuple(n for n, _, _ in layers), max(b for _, b, _ in layers), max(a for _, _, a in layers)


def _deviation(expected: Mapping[str, NDArray], changes: Mapping[str, NDArray]) -> float:
    return max(difference(expected[name], array) for name, array in changes.items())


def _number(value: float) -> str:
    return f"{value:.2g}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _json(value: float) -> float | None:
    return value if np.isfinite(value) else None
