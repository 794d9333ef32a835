"""The layers inside of a Keras model, and what they are called. Imports no Keras before it is given a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any


def named_batch_norms(model: Any) -> dict[str, Any]:
    """Every batch norm once, by its first name, in the order in which the model holds them."""
    named: dict[str, Any] = {}
    for name, layer in _layers(model):
        if _is_batch_norm(layer):
            named[_free(name, named)] = layer
    return named


def named_layers(model: Any) -> dict[str, Any]:
    """Every layer once, likewise; batch norms by the names of `named_batch_norms`."""
    given = {id(layer): name for name, layer in named_batch_norms(model).items()}
    taken: dict[str, Any] = dict.fromkeys(given.values())
    named: dict[str, Any] = {}
    for path, layer in _layers(model):
        name = given.get(id(layer)) or _free(path, taken)
        named[name] = taken[name] = layer
    return named


def holders(model: Any) -> Iterator[Any]:
    """The model and every layer in it that holds layers, once each."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        layer = waiting.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        inside = _children(layer)
        waiting.extend(inside)
        if inside or layer is model:
            yield layer
            # What a sequential model computes with is a functional one that it keeps to itself.
            if getattr(layer, "_functional", None) is not None:
                waiting.append(layer._functional)


def own_variables(layer: Any) -> list[Any]:
    """The variables that a layer itself holds and saves, in its order."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer once, the model first, with the names on the way to it."""
    seen: set[int] = set()
    waiting: list[tuple[Any, tuple[str, ...]]] = [(model, ())]
    while waiting:
        layer, path = waiting.pop()
        if id(layer) not in seen:
            seen.add(id(layer))
            yield "/".join(path) or layer.name, layer
            waiting += [(child, (*path, child.name)) for child in reversed(_children(layer))]


def _free(name: str, taken: dict[str, Any]) -> str:
    """The name, or the first of "name#2", "name#3" that is not taken."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}#{count}"
    return found


def _is_batch_norm(layer: Any) -> bool:
    return isinstance(layer, sys.modules["keras"].layers.BatchNormalization)


def _children(layer: Any) -> list[Any]:
    return list(layer._flatten_layers(include_self=False, recursive=False))
