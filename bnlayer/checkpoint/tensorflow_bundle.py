"""TensorFlow's checkpoints (Saver V2 and object-based): `NAME.index`, a LevelDB table of what is where, and
`NAME.data-0000K-of-0000N`, the tensors' bytes.

Names are TensorFlow's: `bn/gamma` of TensorFlow 1, `layer/gamma/.ATTRIBUTES/VARIABLE_VALUE` of objects. Where the
object graph knows a variable's full name, `metadata["full_names"]` has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Final

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from . import leveldb, protobuf
from .atomic import replacing, replacing_files
from .checkpoint import Checkpoint, NDArray, Tensor
from .crc32c import crc32c, masked
from .formats import Options
from .protobuf import BYTES, FIXED32, VARINT
from .source import Source
from .tensorflow_objects import full_names, object_graph
from .writing import bytes_of, plain, refuse_unfit

# tensorflow/core/framework/types.proto
_DTYPES: Final[Mapping[int, np.dtype[Any]]] = {
    1: np.dtype(np.float32), 2: np.dtype(np.float64), 3: np.dtype(np.int32), 4: np.dtype(np.uint8),
    5: np.dtype(np.int16), 6: np.dtype(np.int8), 8: np.dtype(np.complex64), 9: np.dtype(np.int64),
    10: np.dtype(np.bool_), 14: np.dtype(ml_dtypes.bfloat16), 17: np.dtype(np.uint16), 18: np.dtype(np.complex128),
    19: np.dtype(np.float16), 22: np.dtype(np.uint32), 23: np.dtype(np.uint64),
}  # fmt: skip
_NUMBERS: Final = {dtype: number for number, dtype in _DTYPES.items()}
_STRING: Final = 7
_GRAPH: Final = "_CHECKPOINTABLE_OBJECT_GRAPH"
_CHECKED: Final = 2**24  # bytes up to which a tensor's checksum is verified when it is read
_LARGEST_GRAPH: Final = 2**26


@dataclass(frozen=True)
class Entry:
    """One tensor's place: BundleEntryProto of tensorflow/core/protobuf/tensor_bundle.proto."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    slices: bool


def read(path: Path, options: Options) -> Checkpoint:
    """Read the index; tensors when they are asked for. `FormatModule.read`."""
    return read_bundle(_prefix(path), "tensorflow")


def read_bundle(prefix: Path, format: str) -> Checkpoint:
    """The checkpoint `PREFIX.index`, `PREFIX.data-...`.

    Raises:
        CheckpointError: it is damaged, or its data files are not all there.
    """
    source = Source(prefix.with_name(prefix.name + ".index"))
    shards: list[Source] = []
    entries: dict[str, Entry] = {}
    for key, value in leveldb.read(source):
        if not key:
            shards = _shards(prefix, value, source)
            continue
        name = key.decode("utf-8", "backslashreplace")
        entries[name] = _entry(value, f"{source.path}: {name[:200]}")
    if not shards:
        source.refuse("", "it has no header")
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        place = f"{source.path}: {name[:200]}"
        _check(entry, shards, place)
        if entry.slices:
            raise CheckpointError(f"{place}: it lies in slices (a partitioned variable), which are not joined here.")
        if entry.dtype in _DTYPES:
            tensors[name] = _lazy(shards[entry.shard], name, entry)
    metadata: dict[str, Any] = {}
    if _GRAPH in entries:
        metadata["full_names"] = _full_names(entries[_GRAPH], shards, f"{source.path}: {_GRAPH}")
    return Checkpoint(format, tensors, order_is_meaningful=False, path=prefix, metadata=metadata)


def save(checkpoint: Checkpoint, path: Path, *, force: bool) -> None:
    """Write by a prefix, as TensorFlow names a checkpoint, or into a folder; whole or not at all.

    A path with `.ckpt` in its name, or that ends in `.index`, is a prefix: `net.ckpt` becomes `net.ckpt.index` and
    `net.ckpt.data-...` in the same folder. Any other becomes a folder with `model.ckpt.*` and the file `checkpoint`, by
    which `tf.train.latest_checkpoint` finds it.

    Raises:
        CheckpointError: something there already and not `force`, or the format cannot hold a tensor.
        OSError: as the disk says; what was there is as it was.
    """
    if ".ckpt" not in path.name and path.suffix != ".index":
        with replacing(path, force=force) as new:
            write(checkpoint, new)
        return
    prefix = path.with_name(path.name.removesuffix(".index"))
    pattern = re.compile(re.escape(prefix.name) + r"\.data-\d{5}-of-(\d{5})")
    old = [(p, match[1]) for p in prefix.parent.iterdir() if (match := pattern.fullmatch(p.name))]
    # The index says how many data files there are, and their names say so too: with another count than the old ones
    # they do not touch those, and the new index, one file, is what replaces them.
    count = next(n for n in range(1, len(old) + 2) if f"{n:05d}" not in {was for _, was in old})
    with replacing_files(prefix.with_name(f"{prefix.name}.index"), force=force) as room:
        _write(checkpoint, room / prefix.name, count, path)
    for file, _ in old:
        file.unlink(missing_ok=True)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write into the folder `path`; `FormatModule.write`."""
    path.mkdir()
    _write(checkpoint, path / "model.ckpt", 1, path)
    (path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n')


def _write(checkpoint: Checkpoint, prefix: Path, count: int, place: Path) -> None:
    """`PREFIX.index` and `count` data files, of which the first has everything."""
    refuse_unfit(checkpoint, place, "a TensorFlow checkpoint", dtypes=_NUMBERS, problem=_problem)
    header = protobuf.encode([(1, VARINT, count), (3, BYTES, protobuf.encode([(1, VARINT, 1)]))])
    entries, offset = [(b"", header)], 0
    graph = object_graph(checkpoint.tensors, checkpoint.metadata.get("full_names", {}))
    names: list[str] = [*checkpoint.tensors, *([_GRAPH] if graph else [])]
    with _shard(prefix, 0, count).open("xb") as file:
        for name in sorted(names, key=lambda name: name.encode()):
            shape: tuple[int, ...] = ()
            if name == _GRAPH:
                dtype, (raw, crc) = _STRING, _string(graph)
                length = file.write(raw)
            else:
                dtype, shape = _NUMBERS[checkpoint.tensors[name].dtype], checkpoint.tensors[name].shape
                length, crc = _append(file, checkpoint[name])
            sizes = protobuf.encode((2, BYTES, protobuf.encode([(1, VARINT, n)])) for n in shape)
            fields = [(1, VARINT, dtype), (2, BYTES, sizes), (4, VARINT, offset), (5, VARINT, length),
                      (6, FIXED32, masked(crc))]  # fmt: skip
            entries.append((name.encode(), protobuf.encode(fields)))
            offset += length
    for empty in range(1, count):
        _shard(prefix, empty, count).touch()
    prefix.with_name(f"{prefix.name}.index").write_bytes(leveldb.write(entries))


def _append(file: IO[bytes], array: NDArray) -> tuple[int, int]:
    """Write an array; its length in bytes, and its checksum."""
    raw = bytes_of(array)
    return file.write(raw), crc32c(raw)


def _problem(name: str) -> str | None:
    return "is that of the graph of objects" if name == _GRAPH else plain(name)


def _string(data: bytes) -> tuple[bytes, int]:
    """A text as a tensor's bytes: its length, the length's checksum, the text; and the checksum of it all."""
    length = len(data).to_bytes(4, "little")
    check = masked(crc32c(length)).to_bytes(4, "little")
    return protobuf.encode_varint(len(data)) + check + data, crc32c(length + check + data)


def _shard(prefix: Path, number: int, count: int) -> Path:
    return prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{count:05d}")


def _prefix(path: Path) -> Path:
    """The name that the files of a checkpoint share, from the index, the name itself, or a folder."""
    if path.is_dir():
        indexes = sorted(path.glob("*.index"))
        if len(indexes) != 1:
            found = ", ".join(p.name for p in indexes) or "none"
            raise CheckpointError(f"{path}: one .index file was expected in the folder; there is {found}. Name one.")
        path = indexes[0]
    return path.with_name(path.name.removesuffix(".index"))


def _shards(prefix: Path, header: bytes, source: Source) -> list[Source]:
    place, count, big = f"{source.path}: header", 0, False
    for number, value in protobuf.fields(header, place):
        if number == 1:
            count = protobuf.integer(value, place)
        elif number == 2:
            big = protobuf.integer(value, place) != 0
    if big:
        source.refuse("header", "it is big-endian; only little-endian files are read")
    if not 1 <= count <= 100_000:
        source.refuse("header", f"it says that there are {count} data files")
    paths = [_shard(prefix, k, count) for k in range(count)]
    missing = next((p for p in paths if not p.is_file()), None)
    if missing is not None:
        source.refuse("header", f"the data file {missing.name} is not beside it")
    return [Source(p) for p in paths]


def _entry(value: bytes, place: str) -> Entry:
    dtype = shard = offset = size = crc = 0
    shape: tuple[int, ...] = ()
    slices = False
    for number, field in protobuf.fields(value, place):
        if number == 1:
            dtype = protobuf.integer(field, place)
        elif number == 2:
            shape = _shape(protobuf.message(field, place), place)
        elif number == 3:
            shard = protobuf.integer(field, place)
        elif number == 4:
            offset = protobuf.integer(field, place)
        elif number == 5:
            size = protobuf.integer(field, place)
        elif number == 6:
            crc = protobuf.integer(field, place)
        elif number == 7:
            slices = True
    return Entry(dtype, shape, shard, offset, size, crc, slices)


def _shape(value: bytes, place: str) -> tuple[int, ...]:
    shape = []
    for number, dim in protobuf.fields(value, place):
        if number == 2:
            sizes = [
                protobuf.signed(v, place) for n, v in protobuf.fields(protobuf.message(dim, place), place) if n == 1
            ]
            shape.append(sizes[-1] if sizes else 0)
    if any(n < 0 for n in shape) or len(shape) > 254:
        raise CheckpointError(f"{place}: its shape {shape[:10]} makes no sense.")
    return tuple(shape)


def _check(entry: Entry, shards: list[Source], place: str) -> None:
    if entry.shard >= len(shards):
        raise CheckpointError(f"{place}: it is in data file {entry.shard}, and there are {len(shards)}.")
    if entry.slices:
        return
    if entry.offset + entry.size > shards[entry.shard].size:
        raise CheckpointError(
            f"{place}: {entry.size} bytes at {entry.offset} are declared, and the data file has"
            f" {shards[entry.shard].size}."
        )
    if entry.dtype in _DTYPES and prod(entry.shape) * _DTYPES[entry.dtype].itemsize != entry.size:
        raise CheckpointError(f"{place}: {_DTYPES[entry.dtype]} {entry.shape} does not fit its {entry.size} bytes.")


def _lazy(source: Source, name: str, entry: Entry) -> Tensor:
    dtype = _DTYPES[entry.dtype]

    def load() -> NDArray:
        array = source.array(entry.offset, dtype, entry.shape, name)
        if array.nbytes <= _CHECKED and masked(crc32c(bytes_of(array))) != entry.crc:
            source.refuse(name, "its checksum is wrong: the data was damaged")
        return array

    return Tensor(dtype, entry.shape, load)


def _full_names(entry: Entry, shards: list[Source], place: str) -> dict[str, str]:
    if entry.dtype != _STRING or entry.shape != () or entry.size > _LARGEST_GRAPH:
        raise CheckpointError(f"{place}: the object graph is no text, or too long.")
    data = shards[entry.shard].read(entry.offset, entry.size, _GRAPH)
    length, at = protobuf.varint(data, 0, place)
    at += 4  # the checksum of the lengths
    if at + length != len(data):
        raise CheckpointError(f"{place}: the object graph's length is wrong.")
    return full_names(data[at:], place)
