"""Zip archives that nobody vouches for."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ..errors import CheckpointError
from .source import Source

_MOST_MEMBERS: Final = 1_000_000
_DAMAGE: Final = (
    zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error, zlib.error,
    OSError,  # a place before the beginning, to which no file can be set
)  # fmt: skip
# What is stored in so much less room than it declares is a bomb, where it is large enough to do harm.
_SMALL: Final = 64 * 2**20
_RATIO: Final = 100


@contextmanager
def opened(source: Source) -> Iterator[zipfile.ZipFile]:
    """The archive, its damage told as a CheckpointError."""
    with source.open() as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except CheckpointError:
            raise
        except _DAMAGE as error:
            cause = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{source.path}: the zip archive is damaged ({cause}).") from error


def members(archive: zipfile.ZipFile, source: Source, *, plain: bool) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by name.

    Args:
        archive: an open one.
        source: its file.
        plain: whether members must be stored uncompressed.

    Raises:
        CheckpointError: a member is there twice, is encrypted, lies outside of the file, or is a bomb.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.filename in found:
            source.refuse(info.filename, "the archive has this member twice")
        if info.flag_bits & 1:
            source.refuse(info.filename, "it is encrypted")
        if plain and (info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size):
            source.refuse(info.filename, "it is compressed; members of this format are stored plain")
        if info.compress_size > source.size:
            source.refuse(info.filename, f"{info.compress_size} bytes are declared, and the file has {source.size}")
        if is_bomb(info.file_size, info.compress_size):
            source.refuse(info.filename, f"{info.compress_size} bytes would become {info.file_size}")
        found[info.filename] = info
        if len(found) > _MOST_MEMBERS:
            source.refuse("", f"the archive has more than {_MOST_MEMBERS} members")
    return found


def is_bomb(declared: int, stored: int) -> bool:
    """Whether so many bytes in so little room are to be refused."""
    return declared > _SMALL and declared > _RATIO * stored


def whole(archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: Source, most: int = _SMALL) -> bytes:
    """A member that is read whole.

    Raises:
        CheckpointError: it is larger than `most`, or than it says.
    """
    if info.file_size > most:
        source.refuse(info.filename, f"it has {info.file_size} bytes; at most {most} were expected")
    with archive.open(info) as stream:
        data = stream.read(most + 1)
    if len(data) != info.file_size:
        source.refuse(info.filename, f"it has {len(data)} bytes, and declares {info.file_size}")
    return data
