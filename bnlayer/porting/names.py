"""What names say about which layer is which: rules such as conv{a}_block{b}_{c} -> stages.{a-2}.layers.{b-1}.conv{c}.

Nobody gives the rules: they are searched for. A rule maps a pattern of names on one side to one on the other, number by
number. It holds only if no layer that it maps meets one of another shape, if it covers one of the two patterns whole,
and if the order of the layers, where both sides have one, is kept.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

_MOST_NUMBERS: Final = 5  # in a name; more are no layer's
_MOST_SEEDS: Final = 12
_FEWEST: Final = 2  # one layer is no rule


@dataclass(frozen=True)
class Name:
    """A layer's name: its text with "#" for each number, and the numbers."""

    pattern: str
    numbers: tuple[int, ...]


def parsed(names: Sequence[str]) -> dict[str, Name]:
    """Each name taken apart. Where "conv_1" has a sibling "conv", that is the one of number 0."""
    stems = {stem for name in names for stem in _stems(name)}
    result = {}
    for name in names:
        parts = re.split(r"([./])", name)
        for i in range(0, len(parts), 2):
            if "".join(parts[: i + 1]) in stems:
                parts[i] += "_0"
        whole = "".join(parts)
        result[name] = Name(re.sub(r"\d+", "#", whole), tuple(int(n[:18]) for n in re.findall(r"\d+", whole)))
    return result


def _stems(name: str) -> Iterator[str]:
    """Every beginning of the name that would be the first of its kind: "a/conv" of "a/conv_3/kernel"."""
    for match in re.finditer(r"_\d+(?=[./]|$)", name):
        yield name[: match.start()]


@dataclass(frozen=True)
class Rule:
    """Names of one pattern to names of another, and the layers that it maps."""

    source: str
    target: str
    pairs: Mapping[str, str]


def rules(
    source: Mapping[str, Name],
    target: Mapping[str, Name],
    source_class: Mapping[str, Hashable],
    target_class: Mapping[str, Hashable],
    in_order: Callable[[Sequence[tuple[str, str]]], bool],
) -> list[Rule]:
    """Every rule that holds; of two that contradict each other, the one that maps more, and neither of equals.

    Args:
        source, target: the layers' names, taken apart.
        source_class, target_class: what must be equal in a pair: kind and shape.
        in_order: whether pairs keep the order in which the layers come.
    """
    forward = _search(source, target, source_class, target_class, in_order)
    backward = _search(target, source, target_class, source_class, lambda pairs: in_order([(s, t) for t, s in pairs]))
    # A rule may be one only when read the other way: BasicBlock_5 is stages.2.layers.1, whatever came before.
    inverted = [Rule(rule.target, rule.source, {s: t for t, s in rule.pairs.items()}) for rule in backward]
    distinct = {frozenset(rule.pairs.items()): rule for rule in [*forward, *inverted]}
    return _unopposed(list(distinct.values()))


def _search(
    source: Mapping[str, Name], target: Mapping[str, Name], source_class: Mapping[str, Hashable],
    target_class: Mapping[str, Hashable], in_order: Callable[[Sequence[tuple[str, str]]], bool],
) -> list[Rule]:  # fmt: skip
    """The best rules between any two patterns, the source's numbers deciding the target's."""
    froms, tos = _grouped(source), _grouped(target)
    found = []
    for pattern, here in froms.items():
        for goal, there in tos.items():
            classes = {target_class[t] for t in there}
            if len(here) >= _FEWEST and any(source_class[s] in classes for s in here):
                best = _best(here, there, source, target, source_class, target_class, in_order)
                found += [Rule(pattern, goal, pairs) for pairs in best]
    return found


def _grouped(names: Mapping[str, Name]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, taken in names.items():
        if len(taken.numbers) <= _MOST_NUMBERS:
            groups[taken.pattern].append(name)
    return groups


def _best(
    here: Sequence[str],
    there: Sequence[str],
    source: Mapping[str, Name],
    target: Mapping[str, Name],
    source_class: Mapping[str, Hashable],
    target_class: Mapping[str, Hashable],
    in_order: Callable[[Sequence[tuple[str, str]]], bool],
) -> list[dict[str, str]]:
    """The pairs of every rule between two patterns that holds and that maps the most."""
    by_numbers = {target[t].numbers: t for t in there}
    m, n = len(source[here[0]].numbers), len(target[there[0]].numbers)
    kept: dict[frozenset[tuple[str, str]], dict[str, str]] = {}
    for uses in _uses(m, n):
        for make in (_shifts, _ranks):
            for mapped, whole in make(here, there, source, target, source_class, target_class, uses):
                pairs = {s: by_numbers[numbers] for s, numbers in mapped.items() if numbers in by_numbers}
                if len(pairs) < _FEWEST or len(set(pairs.values())) < len(pairs):
                    continue
                if any(source_class[s] != target_class[t] for s, t in pairs.items()):
                    continue
                complete = len(pairs) == len(there) or len(pairs) == whole
                if complete and in_order(list(pairs.items())):
                    kept[frozenset(pairs.items())] = pairs
    most = max((len(pairs) for pairs in kept.values()), default=0)
    return [pairs for pairs in kept.values() if len(pairs) == most]


def _uses(m: int, n: int) -> Iterator[tuple[int | None, ...]]:
    """For each number of the target, which of the source's it follows; None: it is the same throughout."""
    for used in range(min(m, n), 0, -1):
        for places in permutations(range(n), used):
            if list(places) != sorted(places):
                continue
            for numbers in permutations(range(m), used):
                chosen: list[int | None] = [None] * n
                for place, number in zip(places, numbers, strict=True):
                    chosen[place] = number
                yield tuple(chosen)


Mapped = Iterator[tuple[dict[str, tuple[int, ...]], int]]


def _shifts(
    here: Sequence[str], there: Sequence[str], source: Mapping[str, Name], target: Mapping[str, Name],
    source_class: Mapping[str, Hashable], target_class: Mapping[str, Hashable], uses: tuple[int | None, ...],
) -> Mapped:  # fmt: skip
    """Each number is one of the source's and a constant: as some pair of equal class has it."""
    seen = set()
    for s in here[:: max(1, len(here) // _MOST_SEEDS)]:
        free = [i for i in range(len(source[s].numbers)) if i not in uses]
        fixed = tuple(source[s].numbers[i] for i in free)
        for t in there:
            if source_class[s] != target_class[t]:
                continue
            a, b = source[s].numbers, target[t].numbers
            shift = tuple(b[j] if i is None else b[j] - a[i] for j, i in enumerate(uses))
            if (shift, fixed) in seen:
                continue
            seen.add((shift, fixed))
            domain = [one for one in here if tuple(source[one].numbers[i] for i in free) == fixed]
            yield (
                {
                    one: tuple(shift[j] if i is None else source[one].numbers[i] + shift[j] for j, i in enumerate(uses))
                    for one in domain
                },
                len(domain),
            )


def _ranks(
    here: Sequence[str], there: Sequence[str], source: Mapping[str, Name], target: Mapping[str, Name],
    source_class: Mapping[str, Hashable], target_class: Mapping[str, Hashable], uses: tuple[int | None, ...],
) -> Mapped:  # fmt: skip
    """The one number that varies on each side, first to first: features.0, .3, .6 and conv2d, conv2d_1, conv2d_2."""
    varies = [i for i in range(len(source[here[0]].numbers)) if len({source[s].numbers[i] for s in here}) > 1]
    changes = [j for j in range(len(target[there[0]].numbers)) if len({target[t].numbers[j] for t in there}) > 1]
    if len(here) != len(there) or len(varies) != 1 or len(changes) != 1 or uses[changes[0]] != varies[0]:
        return
    froms = sorted(here, key=lambda s: source[s].numbers)
    tos = sorted(there, key=lambda t: target[t].numbers)
    yield {s: target[t].numbers for s, t in zip(froms, tos, strict=True)}, len(here)


def _unopposed(found: Sequence[Rule]) -> list[Rule]:
    """The rules that no other contradicts which maps as much."""
    kept = []
    for rule in found:
        back = {t: s for s, t in rule.pairs.items()}
        against = [
            other for other in found if other is not rule
            and any(rule.pairs.get(s, t) != t or back.get(t, s) != s for s, t in other.pairs.items())
        ]  # fmt: skip
        if all(len(other.pairs) < len(rule.pairs) for other in against):
            kept.append(rule)
    return kept
