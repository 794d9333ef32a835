"""HDF5 files that nobody vouches for: what can be reached by hard links alone, and lies in the file itself.

Soft and external links, external storage and virtual datasets would open other files; they are refused, and so is what
declares much more than is stored. Built on h5py's own walk, level by level: its visiting functions follow links.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, Final

import h5py
import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .archive import is_bomb
from .checkpoint import NDArray, Tensor
from .source import Source

_DEEPEST: Final = 64
_MOST: Final = 1_000_000
_LONGEST_ATTRIBUTE: Final = 2**26  # bytes; a model's config is one
_LONGEST_WRITTEN: Final = 60_000  # HDF5 has room for 64 kB in an attribute
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_OPAQUE: Final = np.dtype("V2")
_DAMAGE: Final = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    UnicodeError,
    SystemError,
)


@contextmanager
def opened(source: Source, data: Any = None) -> Iterator[Any]:
    """The file, or one inside of an archive (`data`, a stream), its damage told as a CheckpointError."""
    try:
        with source.open() as file, h5py.File(file if data is None else data, "r") as root:
            yield root
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{source.path}: the HDF5 file is damaged ({type(error).__name__}: {error}).") from error


def walk(group: Any, source: Source) -> Iterator[tuple[str, Any]]:
    """Every dataset with its path, in the order of the groups' own listing.

    Raises:
        CheckpointError: a link is not a hard one, groups are nested too deep or hold themselves, or there are too many.
    """
    stack: list[tuple[str, Any, int]] = [("", group, 0)]
    seen, groups = 0, set()
    while stack:
        path, node, depth = stack.pop()
        if isinstance(node, h5py.Dataset):
            yield path, node
            continue
        address = h5py.h5o.get_info(node.id).addr
        if depth > _DEEPEST or address in groups:
            source.refuse(path or "/", "groups are nested too deep, or one is inside of itself or there twice")
        groups.add(address)
        inside = []
        for name in node:
            seen += 1
            if seen > _MOST:
                source.refuse(path, f"the file has more than {_MOST} entries")
            link = node.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                source.refuse(
                    f"{path}/{name}", f"it is a {type(link).__name__}, which may lead to another file or place"
                )
            child = node[name] if "/" not in name else None
            if not isinstance(child, (h5py.Group, h5py.Dataset)):
                source.refuse(f"{path}/{name}", "it is neither a group nor a dataset")
            inside.append((f"{path}/{name}".lstrip("/"), child, depth + 1))
        stack += reversed(inside)


def tensor(dataset: Any, path: str, source: Source, reopen: Any) -> Tensor | None:
    """A dataset of numbers as a tensor; None for one of another kind.

    Args:
        dataset: what `walk` found.
        path: its path.
        source: its file.
        reopen: a context manager that opens the file again, for when the tensor is read.

    Raises:
        CheckpointError: it lies outside of the file, or declares much more than it stores.
    """
    if dataset.external or dataset.is_virtual:
        source.refuse(path, "its data lies in other files")
    dtype = _BFLOAT16 if is_bfloat16(dataset, source) else dataset.dtype
    if dtype.hasobject or dtype.fields is not None or (dtype.kind not in "biufc" and dtype != _BFLOAT16):
        return None
    declared = prod(dataset.shape or ()) * dtype.itemsize
    stored = dataset.id.get_storage_size()
    if dataset.chunks is None and stored != declared:
        source.refuse(path, f"{declared} bytes are declared, and {stored} are stored")
    if stored > source.size or is_bomb(declared, stored):
        source.refuse(path, f"{declared} bytes are declared, and {stored} are stored in a file of {source.size}")
    shape = tuple(int(n) for n in dataset.shape or ())

    def load() -> NDArray:
        with reopen() as root:
            found = _reached(root, path, source)
            if found.shape != shape or found.dtype.itemsize != dtype.itemsize:
                source.refuse(path, "it changed while the file was being read")
            if dtype == _BFLOAT16:
                return np.asarray(found[()], _OPAQUE).reshape(shape).view(_BFLOAT16)
            return np.asarray(found[()], dtype.newbyteorder("=")).reshape(shape)

    return Tensor(dtype.newbyteorder("="), shape, load)


def is_bfloat16(dataset: Any, source: Source) -> bool:
    """Whether it is Keras's bfloat16, which HDF5 lacks: opaque values of two bytes, and the name in an attribute."""
    return dataset.dtype == _OPAQUE and text_attribute(dataset, "dtype", source) == "bfloat16"


def write_tensor(root: Any, path: str, array: NDArray) -> None:
    """A dataset at a path whose groups are made as needed; bfloat16 as Keras stores it.

    Raises:
        ValueError, OSError: HDF5 cannot hold it there.
    """
    dataset = root.create_dataset(path, data=np.asarray(array, order="C"))
    if array.dtype == _BFLOAT16:
        dataset.attrs["dtype"] = "bfloat16"


def text_attribute(node: Any, name: str, source: Source) -> str | None:
    """An attribute that is one text; None where there is none."""
    if name not in node.attrs:
        return None
    value = _attribute(node, name, source)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value) if isinstance(value, str) else None


def list_attribute(node: Any, name: str, source: Source) -> list[str] | None:
    """An attribute that is a list of texts, or one in pieces (`name0`, `name1`, ...); None where there is none."""
    if name in node.attrs:
        value = np.atleast_1d(_attribute(node, name, source))
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in value.reshape(-1).tolist()]
    pieces: list[str] = []
    index = 0
    while f"{name}{index}" in node.attrs:
        pieces += list_attribute(node, f"{name}{index}", source) or []
        index += 1
    return pieces if index else None


def write_list(node: Any, name: str, texts: list[str]) -> None:
    """A list of texts as an attribute; one too long for HDF5 in pieces, as `list_attribute` reads it."""
    data = np.array([text.encode() for text in texts], "S") if texts else np.zeros(0)
    if data.nbytes <= _LONGEST_WRITTEN:
        node.attrs[name] = data
        return
    for index, piece in enumerate(np.array_split(data, -(-data.nbytes // _LONGEST_WRITTEN))):
        node.attrs[f"{name}{index}"] = piece


def _attribute(node: Any, name: str, source: Source) -> Any:
    attribute = node.attrs.get_id(name)
    size = prod(attribute.shape) * attribute.dtype.itemsize
    if size > min(_LONGEST_ATTRIBUTE, source.size):
        source.refuse(f"{node.name}@{name}", f"it declares {size} bytes")
    return node.attrs[name]


def _reached(root: Any, path: str, source: Source) -> Any:
    """The dataset at a path, one hard link at a time."""
    node = root
    for part in path.split("/"):
        if not isinstance(node, h5py.Group) or not isinstance(node.get(part, getlink=True), h5py.HardLink):
            source.refuse(path, "it is not there anymore")
        node = node[part]
    return node
