"""What names say about which layer is which: rules such as conv{a}_block{b}_{c} -> stages.{a-2}.layers.{b-1}.conv{c}.

Nobody gives the rules: they are searched for. A rule maps a pattern of names on one side to one on the other, number by
number. It holds only if no layer that it maps meets one of another shape, if it covers one of the two patterns whole,
and if the order of the layers, where both sides have one, is kept.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

_MOST_NUMBERS: Final = 5  # in a name; more are no layer's
_MOST_DIGITS: Final = 18  # in a number
_LEVELS: Final = ("layer", "block", "stage", "group", "unit", "module", "feature", "model")
_FEWEST: Final = 2  # one layer is no rule


@dataclass(frozen=True)
class Name:
    """A layer's name: its text with "#" for each number, and the numbers."""

    pattern: str
    numbers: tuple[int, ...]


def parsed(names: Sequence[str]) -> dict[str, Name]:
    """Each name taken apart, but those that no rule can be about. "conv" beside "conv_1" has number 0."""
    stems = {stem for name in names for stem in _stems(name)}
    result = {}
    for name in names:
        parts = re.split(r"([./])", name)
        for i in range(0, len(parts), 2):
            if "".join(parts[: i + 1]) in stems:
                parts[i] += "_0"
        whole = "".join(parts)
        digits = re.findall(r"\d+", whole)
        if all(len(n) <= _MOST_DIGITS for n in digits):
            result[name] = Name(re.sub(r"\d+", "#", whole), tuple(map(int, digits)))
    # Two layers of the same numbers, such as conv and conv_0 or conv1 and conv01: no rule tells them apart.
    many = Counter(result.values())
    twice = {one.pattern for one in result.values() if many[one] > 1}
    return {name: one for name, one in result.items() if one.pattern not in twice}


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
    """Every rule that holds; of two that contradict each other, the one that maps more, and neither of equals unless
    their words tell. A name without numbers that both sides have is a rule of its own, unless the order contradicts.

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
    same: dict[Hashable, dict[str, str]] = defaultdict(dict)
    for name, one in source.items():
        if not one.numbers and name in target and source_class[name] == target_class[name]:
            same[source_class[name]][name] = name
    named = [Rule(name, name, {name: name}) for pairs in same.values() if in_order([*pairs.items()]) for name in pairs]
    return _unopposed([*distinct.values(), *named], in_order)


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
    had, has = Counter(source_class[s] for s in here), Counter(target_class[t] for t in there)

    def enough(domain: Sequence[str]) -> bool:
        """Whether shapes tell more than that all are alike, if these are but a part of the layers so named."""
        alike = Counter(source_class[s] for s in domain)
        return (
            len(domain) in (len(here), len(there))
            or len(alike) > 1
            or all(n in (had[one], has[one]) for one, n in alike.items())
        )

    froms, tos = _words(source[here[0]].pattern), _words(target[there[0]].pattern)
    holding: dict[frozenset[tuple[str, str]], tuple[dict[str, str], int, bool]] = {}
    paths = _is_path(source[here[0]].pattern) and _is_path(target[there[0]].pattern)
    for uses in _uses(m, n):
        followed = [i for i in uses if i is not None]
        nested = paths and followed == sorted(followed)
        alike = sum(i is not None and froms[i] == tos[j] != "" for j, i in enumerate(uses))
        for make in (_shifts, _ranks):
            for mapped, whole in make(here, there, source, target, source_class, target_class, uses, enough):
                pairs = {s: by_numbers[numbers] for s, numbers in mapped.items() if numbers in by_numbers}
                if len(pairs) < _FEWEST or len(set(pairs.values())) < len(pairs):
                    continue
                if any(source_class[s] != target_class[t] for s, t in pairs.items()):
                    continue
                if len(pairs) != len(there) and len(pairs) != whole:
                    continue
                key = frozenset(pairs.items())
                had_before = holding.get(key, (pairs, 0, False))
                holding[key] = pairs, max(alike, had_before[1]), nested or had_before[2]
    counted = _count(here, there, source, target)
    backwards = list(zip(counted, reversed(counted.values()), strict=True))
    # Where the order has no say, so short a rule would be luck.
    if counted and not in_order(backwards) and all(source_class[s] == target_class[t] for s, t in counted.items()):
        holding.setdefault(frozenset(counted.items()), (counted, 0, paths))
    kept = [one for one in holding.values() if in_order(list(one[0].items()))]
    most = max((len(pairs) for pairs, _, _ in kept), default=0)
    # Of block{b}.conv{c}, convs{c}.{b} is the same; if the order says convs{b}.{c}, the order is not that of the names.
    said = max((alike for pairs, alike, _ in holding.values() if len(pairs) == most), default=0)
    best = [one for one in kept if len(one[0]) == most]
    if not any(alike == said for _, alike, _ in best):
        return []
    # What a path names first holds what it names after: stages hold blocks, and blocks convolutions, on both sides.
    outer_first = [pairs for pairs, alike, nested in best if nested and alike == said]
    return outer_first or [pairs for pairs, _, _ in best]


def _is_path(pattern: str) -> bool:
    """Whether each number is in a part of its own, so that the parts' order is one of containers and contents."""
    return all(part.count("#") <= 1 for part in re.split(r"[./\[]", pattern))


def _words(pattern: str) -> list[str]:
    """What each number counts: the word before it, without a plural's s; "" where the word could be any level's."""
    words = (word.lower().rstrip("s") for word in re.findall(r"([^\W\d_]*)[_.\[/]*#", pattern))
    return ["" if word in _LEVELS else word for word in words]


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
    enough: Callable[[Sequence[str]], bool],
) -> Mapped:  # fmt: skip
    """Each number is one of the source's and a constant: as some pair of equal class has it."""
    free = [i for i in range(len(source[here[0]].numbers)) if i not in uses]
    domains: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for s in here:
        domains[tuple(source[s].numbers[i] for i in free)].append(s)
    by_class: dict[Hashable, list[str]] = defaultdict(list)
    for t in there:
        by_class[target_class[t]].append(t)
    by_numbers = {target[t].numbers: t for t in there}
    ends = _ends([target[t].numbers for t in there])
    for domain in domains.values():
        if len(domain) < len(there) and not enough(domain):
            continue
        own = _ends([source[s].numbers for s in domain])
        seen = set()
        # A rule covers its domain, or all that is there, so that it maps the first and last of one of them.
        seeds = [(s, t) for s in {domain[0], domain[-1]} for t in by_class[source_class[s]]]
        seeds += [(s, t) for t in {there[0], there[-1]} for s in domain if source_class[s] == target_class[t]]
        for s, t in seeds:
            a, b = source[s].numbers, target[t].numbers
            shift = tuple(b[j] if i is None else b[j] - a[i] for j, i in enumerate(uses))
            if shift in seen:
                continue
            seen.add(shift)
            moved = [
                (shift[j], shift[j]) if i is None else (own[i][0] + shift[j], own[i][1] + shift[j])
                for j, i in enumerate(uses)
            ]
            if not (_within(moved, ends) or _within(ends, moved)):
                continue
            mapped: dict[str, tuple[int, ...]] = {}
            for one in domain:
                numbers = source[one].numbers
                goal = tuple(shift[j] if i is None else numbers[i] + shift[j] for j, i in enumerate(uses))
                meets = by_numbers.get(goal)
                if len(domain) <= len(there) if meets is None else source_class[one] != target_class[meets]:
                    break
                mapped[one] = goal
            else:
                yield mapped, len(domain)


Ends = list[tuple[int, int]]


def _ends(numbers: Sequence[tuple[int, ...]]) -> Ends:
    """The least and the greatest of each number."""
    return [(min(column), max(column)) for column in zip(*numbers, strict=True)]


def _within(inner: Ends, outer: Ends) -> bool:
    return all(low >= least and high <= most for (low, high), (least, most) in zip(inner, outer, strict=True))


def _ranks(
    here: Sequence[str], there: Sequence[str], source: Mapping[str, Name], target: Mapping[str, Name],
    source_class: Mapping[str, Hashable], target_class: Mapping[str, Hashable], uses: tuple[int | None, ...],
    enough: Callable[[Sequence[str]], bool],
) -> Mapped:  # fmt: skip
    """The one number that varies on each side, first to first: features.0, .3, .6 and conv2d, conv2d_1, conv2d_2."""
    varies = [i for i in range(len(source[here[0]].numbers)) if len({source[s].numbers[i] for s in here}) > 1]
    changes = [j for j in range(len(target[there[0]].numbers)) if len({target[t].numbers[j] for t in there}) > 1]
    if len(here) != len(there) or len(varies) != 1 or len(changes) != 1 or uses[changes[0]] != varies[0]:
        return
    froms = sorted(here, key=lambda s: source[s].numbers)
    tos = sorted(there, key=lambda t: target[t].numbers)
    yield {s: target[t].numbers for s, t in zip(froms, tos, strict=True)}, len(here)


def _count(
    here: Sequence[str], there: Sequence[str], source: Mapping[str, Name], target: Mapping[str, Name]
) -> dict[str, str]:
    """One number that counts through what several do: block_17 and stages.3.layers.1; empty where it is not so."""
    m, n = len(source[here[0]].numbers), len(target[there[0]].numbers)
    if len(here) != len(there) or 1 not in (m, n) or m == n:
        return {}
    froms, tos = sorted(here, key=lambda s: source[s].numbers), sorted(there, key=lambda t: target[t].numbers)
    return dict(zip(froms, tos, strict=True))


def _unopposed(found: Sequence[Rule], in_order: Callable[[Sequence[tuple[str, str]]], bool]) -> list[Rule]:
    """The rules that no other contradicts which maps as much; of equals, the one whose words are the same."""
    kept, worded = [], []
    for rule in found:
        back = {t: s for s, t in rule.pairs.items()}
        against = [
            other for other in found if other is not rule and len(other.pairs) >= len(rule.pairs)
            and any(rule.pairs.get(s, t) != t or back.get(t, s) != s for s, t in other.pairs.items())
        ]  # fmt: skip
        if not against:
            kept.append(rule)
        elif all(len(other.pairs) == len(rule.pairs) for other in against) and _says_so(rule, against):
            worded.append(rule)
    # Words that the order contradicts say nothing.
    return kept + worded if in_order([pair for rule in worded for pair in rule.pairs.items()]) else kept


def _says_so(rule: Rule, against: Sequence[Rule]) -> bool:
    """Whether what tells these patterns apart, such as "left" and "right", is the same on both sides of this one."""
    every = [rule, *against]
    froms = set.intersection(*(_text(one.source) for one in every))
    tos = set.intersection(*(_text(one.target) for one in every))

    def own(one: Rule) -> bool:
        return _text(one.source) - froms == _text(one.target) - tos != set()

    return own(rule) and not any(own(other) for other in against)


def _text(pattern: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W\d_]+", pattern)}
