"""torch.save's files since torch 1.6: a zip of one pickle (`NAME/data.pkl`) and one member a storage (`NAME/data/KEY`).

Read without torch, and without running anything; written so that torch.load(weights_only=True) takes it.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

from .archive import members, opened, stored
from .checkpoint import Checkpoint, NDArray
from .formats import Options
from .pickles import Reader
from .source import Source
from .torch_objects import DTYPES, STORAGES, checkpoint_of
from .writing import any_name, bytes_of, refuse_unfit

_ALIGNMENT: Final = 64  # of a storage in the file, as torch writes it, so that it can be mapped
_LOCAL_HEADER, _ZIP64_FIELD = 30, 20  # bytes before a member's name; of the field that a large member has
_TORCH: Final = {dtype: name for name, dtype in DTYPES.items()}
_KINDS: Final = {name: kind for kind, name in STORAGES.items() if kind != "UntypedStorage"}


def read(path: Path, options: Options) -> Checkpoint:
    """Read the pickle; storages when a tensor is asked for. `FormatModule.read`."""
    source = Source(path)
    with opened(source) as archive:
        inside = members(archive, source, plain=True)
    pickle = next((name for name in inside if name.rsplit("/", 1)[-1] == "data.pkl"), None)
    if pickle is None:
        source.refuse("", "it has no data.pkl, so it is not a file of torch.save")
    folder = pickle.removesuffix("data.pkl")
    order = stored(inside[f"{folder}byteorder"], source) if f"{folder}byteorder" in inside else b"little"
    if order != b"little":
        source.refuse("byteorder", f"it is {bytes(order[:20])!r}; only little-endian files are read")
    if any(name.startswith(f"{folder}code/") for name in inside):
        source.refuse("", "it is a TorchScript program; save its state_dict() instead")
    root = Reader(f"{path}: {pickle}").run(BytesIO(stored(inside[pickle], source)))

    def sizes(key: str) -> int | None:
        member = inside.get(f"{folder}data/{key}")
        return None if member is None else member.file_size

    def storage(key: str, length: int, place: str) -> bytearray:
        return stored(inside[f"{folder}data/{key}"], source, length)

    return checkpoint_of(root, path, "torch", options, sizes, storage)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a state_dict, an OrderedDict of tensors in the checkpoint's order; `FormatModule.write`.

    Each tensor has a storage of its own, dense, in the order of axes that it has in memory.
    """
    refuse_unfit(checkpoint, path, "torch", dtypes=_TORCH, problem=any_name)
    pickle = bytearray(b"\x80\x02ccollections\nOrderedDict\n)R(")
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for key, name in enumerate(checkpoint.tensors):
            pickle += _text(name) + _add_storage(archive, key, checkpoint[name])
        # Last, because a tensor's strides are known once it has been read.
        _add(archive, "data.pkl", bytes(pickle + b"u."))
        _add(archive, "byteorder", b"little")
        _add(archive, "version", b"3\n")


def _add_storage(archive: zipfile.ZipFile, key: int, array: NDArray) -> bytes:
    """Add an array's elements as the storage `key`; what the pickle says of the tensor."""
    _add(archive, f"data/{key}", bytes_of(array.transpose(_by_stride(array))))
    return _pickled(array, key)


def _by_stride(array: NDArray) -> list[int]:
    """The axes, the one with the longest stride first: the order in which the elements lie in memory."""
    return sorted(range(array.ndim), key=lambda axis: -array.strides[axis])


def _add(archive: zipfile.ZipFile, member: str, data: bytes | memoryview) -> None:
    """Add a member whose data begins at a multiple of the alignment: padding goes into the extra field."""
    info = zipfile.ZipInfo(f"archive/{member}", (1980, 1, 1, 0, 0, 0))
    info.file_size = len(data)  # so that a member of gigabytes gets a header for one
    assert archive.fp is not None
    begins = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + 4
    if len(data) * 1.05 > zipfile.ZIP64_LIMIT:
        begins += _ZIP64_FIELD
    padding = -begins % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # the tag that torch itself uses for padding
    with archive.open(info, "w") as stream:
        stream.write(data)


def _pickled(array: NDArray, key: int) -> bytes:
    """A tensor over the storage `key`, opcode by opcode of protocol 2, as torch.save writes it."""
    dtype = _TORCH[array.dtype]
    strides, step = [0] * array.ndim, 1
    for axis in reversed(_by_stride(array)):
        strides[axis] = step
        step *= max(1, array.shape[axis])
    storage = _KINDS.get(dtype)
    rebuild, kind, length = (
        # Newer dtypes have no storage of their own; theirs is one of bytes, and the dtype comes after.
        (b"_rebuild_tensor_v3", b"ctorch.storage\nUntypedStorage\n", array.nbytes)
        if storage is None
        else (b"_rebuild_tensor_v2", f"ctorch\n{storage}\n".encode(), array.size)
    )
    out = b"ctorch._utils\n" + rebuild + b"\n((" + _text("storage") + kind + _text(str(key)) + _text("cpu")
    out += _int(length) + b"tQ" + _int(0) + _ints(array.shape) + _ints(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return out + (f"ctorch\n{dtype}\n".encode() if storage is None else b"") + b"tR"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    if 0 <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _ints(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"
