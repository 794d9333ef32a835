"""A rules file: which layer is which, said by hand.

    [[rule]]
    src = 'conv(\\d)_block(\\d+)_0_conv'                # the whole name of a source layer, a regular expression
    dst = 'stages.{1-2}.layers.{2-1}.shortcut'         # {1} is the first group, {1-2} its number less 2
    flatten = [512, 7, 7]                              # of a dense layer: channels, then sizes, before it was flattened

    [ignore]
    src = ['layers/normalization']                     # regular expressions: not carried, and not missed
    dst = ['head\\..*']

    [default]
    epsilon = 1e-3                                     # where the source file does not say
    decay = 0.99

A batch norm goes with the layer that it belongs to and needs no rule.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FileError
from .layouts import Shape
from .units import Units


@dataclass(frozen=True)
class Rules:
    """A rules file, read."""

    path: str = ""
    rules: tuple[tuple[re.Pattern[str], str, Shape | None], ...] = ()
    ignored_source: tuple[re.Pattern[str], ...] = ()
    ignored_target: tuple[re.Pattern[str], ...] = ()
    epsilon: float | None = None
    decay: float | None = None
    flatten: dict[str, Shape] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Rules:
        """Read a rules file.

        Raises:
            FileError: it is no TOML, or says something else than the rules above.
            OSError: it cannot be read.
        """
        try:
            document = tomllib.loads(Path(path).read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: it is no TOML file: {error}.") from error
        _only(path, document, {"rule", "ignore", "default"}, "the file")
        listed = document.get("rule", [])
        if not isinstance(listed, list) or not all(isinstance(rule, dict) for rule in listed):
            raise FileError(f"{path}: rules must be [[rule]] tables.")
        ignore, default = document.get("ignore", {}), document.get("default", {})
        _only(path, ignore, {"src", "dst"}, "[ignore]")
        _only(path, default, {"epsilon", "decay"}, "[default]")
        for name, value in default.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise FileError(f"{path}: {name} must be a number; got {value!r}.")
        return cls(
            str(path),
            tuple(_rule(path, number, rule) for number, rule in enumerate(listed, 1)),
            tuple(_pattern(path, text) for text in _texts(path, ignore.get("src", []))),
            tuple(_pattern(path, text) for text in _texts(path, ignore.get("dst", []))),
            default.get("epsilon"),
            default.get("decay"),
        )

    def pairs(self, source: Units, target: Units) -> tuple[dict[str, str], dict[str, Shape]]:
        """The pairs of layers that the rules say, and the shapes before flattening by target layer.

        Raises:
            FileError: a rule matches no layer, several match the same one, or a target is unknown or met twice.
        """
        found: dict[str, str] = {}
        by: dict[str, int] = {}
        flatten: dict[str, Shape] = {}
        goals = {unit.name for unit in target.units}
        for number, (pattern, goal, shape) in enumerate(self.rules, 1):
            where = f"{self.path}: rule {number} ({pattern.pattern!r})"
            matched = [(unit.name, m) for unit in source.units if (m := pattern.fullmatch(unit.name))]
            if not matched:
                raise FileError(f"{where} matches no layer of the source.")
            for name, m in matched:
                if name in found:
                    raise FileError(f"{where} matches {name!r}, which rule {by[name]} matches too.")
                to = _filled(goal, m, where)
                if to not in goals:
                    raise FileError(f"{where} sends {name!r} to {to!r}, which is no layer of the target.")
                if to in found.values():
                    raise FileError(f"{where} sends {name!r} to {to!r}, which has one already.")
                found[name], by[name] = to, number
                if shape is not None:
                    flatten[to] = shape
        return found, flatten


def ignored(patterns: Sequence[re.Pattern[str]], name: str) -> bool:
    """Whether a name is one that the file ignores."""
    return any(pattern.fullmatch(name) for pattern in patterns)


def _only(path: str | Path, table: Any, known: set[str], where: str) -> None:
    if not isinstance(table, dict):
        raise FileError(f"{path}: {where} must be a table; got {table!r}.")
    unknown = sorted(set(table) - known)
    if unknown:
        raise FileError(f"{path}: {where} has {', '.join(sorted(known))}; got {', '.join(unknown)}.")


def _texts(path: str | Path, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise FileError(f"{path}: a list of regular expressions was expected; got {value!r}.")
    return value


def _pattern(path: str | Path, text: Any) -> re.Pattern[str]:
    if not isinstance(text, str):
        raise FileError(f"{path}: a regular expression was expected; got {text!r}.")
    try:
        return re.compile(text)
    except re.error as error:
        raise FileError(f"{path}: {text!r} is no regular expression: {error}.") from error


def _rule(path: str | Path, number: int, rule: dict[str, Any]) -> tuple[re.Pattern[str], str, Shape | None]:
    where = f"rule {number}"
    _only(path, rule, {"src", "dst", "flatten"}, where)
    if not isinstance(rule.get("src"), str) or not isinstance(rule.get("dst"), str):
        raise FileError(f"{path}: {where} needs src and dst, both texts; got {rule!r}.")
    flatten = rule.get("flatten")
    sizes = flatten is None or (
        isinstance(flatten, list) and len(flatten) > 1 and all(type(n) is int and n > 0 for n in flatten)
    )
    if not sizes:
        raise FileError(f"{path}: flatten of {where} must be [channels, sizes ...]; got {flatten!r}.")
    return _pattern(path, rule["src"]), rule["dst"], None if flatten is None else tuple(flatten)


def _filled(goal: str, match: re.Match[str], where: str) -> str:
    """The target's name: {n} is the match's n-th group, {n+k} and {n-k} that number plus or minus k."""

    def value(found: re.Match[str]) -> str:
        group, shift = int(found[1]), found[2]
        if group > len(match.groups()):
            raise FileError(f"{where}: there is no group {group} for {found[0]}.")
        text = match[group] or ""
        if not shift:
            return text
        if not text.isdigit():
            raise FileError(f"{where}: group {group} is {text!r}, and {found[0]} needs a number.")
        return str(int(text) + int(shift))

    return re.sub(r"\{(\d+)([+-]\d+)?\}", value, goal)
