"""torch.save's files since torch 1.6: a zip of one pickle (`NAME/data.pkl`) and one member a storage (`NAME/data/KEY`).

Read without torch, and without running anything; written so that torch.load(weights_only=True) takes it.
"""

from __future__ import annotations

import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import CheckpointError
from .archive import members, opened
from .checkpoint import Checkpoint
from .formats import Options
from .pickles import Reader
from .source import Source
from .torch_objects import DTYPES, STORAGES, checkpoint_of

_ALIGNMENT: Final = 64  # of a storage in the file, as torch writes it, so that it can be mapped


def read(path: Path, options: Options) -> Checkpoint:
    """Read the pickle; storages when a tensor is asked for. `FormatModule.read`."""
    source = Source(path)
    with opened(source) as archive:
        inside = members(archive, source, plain=True)
        pickle = next((name for name in inside if name.rsplit("/", 1)[-1] == "data.pkl"), None)
        if pickle is None:
            source.refuse("", "it has no data.pkl, so it is not a file of torch.save")
        folder = pickle.removesuffix("data.pkl")
        order = archive.read(inside[f"{folder}byteorder"]) if f"{folder}byteorder" in inside else b"little"
        if order != b"little":
            source.refuse("byteorder", f"it is {order[:20]!r}; only little-endian files are read")
        if any(name.startswith(f"{folder}code/") for name in inside):
            source.refuse("", "it is a TorchScript program; save its state_dict() instead")
        root = Reader(f"{path}: {pickle}").run(BytesIO(archive.read(inside[pickle])))

    def sizes(key: str) -> int | None:
        member = inside.get(f"{folder}data/{key}")
        return None if member is None else member.file_size

    def storage(key: str, length: int, place: str) -> bytes:
        with opened(source) as archive, archive.open(inside[f"{folder}data/{key}"]) as stream:
            data = stream.read(length)
        if len(data) != length:
            raise CheckpointError(f"{place}: {length} bytes were expected, and {len(data)} could be read.")
        return data

    return checkpoint_of(root, path, "torch", options, sizes, storage)


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
