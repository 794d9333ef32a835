"""A Keras model's configuration: which layers are batch norms, and their arguments. Read as JSON, never built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from .checkpoint import Layer

_DEEPEST: Final = 64
_ROLES: Final = ("gamma", "beta", "moving_mean", "moving_variance")
_RENORM: Final = ("moving_stddev", "renorm_mean", "renorm_stddev")


def layers_of(config: Any, names: Sequence[str], given: Mapping[str, str], *, legacy: bool) -> tuple[Layer, ...]:
    """The batch norms of a model's configuration, with their tensors.

    Args:
        config: the parsed configuration.
        names: the tensors' names in the file.
        given: path of a layer in the file to the layer's own name, where the file has it.
        legacy: whether tensors are named (Keras 2) or numbered (Keras 3).
    """
    paths = {name: path for path, name in given.items()}
    found = []
    for number, (name, settings) in enumerate(_batch_norms(config)):
        tensors = _named(name, names) if legacy else _numbered(paths.get(name, _usual(number)), settings, names)
        if tensors:
            found.append(Layer(name, "BatchNormalization", tensors, {"dialect": "keras", **settings}))
    return tuple(found)


def _batch_norms(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and arguments of every BatchNormalization, in the order of the configuration."""
    stack: list[tuple[Any, int]] = [(config, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > _DEEPEST:
            continue
        if isinstance(node, dict):
            inside = node.get("config")
            if node.get("class_name") == "BatchNormalization" and isinstance(inside, dict):
                plain = {k: v for k, v in inside.items() if isinstance(v, (bool, int, float, str, list)) or v is None}
                yield str(inside.get("name", "")), plain
                continue
            stack += [(child, depth + 1) for child in reversed(list(node.values()))]
        elif isinstance(node, list):
            stack += [(child, depth + 1) for child in reversed(node)]


def _usual(number: int) -> str:
    return "layers/batch_normalization" + (f"_{number}" if number else "")


def _numbered(path: str, settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Keras 3 numbers a layer's variables, those it lacks left out."""
    there = sorted(
        (n for n in names if re.fullmatch(re.escape(path) + r"/vars/\d+", n)), key=lambda n: int(n[len(path) + 6 :])
    )
    roles = [
        role
        for role in _ROLES
        if (role != "gamma" or settings.get("scale", True)) and (role != "beta" or settings.get("center", True))
    ]
    if settings.get("renorm"):
        roles += _RENORM
    return dict(zip(roles, there, strict=True)) if len(roles) == len(there) else {}


def _named(name: str, names: Sequence[str]) -> dict[str, str]:
    """Older files have the layer's group, and the variables' names in it."""
    tensors: dict[str, str] = {}
    for full in names:
        parts = full.removeprefix("model_weights/").split("/")
        leaf = parts[-1].removesuffix(":0")
        if name in parts[:-1] and leaf in (*_ROLES, *_RENORM):
            tensors[leaf] = full
    return tensors
