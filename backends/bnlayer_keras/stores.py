"""What Keras saves of a model and where, found by Keras's own walk over it, with memory in a file's place.

Layers may save and load their variables in their own way, and attributes are visited in an order of Keras's own; so
nothing of that is done again here. This module, and no other, knows `keras.src.saving`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from keras.src.saving import saving_lib


@dataclass(eq=False)
class Group:
    """What is saved under one path.

    Attributes:
        name: the layer's own name, if it has one.
        values: variables and tensors by their keys, usually "0", "1" and so on.
    """

    name: str | None
    values: dict[str, Any] = field(default_factory=dict)


class _Writing(saving_lib.H5IOStore):  # the walk takes no other class
    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
        group = self.groups[path] = Group((metadata or {}).get("name"))
        return group.values


class _Reading(saving_lib.H5IOStore):
    def __init__(self, groups: Mapping[str, Mapping[str, Any]]) -> None:
        self.groups = groups

    def __bool__(self) -> bool:
        return True

    def get(self, path: str) -> dict[str, Any]:
        return dict(self.groups.get(path, {}))

    def has_path(self, path: str) -> bool:
        return any(f"{each}/".startswith(f"{path}/") for each in self.groups)


def saved(model: Any) -> dict[str, Group]:
    """Everything that `model.save_weights` would write, by path; groups without values left out."""
    store = _Writing()
    saving_lib._save_state(model, store, None, "", set())
    return {path: group for path, group in store.groups.items() if group.values}


def restore(model: Any, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Have every layer load what is under its path, as `model.load_weights` does."""
    saving_lib._load_state(model, _Reading(groups), None, "", visited_saveables=set())


def tensor_name(path: str, key: str) -> str:
    """As in a file."""
    return f"{path}/vars/{key}" if path else f"vars/{key}"
