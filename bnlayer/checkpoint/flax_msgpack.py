"""Flax's msgpack: nested maps, with arrays as extension type 1 (shape, dtype, bytes), complex as 2, numpy scalars as 3.

Arrays above a gigabyte lie in chunks; bfloat16 is there by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import msgpack
import numpy as np

from ..errors import CheckpointError
from .checkpoint import Checkpoint, NDArray, Tensor
from .flatten import flatten
from .formats import Options
from .source import Source
from .writing import NUMBERS, nested, refuse_unfit

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED: Final = "__msgpack_chunked_array__"
_CHUNK: Final = 2**30  # bytes; above it an array is cut
_EXTRA: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
}
_DTYPES: Final = NUMBERS | set(_EXTRA.values())


def read(path: Path, options: Options) -> Checkpoint:
    """Read the whole message, its arrays as views of it; `FormatModule.read`."""
    source = Source(path)
    place = str(path)

    def extension(code: int, data: bytes) -> Any:
        if code == _ARRAY:
            return _array(data, place)
        if code == _SCALAR:
            return _array(data, place)[()]
        if code == _COMPLEX:
            pair = _unpack(data, place)
            return complex(*pair)
        raise CheckpointError(f"{place}: extension type {code} is unknown; 1, 2 and 3 are Flax's.")

    tree = _unpack(source.read(0, source.size, "message"), place, extension)
    if options.key is not None:
        if not isinstance(tree, dict) or options.key not in tree:
            source.refuse("", f"there is no key {options.key!r}")
        tree = tree[options.key]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, leaf in flatten(tree, place, separator="/", children=_children):
        if isinstance(leaf, dict) and leaf:
            tensors[name] = Tensor.of(_joined(leaf, f"{place}: {name}"))
        elif isinstance(leaf, (np.ndarray, np.generic, complex)):
            tensors[name] = Tensor.of(np.asarray(leaf))
        else:
            values[name] = leaf if isinstance(leaf, (bool, int, float, str, Mapping)) else None
    return Checkpoint(
        # jax.tree.map sorts the keys of a dict, and most programs apply one before they save.
        "flax", tensors, order_is_meaningful=not _is_sorted(tree), path=path,
        metadata={"values": values} if values else {},
    )  # fmt: skip


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write nested maps by the slashes in the names; `FormatModule.write`.

    What a Flax file holds beside arrays, such as a step or the empty state of an optimizer, is written back.
    """
    values = dict(checkpoint.metadata.get("values", {})) if checkpoint.format == "flax" else {}
    problem = nested([*checkpoint.tensors, *values])
    refuse_unfit(checkpoint, path, "Flax's msgpack", dtypes=_DTYPES, problem=problem, others=values)
    tree: dict[str, Any] = {}
    for name in [*checkpoint.tensors, *values]:
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = _Leaf(name)
    packer = msgpack.Packer(strict_types=True, use_bin_type=True)
    with path.open("xb") as file:
        for piece in _pieces(tree, packer, checkpoint, values):
            file.write(piece)


@dataclass(frozen=True)
class _Leaf:
    name: str


def _pieces(node: Any, packer: Any, checkpoint: Checkpoint, values: Mapping[str, Any]) -> Iterator[bytes]:
    """The message, one tensor at a time."""
    if isinstance(node, dict):
        yield packer.pack_map_header(len(node))
        for key, child in node.items():
            yield packer.pack(key)
            yield from _pieces(child, packer, checkpoint, values)
    elif node.name in checkpoint.tensors:
        yield packer.pack(_packed(checkpoint[node.name]))
    else:
        yield packer.pack(values[node.name])


def _unpack(data: bytes, place: str, extension: Any = None) -> Any:
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            object_pairs_hook=lambda pairs: _unique(pairs, place),
            **({} if extension is None else {"ext_hook": extension}),
        )
    except CheckpointError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{place}: the message is damaged ({type(error).__name__}: {error}).") from error


def _unique(pairs: list[tuple[Any, Any]], place: str) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError(f"{place}: a map has a key twice.")
    return found


def _array(data: bytes, place: str) -> NDArray:
    parts = _unpack(data, place)
    if not isinstance(parts, (list, tuple)) or len(parts) != 3:
        raise CheckpointError(f"{place}: an array is damaged: shape, dtype and bytes were expected.")
    shape, name, stored = parts
    try:
        dtype = _EXTRA[name] if name in _EXTRA else np.dtype(name)
    except TypeError as error:
        raise CheckpointError(f"{place}: an array's dtype {name!r} is unknown.") from error
    counts = isinstance(shape, (list, tuple)) and all(type(n) is int and n >= 0 for n in shape)
    if not counts or dtype.hasobject or not isinstance(stored, bytes) or prod(shape) * dtype.itemsize != len(stored):
        raise CheckpointError(f"{place}: an array of {name!r} {shape!r} does not fit its bytes.")
    return np.frombuffer(stored, dtype).reshape(shape)


def _joined(node: dict[Any, Any], place: str) -> NDArray:
    """An array that lies in chunks."""
    try:
        shape = [node["shape"][str(i)] for i in range(len(node["shape"]))]
        chunks = [node["chunks"][str(i)].reshape(-1) for i in range(len(node["chunks"]))]
        return np.concatenate(chunks).reshape(shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}: its chunks do not make an array ({error}).") from error


def _children(node: Any) -> dict[Any, Any] | None:
    if not isinstance(node, dict):
        return dict(enumerate(node)) if isinstance(node, (list, tuple)) else None
    return None if _CHUNKED in node or not node else node  # an empty one is a value: Flax asks for it back


def _is_sorted(tree: Any) -> bool:
    """Whether every map is in the order of its names, so that the model's own order cannot be told."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            names = [str(key) for key in node]
            if names != sorted(names):
                return False
            stack += list(node.values())
    return True


def _packed(array: NDArray) -> Any:
    if array.nbytes > _CHUNK:
        flat = array.reshape(-1)
        step = max(1, _CHUNK // array.itemsize)
        chunks = [_packed(flat[i : i + step]) for i in range(0, flat.size, step)]
        return {
            _CHUNKED: True,
            "shape": {str(i): n for i, n in enumerate(array.shape)},
            "chunks": {str(i): chunk for i, chunk in enumerate(chunks)},
        }
    data = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
    return msgpack.ExtType(_ARRAY, data)
