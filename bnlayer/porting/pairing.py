"""Two live models and the port between them: what the target ought to hold, by what the source holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import PortError
from ..spec import BatchNormSpec
from ..state import BatchNormState
from .matching import Match, Matching
from .planning import Plan, plan
from .replay import NDArray, Values
from .report import Report
from .sides import Side, at_start, values, values_of, with_tensors
from .states import tensors_for
from .units import Unit, units_of

Pairs = Iterable[Match | tuple[str, str]]


@dataclass
class Pairing:
    """Both sides, and the plan that relates them.

    Attributes:
        plan: of the source's tensors as they are now.
        expected: the target's tensors as the plan gives them; its own where nothing is matched.
        wanted: of every matched batch norm of the target, the numbers that it ought to have.
        specs: and the spec.
        partners: and the source's batch norm.
        planted: whether random values stand in both for a new model's.
    """

    source: Side
    target: Side
    plan: Plan
    expected: Checkpoint
    wanted: dict[str, Values]
    specs: dict[str, BatchNormSpec]
    partners: dict[str, str]
    planted: bool = False

    @classmethod
    def of(cls, source: Side, target: Side, matches: Pairs | None, given: Plan | None) -> Pairing:
        """Pair two models.

        Args:
            matches: pairs of layers; None: the plan's, or where there is none, of a new one.
            given: a plan that knows more than the models tell (flatten, epsilon).

        Raises:
            PortError: a layer is in none of the models, or no batch norm is matched.
        """
        if matches is None:
            found = given or plan(source.original, target.original)
            pairs = found.matching.matches
            given = found
        else:
            pairs = tuple(m if isinstance(m, Match) else Match(*m, "", ("rule",)) for m in matches)
        planned = remade(source, target, pairs, given)
        return cls._of(source, target, planned)

    @classmethod
    def _of(cls, source: Side, target: Side, planned: Plan) -> Pairing:
        expected = planned.apply(allow_partial=True)
        every = values_of(target.units(expected))
        partners = {m.target: m.source for m in planned.matching.matches if planned.target[m.target].stored is not None}
        if not partners:
            raise PortError("no batch norm of the target is matched with one of the source; give the matches.")
        return cls(
            source, target, planned, expected, {name: every[name] for name in partners}, planned.specs(), partners
        )  # fmt: skip

    def plant(self, seed: int) -> Pairing:
        """Random statistics and parameters in both models' batch norms, the same on both sides.

        A layer of the target whose values are not those that the port gives keeps them: they are what is looked for.
        Where its mean and variance are each other's, so are the random ones.
        """
        rng = np.random.default_rng(seed)
        changes: dict[str, NDArray] = {}
        for unit in self.plan.source.units:
            if unit.stored is not None:
                changes.update(_random(unit, rng))
        own = values_of(self.target.units())
        self.source.put(with_tensors(self.source.held, changes))
        planted = Pairing._of(
            self.source, self.target, remade(self.source, self.target, self.plan.matching.matches, self.plan)
        )
        kept: dict[str, NDArray] = {}
        for name in self.partners:
            unit = self.plan.target[name]
            held, wanted = own[name], self.wanted[name]
            parts = dict(unit.parts)
            if close(held.mean, wanted.variance) and close(held.variance, wanted.mean):
                mean, variance = parts["moving_mean"], parts["moving_variance"]
                kept.update({mean: planted.expected[variance], variance: planted.expected[mean]})
                parts = {role: t for role, t in parts.items() if role in ("gamma", "beta")}
            elif not alike(held, wanted):
                continue
            kept.update({tensor: planted.expected[tensor] for tensor in parts.values()})
        self.target.put(with_tensors(self.target.held, kept))
        return replace(planted, planted=True)

    @property
    def is_new(self) -> bool:
        """Whether the source is at its initial values."""
        every = [values(u) for u in self.plan.source.units if u.stored is not None]
        return bool(every) and all(at_start(v) and (v.gamma == 1).all() and (v.beta == 0).all() for v in every)

    def kernels(self) -> list[Unit]:
        """The target's matched layers that are no batch norms."""
        units = [self.plan.target[m.target] for m in self.plan.matching.matches]
        return [u for u in units if u.stored is None]


def remade(source: Side, target: Side, pairs: Sequence[Match], like: Plan | None) -> Plan:
    """A plan of these very pairs, over what both models hold now.

    Raises:
        PortError: a layer is in none of the models.
    """
    froms = units_of(source.held, dialect=like.source.dialect if like else source.dialect)
    tos = units_of(target.held, dialect=like.target.dialect if like else target.dialect)
    for units, names, word in (
        (froms, [m.source for m in pairs], "source"), (tos, [m.target for m in pairs], "target")
    ):  # fmt: skip
        known = {u.name for u in units.units}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise PortError(
                f"the {word} model has no layer {', '.join(unknown[:5])}; it has {', '.join(sorted(known))}."
            )
    found = Matching(tuple(replace(m, kind=tos[m.target].kind) for m in pairs), (), (), ())
    options = {} if like is None else {"epsilon": like.epsilon, "flatten": like.flatten,
                                       "only_batch_norms": like.only_batch_norms}  # fmt: skip
    return Plan(froms, tos, found, report=Report(found), **options)  # type: ignore[arg-type]


def alike(a: Values, b: Values) -> bool:
    """Whether two layers have the same numbers but for a rounding of float32."""
    return a.mean.shape == b.mean.shape and all(
        close(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def close(a: NDArray, b: NDArray) -> bool:
    """Equal but for a rounding of their dtype, or of float32 where they are wider."""
    if a.shape != b.shape:
        return False
    x, y = a.astype(np.float64), b.astype(np.float64)
    unit = 2.0**-8 if 2 in (a.dtype.itemsize, b.dtype.itemsize) else 2.0**-22
    return bool(np.allclose(x, y, rtol=unit, atol=unit * float(np.abs(y).max(initial=0)) / 16, equal_nan=True))


def _random(unit: Unit, rng: np.random.Generator) -> dict[str, NDArray]:
    """Tensors of a trained batch norm's size, so that every mistake shows."""
    assert unit.stored is not None
    held = unit.stored.state()
    n = unit.channels
    made = {
        "gamma": rng.uniform(0.5, 1.5, n) if held.gamma is not None else None,
        "beta": rng.normal(0, 0.2, n) if held.beta is not None else None,
        "moving_mean": rng.normal(0, 0.3, n),
        "moving_variance": rng.uniform(0.5, 1.5, n),
    }
    like = held.moving_mean
    assert like is not None
    state = BatchNormState(
        **{role: a.astype(like.dtype) for role, a in made.items() if a is not None}, num_updates=None
    )  # fmt: skip
    return tensors_for(unit.stored, unit.stored.spec, state, lambda *_: None)
