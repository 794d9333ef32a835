"""torch.save's files since torch 1.6: a zip of one pickle (`NAME/data.pkl`) and one member a storage (`NAME/data/KEY`).

Read without torch, and without running anything; written so that torch.load(weights_only=True) takes it.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .formats import Options
from .pickles import Reader
from .source import Source
from .torch_objects import DTYPES, STORAGES, checkpoint_of

_MOST_MEMBERS: Final = 1_000_000
_ALIGNMENT: Final = 64  # of a storage in the file, as torch writes it, so that it can be mapped


def read(path: Path, options: Options) -> Checkpoint:
    """Read the pickle; storages when a tensor is asked for. `FormatModule.read`."""
    source = Source(path)
    with _archive(source) as archive:
        members = _members(archive, source)
        pickle = next((name for name in members if name.rsplit("/", 1)[-1] == "data.pkl"), None)
        if pickle is None:
            source.refuse("", "it has no data.pkl, so it is not a file of torch.save")
        folder = pickle.removesuffix("data.pkl")
        order = archive.read(members[f"{folder}byteorder"]) if f"{folder}byteorder" in members else b"little"
        if order != b"little":
            source.refuse("byteorder", f"it is {order[:20]!r}; only little-endian files are read")
        root = Reader(f"{path}: {pickle}").run(BytesIO(archive.read(members[pickle])))
    if any(name.endswith("/code/__torch__.py") or "/code/" in name for name in members):
        source.refuse("", "it is a TorchScript program; save its state_dict() instead")

    def sizes(key: str) -> int | None:
        member = members.get(f"{folder}data/{key}")
        return None if member is None else member.file_size

    def storage(key: str, length: int, place: str) -> bytes:
        with _archive(source) as archive, archive.open(members[f"{folder}data/{key}"]) as stream:
            data = stream.read(length)
        if len(data) != length:
            raise CheckpointError(f"{place}: {length} bytes were expected, and {len(data)} could be read.")
        return data

    return checkpoint_of(root, path, "torch", options, sizes, storage)


@contextmanager
def _archive(source: Source) -> Iterator[zipfile.ZipFile]:
    """The archive, its damage told as ours."""
    try:
        with source.open() as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source.path}: the zip archive is damaged ({error}).") from error


def _members(archive: zipfile.ZipFile, source: Source) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in members:
            source.refuse(info.filename, "the archive has this member twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            source.refuse(info.filename, "it is compressed or encrypted; torch stores its members plain")
        if info.file_size > source.size or info.file_size != info.compress_size:
            source.refuse(info.filename, f"{info.file_size} bytes are declared, and the file has {source.size}")
        members[info.filename] = info
        if len(members) > _MOST_MEMBERS:
            source.refuse("", f"the archive has more than {_MOST_MEMBERS} members")
    return members


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a state_dict, an OrderedDict of tensors in the checkpoint's order; `FormatModule.write`."""
    name = path.name.partition(".")[0] or "archive"
    kinds = {DTYPES[dtype]: storage for storage, dtype in STORAGES.items() if storage != "UntypedStorage"}
    for tensor, stored in checkpoint.tensors.items():
        if stored.dtype not in kinds:
            raise CheckpointError(f"{path}: {tensor} is {stored.dtype.name}, which has no torch storage; convert it.")
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{name}/data.pkl", _pickled(checkpoint, kinds))
        _add(archive, f"{name}/byteorder", b"little")
        for key, tensor in enumerate(checkpoint.tensors):
            _add(archive, f"{name}/data/{key}", np.ascontiguousarray(_dense(checkpoint[tensor])).tobytes())
        _add(archive, f"{name}/version", b"3\n")


def _dense(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array's elements in the order in which they lie in memory."""
    order = np.argsort([-stride for stride in array.strides], kind="stable")
    return array.transpose(order)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a member whose data begins at a multiple of the alignment: padding goes into the extra field."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    assert archive.fp is not None
    begins = archive.fp.tell() + 30 + len(name.encode()) + 4
    padding = -begins % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # the tag that torch itself uses for padding
    archive.writestr(info, data)


def _pickled(checkpoint: Checkpoint, kinds: dict[np.dtype[Any], str]) -> bytes:
    """The pickle of protocol 2 that torch.save would write for these tensors, opcode by opcode."""
    out = bytearray(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for key, (name, tensor) in enumerate(checkpoint.tensors.items()):
        size = int(np.prod(tensor.shape, dtype=object))
        out += _text(name)
        out += b"ctorch._utils\n_rebuild_tensor_v2\n((" + _text("storage")
        out += f"ctorch\n{kinds[tensor.dtype]}\n".encode() + _text(str(key)) + _text("cpu") + _int(size) + b"tQ"
        out += _int(0) + _ints(tensor.shape) + _ints(_strides(checkpoint, name)) + b"\x89"
        out += b"ccollections\nOrderedDict\n)RtR"
    return bytes(out + b"u.")


def _strides(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Strides in elements of the tensor laid out densely in its own order of axes."""
    tensor = checkpoint.tensors[name]
    array = checkpoint[name] if len(tensor.shape) > 1 else None
    axes = range(len(tensor.shape)) if array is None else np.argsort([-s for s in array.strides], kind="stable")
    strides, step = [0] * len(tensor.shape), 1
    for axis in reversed([int(a) for a in axes]):
        strides[axis] = step
        step *= max(1, tensor.shape[axis])
    return tuple(strides)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    if 0 <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _ints(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"
