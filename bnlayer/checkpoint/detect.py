"""Tell a format by content: magic numbers, and what an archive or a folder holds. Reads no tensor, trusts no suffix."""

from __future__ import annotations

import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

HEAD = 4096  # how much of a file's beginning is looked at
_TABLE_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")  # the last 8 bytes of a LevelDB table, as TensorFlow's index is


def members(path: Path, head: bytes) -> list[str]:
    """The names in a zip archive; none if it is no archive, or a damaged one."""
    if not head.startswith(b"PK\x03\x04"):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError):
        return []


def torch_zip(path: Path, head: bytes) -> bool:
    """torch.save since 1.6: a zip with `NAME/data.pkl`. Damaged ones too, as far as the first member's name shows."""
    return any(fnmatchcase(name, "*/data.pkl") or name == "data.pkl" for name in members(path, head)) or (
        head.startswith(b"PK\x03\x04") and b"/data.pkl" in head
    )


def torch_legacy(path: Path, head: bytes) -> bool:
    """torch.save before 1.6: a pickled magic number first."""
    return b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." in head[:32]


def keras_archive(path: Path, head: bytes) -> bool:
    """A `.keras` file: a zip with a config and weights."""
    return "config.json" in members(path, head)


def npz(path: Path, head: bytes) -> bool:
    """numpy.savez: a zip of `.npy` members."""
    names = members(path, head)
    return bool(names) and all(name.endswith(".npy") for name in names)


def hdf5(path: Path, head: bytes) -> bool:
    """HDF5's signature, at 0 or after a user block of 512 bytes or a power of two more."""
    return any(head[at:].startswith(b"\x89HDF\r\n\x1a\n") for at in (0, 512, 1024, 2048))


def safetensors(path: Path, head: bytes) -> bool:
    """A length of 8 bytes, then a JSON object."""
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**40


def safetensors_index(path: Path, head: bytes) -> bool:
    """The JSON index of a model that lies in several safetensors files."""
    return head.lstrip().startswith(b"{") and b'"weight_map"' in path.read_bytes()[: 2**26]


def numpy_stream(path: Path, head: bytes) -> bool:
    """Equinox's `.eqx`: arrays in numpy's format one after the other."""
    return head.startswith(b"\x93NUMPY")


def pickled(path: Path, head: bytes) -> bool:
    """A pickle of protocol 2 or later, as haiku's parameters are usually kept."""
    return len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def msgpack_map(path: Path, head: bytes) -> bool:
    """A msgpack map whose first key is text, as flax writes it."""
    if len(head) < 2:
        return False
    first, rest = head[0], head[1:]
    if 0x81 <= first <= 0x8F:
        pass
    elif first in (0xDE, 0xDF):
        rest = head[3 if first == 0xDE else 5 :]
    else:
        return False
    return bool(rest) and (0xA0 <= rest[0] <= 0xBF or rest[0] in (0xD9, 0xDA, 0xDB))


def onnx(path: Path, head: bytes) -> bool:
    """A protobuf message whose first field is a small number (ONNX's ir_version), then the producer or the graph."""
    return (
        len(head) > 4
        and head[0] == 0x08
        and 0 < head[1] < 0x40
        and head[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
    )


def tensorflow_index(path: Path, head: bytes) -> bool:
    """A TensorFlow checkpoint: its `.index` file, the name before that, or a folder with a `checkpoint` file."""
    if path.is_dir():
        return (path / "checkpoint").is_file()
    if not head:
        return path.with_name(path.name + ".index").is_file()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        return file.read(8) == _TABLE_MAGIC


def saved_model(path: Path, head: bytes) -> bool:
    """A SavedModel: a folder with the graph and the variables."""
    return path.is_dir() and (path / "saved_model.pb").is_file()


def orbax(path: Path, head: bytes) -> bool:
    """Orbax: a folder with its metadata, or the folder of a CheckpointManager with numbered steps."""
    if not path.is_dir():
        return False
    if any((path / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")):
        return True
    return any(entry.name.isdigit() and entry.is_dir() for entry in path.iterdir())
