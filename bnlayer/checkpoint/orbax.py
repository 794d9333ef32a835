"""Orbax checkpoints: a folder with `_METADATA` (the tree, JSON) and arrays in zarr, plain or inside of an OCDBT store.

The folder of a CheckpointManager has such folders as `STEP/ITEM/`. Read with tensorstore alone: no JAX, no devices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import tensorstore

from ..errors import CheckpointError
from .archive import is_bomb
from .checkpoint import Checkpoint, NDArray, Tensor
from .formats import Options
from .source import Source
from .strict import strict_json
from .writing import NUMBERS, nested, refuse_unfit

_METADATA: Final = "_METADATA"
_DICT_KEY: Final = 2  # orbax's KeyType.DICT
_DTYPES: Final = NUMBERS | {np.dtype(ml_dtypes.bfloat16)}
_LONGEST: Final = 2**28
_MOST_FILES: Final = 1_000_000
# What the tree notes beside arrays: an empty container, a text, nothing.
_NO_ARRAYS: Final = ("None", "Dict", "List", "Tuple", "NamedTuple", "EmptyState", "string")


def read(path: Path, options: Options) -> Checkpoint:
    """Read the tree and every array's header; `FormatModule.read`."""
    folder = _item(path, options.key)
    size = _size(folder)
    tree, settings = _tree(folder)
    tensors: dict[str, Tensor] = {}
    values: list[str] = []
    for keys, kind in tree:
        name = "/".join(keys)
        if name in tensors:
            raise CheckpointError(f"{folder}: the name {name!r} is there twice.")
        if kind in _NO_ARRAYS:
            values.append(name)
            continue
        tensors[name] = _tensor(folder, ".".join(keys), name, settings, size)
    metadata: dict[str, Any] = {"folder": str(folder)}
    if values:
        metadata["no_arrays"] = values
    return Checkpoint("orbax", tensors, order_is_meaningful=False, path=path, metadata=metadata)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a folder with the tree by the slashes in the names; `FormatModule.write`.

    Orbax restores it without a template (`PyTreeCheckpointer().restore(path)` gives numpy arrays) and with one.
    """
    stored: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        stored.setdefault(".".join(name.split("/")), []).append(name)
    inside = nested(checkpoint)

    def problem(name: str) -> str | None:
        same = [other for other in stored[".".join(name.split("/"))] if other != name]
        if same:
            return f"is stored where {same[0]!r} is"
        return "has a backslash in it" if "\\" in name else inside(name)

    refuse_unfit(checkpoint, path, "Orbax", dtypes=_DTYPES, problem=problem)
    path.mkdir()
    tree: dict[str, Any] = {}
    for name, tensor in checkpoint.tensors.items():
        keys = name.split("/")
        _store(path, ".".join(keys), checkpoint[name])
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            # Of a jax.Array it would ask for devices, where it is restored without a template.
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": tensor.shape},
        }
    document = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (path / _METADATA).write_text(json.dumps(document), encoding="utf-8")
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": handler, "custom_metadata": {}}))


def _store(folder: Path, stored: str, array: NDArray) -> None:
    """One array into the folder's store, in one chunk."""
    spec = {
        "driver": "zarr",
        "kvstore": _in_store(folder, stored),
        "dtype": array.dtype.name,
        "metadata": {
            "shape": array.shape,
            "chunks": [max(1, n) for n in array.shape],
            "compressor": {"id": "zstd", "level": 1},
        },
        "store_data_equal_to_fill_value": True,  # an array of zeros is stored like any other
    }
    try:
        tensorstore.open(spec, create=True).result().write(array).result()
    except ValueError as error:
        raise CheckpointError(f"{folder}: {stored}: it cannot be stored ({error}).") from error


def _in_store(folder: Path, stored: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    return {"driver": "ocdbt", "base": base, "path": f"{stored}/"}


def _item(path: Path, key: str | None) -> Path:
    """The folder with the tree: the one given, or in a manager's the latest step's only item."""
    if (path / _METADATA).is_file():
        return path
    steps = sorted((p for p in path.iterdir() if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name))
    wanted = (key or "").split("/")
    if wanted[0].isdigit():
        steps, wanted = [p for p in steps if p.name == wanted[0]], wanted[1:]
    if not steps:
        raise CheckpointError(
            f"{path}: there is no {_METADATA} in it, and no folder of a step{f' {key}' if key else ''}."
        )
    step = steps[-1]
    items = {p.name: p for p in sorted(step.iterdir()) if (p / _METADATA).is_file()}
    if (step / _METADATA).is_file():
        items[""] = step
    name = "/".join(wanted)
    if name in items:
        return items[name]
    if len(items) == 1 and not name:
        return next(iter(items.values()))
    known = ", ".join(items) or "none"
    raise CheckpointError(f"{step}: one item was expected; there is {known}. Say which with key='STEP/ITEM' (--key).")


def _size(folder: Path) -> int:
    """Bytes of all files; a link could lead out of the folder, so there must be none."""
    total = 0
    for count, found in enumerate(folder.rglob("*")):
        if found.is_symlink() or count > _MOST_FILES:
            raise CheckpointError(f"{folder}: {found.name}: it is a link, or there are too many files.")
        total += found.stat().st_size if found.is_file() else 0
    return total


def _tree(folder: Path) -> tuple[list[tuple[list[str], str]], Mapping[str, Any]]:
    source = Source(folder / _METADATA)
    if source.size > _LONGEST:
        source.refuse("", f"it has {source.size} bytes")
    document = strict_json(source.read(0, source.size, "tree"), str(source.path))
    entries = document.get("tree_metadata") if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        source.refuse("tree_metadata", "an object was expected")
    return list(_leaves(entries, source)), document


def _leaves(entries: Mapping[str, Any], source: Source) -> Iterator[tuple[list[str], str]]:
    for text, entry in entries.items():
        try:
            keys = [str(part["key"]) for part in entry["key_metadata"]]
            kind = str(entry["value_metadata"]["value_type"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{source.path}: {text[:200]}: it is damaged ({error!r}).") from error
        yield keys, kind


def _tensor(folder: Path, stored: str, name: str, settings: Mapping[str, Any], size: int) -> Tensor:
    place = f"{folder}: {name}"
    if "/" in stored or "\\" in stored or stored in ("", ".", ".."):
        raise CheckpointError(f"{place}: it cannot be the name of an array.")
    spec: dict[str, Any] = {"driver": "zarr3" if settings.get("use_zarr3") else "zarr"}
    if settings.get("use_ocdbt", (folder / "manifest.ocdbt").exists()):
        spec["kvstore"] = _in_store(folder, stored)
    else:
        spec["kvstore"] = {"driver": "file", "path": f"{folder.resolve() / stored}/"}

    def opened() -> Any:
        try:
            return tensorstore.open(spec, open=True, read=True).result()
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise CheckpointError(f"{place}: it cannot be opened ({error}).") from error

    array = opened()
    shape, dtype = tuple(int(n) for n in array.shape), np.dtype(array.dtype.numpy_dtype)
    declared = prod(shape) * dtype.itemsize
    if dtype.hasobject or is_bomb(declared, size):
        raise CheckpointError(f"{place}: {dtype} {shape} is no array of numbers, or more than the files can hold.")

    def load() -> NDArray:
        try:
            found = np.asarray(opened().read().result())
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{place}: it is damaged ({error}).") from error
        if found.shape != shape or found.dtype != dtype:
            raise CheckpointError(f"{place}: it changed while it was being read.")
        return found

    return Tensor(dtype, shape, load)
