"""Zip archives that nobody vouches for."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Final

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
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")  # its signature; the lengths of the name and the extra field after it


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


class Window(io.RawIOBase):
    """A part of a file as a file of its own, read in any order.

    What zipfile opens reads all that lies before a place anew whenever it is set back.
    """

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        """See `length` bytes of `file` from `begin`."""
        self._file, self._begin, self._length, self._at = file, begin, length, 0

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
        """Go to a place, before the window's beginning excepted.

        Raises:
            ValueError: it is before the beginning.
        """
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError(f"place {at} is before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer, as far as the window goes."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(0, min(len(view), self._length - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def window(info: zipfile.ZipInfo, file: IO[bytes], source: Source) -> Window:
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
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        source.refuse(info.filename, "there is no member where the archive's directory says")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    begin = info.header_offset + _LOCAL_HEADER.size + name + extra
    if begin + info.file_size > source.size:
        source.refuse(info.filename, f"bytes {begin} to {begin + info.file_size} are not all in the file")
    return Window(file, begin, info.file_size)
