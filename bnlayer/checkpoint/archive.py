"""Zip archives that nobody vouches for."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from ..errors import CheckpointError
from .source import Source, fill

_MOST_MEMBERS: Final = 1_000_000
_DAMAGE: Final = (
    zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error, zlib.error,
    OSError,  # a place before the beginning, to which no file can be set
)  # fmt: skip
# What is stored in so much less room than it declares is a bomb, where it is large enough to do harm.
_SMALL: Final = 64 * 2**20
_RATIO: Final = 100
_UTF8: Final = 0x800  # the flag of a member whose name is in it
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")  # its signature; the lengths of the name and the extra field after it


@contextmanager
def opened(source: Source) -> Iterator[zipfile.ZipFile]:
    """The archive, its damage told as a CheckpointError; with `damage_told` it can be read later too.

    Its directory is read once, and its file is open only while something is read.
    """
    with damage_told(source):
        yield zipfile.ZipFile(_Reopened(source))


@contextmanager
def damage_told(source: Source) -> Iterator[None]:
    """What zipfile raises, as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGE as error:
        cause = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source.path}: the zip archive is damaged ({cause}).") from error


class _Placed(io.RawIOBase):
    """What a file that is read in any order needs beside reading: where it stands in so many bytes."""

    def __init__(self, length: int) -> None:
        self._length, self._at = length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where it stands."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place, before the beginning excepted.

        Raises:
            ValueError: it is before the beginning.
        """
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError(f"place {at} is before the beginning")
        self._at = at
        return at


class _Reopened(_Placed):
    """A source as a file, opened anew for each piece that is read."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.size)
        self._source = source

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes."""
        left = max(0, self._length - self._at)
        with self._source.open() as file:
            file.seek(self._at)
            data = file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


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


class Window(_Placed):
    """A part of a file as a file of its own, read in any order.

    What zipfile opens reads all that lies before a place anew whenever it is set back.
    """

    def __init__(self, file: io.BufferedReader, begin: int, length: int) -> None:
        """See `length` bytes of `file` from `begin`."""
        super().__init__(length)
        self._file, self._begin = file, begin

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer, as far as the window goes."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._begin + self._at)
        length = self._file.readinto(view[: max(0, self._length - self._at)])
        self._at += length
        return length


def window(info: zipfile.ZipInfo, file: io.BufferedReader, source: Source) -> Window:
    """A member that is stored uncompressed, to be read here and there.

    Args:
        info: the member.
        file: the archive's file, open.
        source: the same file.

    Raises:
        CheckpointError: it does not lie in the file, or is compressed.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        source.refuse(info.filename, "it is compressed, or its two sizes differ")
    if not 0 <= info.header_offset <= source.size:
        source.refuse(info.filename, f"it is said to begin at {info.header_offset}, and the file has {source.size}")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        source.refuse(info.filename, "there is no member where the archive's directory says")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    if file.read(name).decode("utf-8" if info.flag_bits & _UTF8 else "cp437", "replace") != info.orig_filename:
        source.refuse(info.filename, "the archive's directory and the member itself name it differently")
    begin = info.header_offset + _LOCAL_HEADER.size + name + extra
    if begin + info.file_size > source.size:
        source.refuse(info.filename, f"bytes {begin} to {begin + info.file_size} are not all in the file")
    return Window(file, begin, info.file_size)


def stored(info: zipfile.ZipInfo, source: Source, length: int | None = None) -> bytearray:
    """A member that is stored uncompressed, or its first bytes.

    A whole one is held against its CRC-32. Of that torch writes 0 where it was told not to compute any.

    Raises:
        CheckpointError: it does not lie in the file, is compressed, or is damaged.
    """
    data = bytearray(info.file_size if length is None else length)
    with source.open() as file:
        found = fill(window(info, file, source), data)
    if found != len(data):
        source.refuse(info.filename, f"{len(data)} bytes were expected, and {found} could be read")
    if info.CRC and len(data) == info.file_size and zlib.crc32(data) != info.CRC:
        source.refuse(info.filename, "its bytes do not fit its CRC-32: the zip archive is damaged")
    return data
