"""Which layer of the source is which of the template: found by independent votes, refused where they do not suffice.

The votes: a shape that only one layer of a kind has on either side; the names' rules (`names`); the order in which the
layers come, where both sides have one; the layer that a batch norm belongs to. A pair is accepted on its unique shape,
on a names' rule that the order does not contradict, on its owner's match, or because nothing else is left of its class.
Where one side has more layers of a class than the other, none of them is matched: block 5 of 5 is not block 5 of 6.
Order alone decides nothing: two layers of equal shape may have been defined in either order. It decides only between
rules that the names allow alike.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import names
from .layouts import Shape
from .units import KERNELS, Unit, Units


@dataclass(frozen=True)
class Match:
    """A source layer and the template's layer that gets its weights.

    Attributes:
        source, target: their names.
        kind: the target's kind.
        votes: what spoke for it: "shape", "names", "order", "owner", "elimination", "rule" (given by hand), "run".
    """

    source: str
    target: str
    kind: str
    votes: tuple[str, ...]


@dataclass(frozen=True)
class Ambiguous:
    """Layers that the votes could not tell apart; `proposal` is what the order would say, for a run to decide."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    reason: str
    proposal: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Matching:
    """What was decided, and what was not."""

    matches: tuple[Match, ...]
    ambiguous: tuple[Ambiguous, ...]
    unmatched_source: tuple[str, ...]
    unmatched_target: tuple[str, ...]


def match(source: Units, target: Units, given: Mapping[str, str] | None = None) -> Matching:
    """Match two checkpoints' layers.

    Args:
        given: pairs that are certain: the source's name to the target's.
    """
    return _Search(source, target, given or {}).result()


def _squeezed(shape: Shape) -> Shape:
    """A 1x1 convolution's shape as a dense layer's."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


@dataclass
class _Search:
    source: Units
    target: Units
    given: Mapping[str, str]
    pairs: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)

    def result(self) -> Matching:
        for s, t in self.given.items():
            self.accept(s, t, "rule")
        self.by_votes(KERNELS_AND_NORMS, _strict)
        self.by_votes(KERNELS_AND_NORMS, _loose)
        self.batch_norms()
        self.kernels_of_batch_norms()
        ambiguous = self.undecided()
        named = {name for one in ambiguous for name in (*one.sources, *one.targets)}
        return Matching(
            tuple(self.matches()),
            tuple(ambiguous),
            tuple(u.name for u in self.free(self.source) if u.name not in named),
            tuple(u.name for u in self.free(self.target) if u.name not in named),
        )

    def matches(self) -> Iterable[Match]:
        for unit in self.source.units:
            if unit.name in self.pairs:
                t, votes = self.pairs[unit.name]
                yield Match(unit.name, t, self.target[t].kind, votes)

    def accept(self, s: str, t: str, *votes: str) -> None:
        self.pairs[s] = (t, votes)

    def free(self, side: Units, kinds: Sequence[str] | None = None) -> list[Unit]:
        """The units that have no match yet."""
        done = set(self.pairs) if side is self.source else {t for t, _ in self.pairs.values()}
        return [u for u in side.units if u.name not in done and (kinds is None or u.kind in kinds)]

    def by_votes(self, kinds: Sequence[str], key: Key) -> None:
        """Match the units of these kinds whose classes by `key` agree."""
        froms, tos = self.free(self.source, kinds), self.free(self.target, kinds)
        source_class = {u.name: key(u) for u in froms}
        target_class = {u.name: key(u) for u in tos}
        told = names.rules(
            names.parsed([u.name for u in froms]), names.parsed([u.name for u in tos]),
            source_class, target_class, self.in_order,
        )  # fmt: skip
        says: dict[str, set[str]] = defaultdict(set)
        claimed: dict[str, set[str]] = defaultdict(set)
        for rule in told:
            for s, t in rule.pairs.items():
                says[s].add(t)
                claimed[t].add(s)
        ordered = "no" not in (self.source.ordered, self.target.ordered)
        for sources, targets in _classes(source_class, target_class).values():
            # With more of them on one side, the names may be right and the layers others: block 5 of 5, or of 6.
            if not sources or len(sources) != len(targets):
                continue
            unsure = _with_twins(sources, says) | _with_twins(targets, claimed)
            one_to_one = {
                s: t for s in sources if len(says[s]) == 1 for t in says[s]
                if claimed[t] == {s} and s not in unsure and t not in unsure
            }  # fmt: skip
            shape = ["shape"] if len(sources) == 1 else []
            place = {t: i for i, t in enumerate(targets)}
            for i, s in enumerate(sources):
                if s in one_to_one:
                    order = ["order"] if ordered and place[one_to_one[s]] == i else []
                    self.accept(s, one_to_one[s], *shape, "names", *order)
            rest = [s for s in sources if s not in one_to_one]
            known = set(one_to_one.values())
            open_ = [t for t in targets if t not in known]
            if len(rest) == len(open_) == 1 and says[rest[0]] <= {open_[0]} and claimed[open_[0]] <= {rest[0]}:
                if not one_to_one:
                    self.accept(rest[0], open_[0], "shape")
                elif _odd(rest[0], one_to_one) == _odd(open_[0], one_to_one.values()):
                    self.accept(rest[0], open_[0], "elimination")

    def in_order(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Whether layers of one kind come in the same order on both sides, where both have one."""
        if "no" in (self.source.ordered, self.target.ordered):
            return True
        by_kind: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for s, t in pairs:
            by_kind[self.source[s].kind].append((self.source[s].order, self.target[t].order))
        return all([b for _, b in sorted(places)] == sorted(b for _, b in places) for places in by_kind.values())

    def batch_norms(self) -> None:
        """A batch norm goes with the layer that it belongs to; the rest by votes of their own."""
        owners: dict[str, list[Unit]] = defaultdict(list)
        for unit in self.target.units:
            if unit.kind == "batch norm" and unit.owner is not None:
                owners[unit.owner].append(unit)
        mine: dict[str, list[Unit]] = defaultdict(list)
        for unit in self.free(self.source, ["batch norm"]):
            if unit.owner is not None and unit.owner in self.pairs:
                mine[unit.owner].append(unit)
        before = _Search(self.source, self.target, {}, dict(self.pairs))
        before.by_votes(["batch norm"], self.with_owner())
        voted = {s: t for s, (t, _) in before.pairs.items() if s not in self.pairs}
        back = {t: s for s, t in voted.items()}
        for owner, units in mine.items():
            theirs = owners.get(self.pairs[owner][0], [])
            if len(units) != 1 or len(theirs) != 1 or units[0].channels != theirs[0].channels:
                continue
            s, t = units[0], theirs[0]
            if voted.get(s.name, t.name) != t.name or back.get(t.name, s.name) != s.name:
                continue  # the names say otherwise
            if s.certain_owner or t.certain_owner or s.name in voted:
                self.accept(s.name, t.name, "owner", *(before.pairs[s.name][1] if s.name in voted else ()))
        taken = {t for t, _ in self.pairs.values()}
        opposed = {
            s for s, t in voted.items()
            if (u := self.source[s]).owner in self.pairs and u.certain_owner and self.target[t].certain_owner
            and self.pairs[str(u.owner)][0] != self.target[t].owner
        }  # fmt: skip
        straight = self.counted_alike()
        for name, goal in voted.items():
            if not straight and (_is_count(name, self.source) or _is_count(goal, self.target)):
                continue  # batch norms were counted as the convolutions were, which come in two orders
            if name not in self.pairs and goal not in taken and name not in opposed:
                self.accept(name, goal, *before.pairs[name][1])

    def counted_alike(self) -> bool:
        """Whether the kernels matched so far come in one order on both sides; by their numbers, where that is lost."""
        sides = [
            {u.name: i for i, u in enumerate(side.units if side.ordered != "no" else sorted(side.units, key=_natural))}
            for side in (self.source, self.target)
        ]
        by_kind: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for s, (t, _) in self.pairs.items():
            if self.source[s].kind in KERNELS:
                by_kind[self.source[s].kind, self.target[t].kind].append((sides[0][s], sides[1][t]))
        return all([b for _, b in sorted(places)] == sorted(b for _, b in places) for places in by_kind.values())

    def with_owner(self) -> Key:
        """A batch norm's class: with its owner's, where every one has an owner on both sides."""
        norms = [(side, u) for side in (self.source, self.target) for u in side.units if u.kind == "batch norm"]
        if any(u.owner is None for _, u in norms):
            return _strict
        owners = {id(u): _loose(side[str(u.owner)]) for side, u in norms}
        return lambda unit: (_strict(unit), owners[id(unit)])

    def kernels_of_batch_norms(self) -> None:
        """A layer that nothing else tells goes with its batch norm, where that was matched for a reason of its own."""
        owned = {u.name: u.owner for u in self.target.units if u.kind == "batch norm" and u.certain_owner}
        free = {u.name: u for u in self.free(self.target, KERNELS)}
        for unit in self.source.units:
            if unit.kind != "batch norm" or unit.name not in self.pairs or not unit.certain_owner:
                continue
            goal = owned.get(self.pairs[unit.name][0])
            owner = str(unit.owner)
            if goal in free and owner not in self.pairs and _loose(self.source[owner]) == _loose(free[str(goal)]):
                self.accept(owner, str(goal), "owner")

    def undecided(self) -> list[Ambiguous]:
        """Classes with members free on both sides."""
        result = []
        froms, tos = self.free(self.source), self.free(self.target)
        classes = _classes({u.name: _loose(u) for u in froms}, {u.name: _loose(u) for u in tos})
        for key, (sources, targets) in classes.items():
            if sources and targets:
                ordered = "no" not in (self.source.ordered, self.target.ordered) and len(sources) == len(targets)
                result.append(
                    Ambiguous(
                        tuple(sources), tuple(targets),
                        f"{len(sources)} and {len(targets)} layers alike {key}: neither names nor shapes tell which is"
                        " which; say it in a rules file, or let a run decide",
                        tuple(zip(sources, targets, strict=True)) if ordered else (),
                    )
                )  # fmt: skip
        return result


def _with_twins(alike: Sequence[str], told: Mapping[str, set[str]]) -> set[str]:
    """The layers of a class that only the last number tells from one that no rule knows.

    Where conv_2 and conv_3 of a block are of one shape and other blocks have no conv_3, either may be what conv_2 is
    there.
    """
    stems = {name: re.sub(r"\d+(?=\D*$)", "#", name) for name in alike}
    unknown = {stem for name, stem in stems.items() if stem != name and not told.get(name)}
    return {name for name, stem in stems.items() if stem in unknown}


def _is_count(name: str, side: Units) -> bool:
    """Whether it is its count that tells it from others: batch_normalization (of several), features.31."""
    return re.fullmatch(r"\D*\d+", name) is not None or any(u.name == f"{name}_1" for u in side.units)


def _natural(unit: Unit) -> list[tuple[str, int]]:
    """A key that sorts conv_10 behind conv_9, and conv before conv_1."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*?)_?(\d+|$)", unit.name)]


def _odd(name: str, others: Iterable[str]) -> bool:
    """Whether none of the others is named like it."""
    return all(re.sub(r"\d+", "#", other) != re.sub(r"\d+", "#", name) for other in others)


Key = Callable[[Unit], Hashable]


def _strict(unit: Unit) -> Hashable:
    """Kind and shape."""
    return ("conv" if unit.kind == "depthwise" else unit.kind, unit.shape)


def _loose(unit: Unit) -> Hashable:
    """Shape, a 1x1 convolution being a dense layer."""
    if unit.kind in ("conv", "depthwise", "dense"):
        return ("conv or dense", _squeezed(unit.shape))
    return (unit.kind, unit.shape)


KERNELS_AND_NORMS = (*KERNELS, "norm")


def _classes(
    source: Mapping[str, Hashable], target: Mapping[str, Hashable]
) -> dict[Hashable, tuple[list[str], list[str]]]:
    """For each class its members on both sides, in order."""
    found: dict[Hashable, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name, key in source.items():
        found[key][0].append(name)
    for name, key in target.items():
        found[key][1].append(name)
    return found
