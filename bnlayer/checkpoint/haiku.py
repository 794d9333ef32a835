"""Pickles of Haiku's parameters and state, of nested dicts of numpy or JAX arrays in general.

The usual file is a pickled pair (params, state) or a dict of the two; names become `params/MODULE/NAME` and
`state/MODULE/NAME`. Nothing in the file runs (`pickles`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from ..errors import CheckpointError
from .checkpoint import Checkpoint, Tensor
from .flatten import flatten
from .formats import Options
from .numpy_objects import BY_NAME, array_of
from .pickles import Call, Reader
from .source import Bounded, Source
from .writing import NUMBERS, refuse_unfit

# Mappings that Haiku has used over the years, and Flax's.
_MAPPINGS: Final = (
    "collections.OrderedDict", "collections.defaultdict", "haiku._src.data_structures.FlatMapping",
    "haiku._src.data_structures.FlatMap", "haiku._src.data_structures.frozendict",
    "haiku._src.data_structures.to_immutable_dict", "haiku._src.data_structures.FlatComponents",
    "flax.core.frozen_dict.FrozenDict",
)  # fmt: skip
_PAIR: Final = ("params", "state")


def read(path: Path, options: Options) -> Checkpoint:
    """Read the pickle; `FormatModule.read`. Its arrays lie inside of it, so they are in memory then."""
    source = Source(path)
    with source.open() as file:
        root = Reader(str(path)).run(Bounded(file, source.size))
    if isinstance(root, tuple) and len(root) == len(_PAIR):
        root = dict(zip(_PAIR, root, strict=True))
    if options.key is not None:
        root = (_children(root) or {}).get(options.key)
        if root is None:
            source.refuse("", f"there is no key {options.key!r}")
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, leaf in flatten(root, str(path), separator="/", children=_children):
        array = array_of(leaf, f"{path}: {name}")
        if array is not None and not isinstance(leaf, (bool, int, float)):
            tensors[name] = Tensor.of(array)
        elif isinstance(leaf, (bool, int, float, str)) or leaf is None:
            values[name] = leaf
        else:
            what = leaf.name if isinstance(leaf, Call) else type(leaf).__name__
            raise CheckpointError(f"{path}: {name}: it is a {what}, which is no array and is not made here.")
    if not tensors:
        source.refuse("", "there is no array in the pickle")
    return Checkpoint(
        "haiku", tensors, order_is_meaningful=True, path=path, metadata={"values": values} if values else {}
    )


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the pickled pair (params, state) of numpy arrays, or one dict of modules where a name is of neither;
    `FormatModule.write`."""
    folders = {module for module, _ in map(_cut, checkpoint) if module is not None}
    refuse_unfit(
        checkpoint,
        path,
        "a pickle of Haiku's",
        dtypes=NUMBERS | set(BY_NAME.values()),
        problem=lambda name: "is also the module of other tensors" if "/" not in name and name in folders else None,
    )
    parts = [name.split("/", 1) for name in checkpoint]
    is_pair = all(first in _PAIR and len(rest) == 1 and "/" in rest[0] for first, *rest in parts)
    trees: dict[str, dict[str, Any]] = {part: {} for part in (_PAIR if is_pair else ("",))}
    for name in checkpoint:
        part, inner = name.split("/", 1) if is_pair else ("", name)
        module, own = _cut(inner)
        (trees[part] if module is None else trees[part].setdefault(module, {}))[own] = _Leaf(name)
    with path.open("xb") as file:
        _Pickler(file, checkpoint).dump(tuple(trees.values()) if is_pair else trees[""])


def _cut(name: str) -> tuple[str | None, str]:
    """The module, whose name has slashes itself, and the parameter's own name."""
    module, slash, own = name.rpartition("/")
    return (module if slash else None), own


@dataclass(frozen=True)
class _Leaf:
    name: str


class _Pickler(pickle.Pickler):
    """Writes an array where a leaf stands, one at a time."""

    def __init__(self, file: BinaryIO, checkpoint: Checkpoint) -> None:
        super().__init__(file, protocol=4)
        self.fast = True  # without a memo, which would hold every array until the end
        self._checkpoint = checkpoint

    def reducer_override(self, obj: Any) -> Any:
        return np.asarray(self._checkpoint[obj.name]).__reduce_ex__(4) if isinstance(obj, _Leaf) else NotImplemented


def _children(node: Any) -> dict[Any, Any] | None:
    if isinstance(node, dict):
        return node
    if isinstance(node, Call) and node.name in _MAPPINGS:
        inner = _first_mapping(node)
        return node.items or inner or {}
    if isinstance(node, (list, tuple)) and not isinstance(node, str):
        return dict(enumerate(node))
    return None


def _first_mapping(node: Call) -> dict[Any, Any] | None:
    """What a mapping was made of: its first argument, or its state."""
    candidates: list[Any] = [*node.arguments, node.state]
    if isinstance(node.state, dict):
        candidates += list(node.state.values())
    children: Callable[[Any], dict[Any, Any] | None] = _children
    return next((children(c) for c in candidates if isinstance(c, (dict, Call)) and children(c) is not None), None)
