"""Read from files that nobody vouches for: every length is checked against what is there before memory is taken."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, NoReturn, Protocol

import numpy as np

from ..errors import CheckpointError

NDArray = np.ndarray[Any, np.dtype[Any]]
_PIECE: Final = 2**20  # bytes read at a time, so that a large array is in memory once


class Source:
    """One regular file, read in pieces. It is opened for each piece, and must stay the file that it was.

    Attributes:
        path: the file.
        size: its length in bytes.
    """

    def __init__(self, path: str | Path) -> None:
        """Look at the file.

        Raises:
            CheckpointError: it is not a regular file.
            OSError: there is none, or it cannot be looked at.
        """
        self.path = Path(path)
        # A pipe or a device would block or never end, so it is not even opened.
        found = self.path.stat()
        if not stat.S_ISREG(found.st_mode):
            self.refuse("", "it is not a regular file")
        self.size = found.st_size
        self._identity = _identity(found)

    def read(self, offset: int, length: int, place: str) -> bytes:
        """`length` bytes from `offset`; `place` says what they are, for the error.

        Raises:
            CheckpointError: they are not all there.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            self.refuse(place, f"bytes {offset} to {offset + length} are asked for, and the file has {self.size}")
        with self.open() as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            self.refuse(place, f"{length} bytes were expected, and {len(data)} could be read")
        return data

    def array(self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], place: str) -> NDArray:
        """The array that lies at `offset` in C order and native byte order; no second copy of it is made.

        Raises:
            CheckpointError: it is not all there.
        """
        length = prod(shape) * dtype.itemsize
        if offset < 0 or offset + length > self.size:
            self.refuse(place, f"bytes {offset} to {offset + length} are asked for, and the file has {self.size}")
        array = np.empty(shape, dtype)
        with self.open() as file:
            file.seek(offset)
            if fill(file, array.reshape(-1).view(np.uint8).data) != length:
                self.refuse(place, f"{length} bytes were expected, and fewer could be read")
        return array

    def head(self, length: int) -> bytes:
        """Up to `length` bytes from the beginning."""
        return self.read(0, min(length, self.size), "beginning")

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """The file, for a library that wants to read by itself.

        Raises:
            CheckpointError: it is another file than when this was made, so what was learned of it no longer holds.
        """
        with self.path.open("rb") as file:
            if _identity(os.fstat(file.fileno())) != self._identity:
                self.refuse("", "it was changed or replaced while it was being read; open it again")
            yield file

    def refuse(self, place: str, cause: str) -> NoReturn:
        """Raise.

        Raises:
            CheckpointError: with the file, the place and the cause.
        """
        raise CheckpointError(f"{self.path}: {place}: {cause}." if place else f"{self.path}: {cause}.")


class Stream(Protocol):
    """What reading needs of a file."""

    def read(self, length: int = ..., /) -> bytes:
        """Up to `length` bytes."""
        ...

    def readline(self) -> bytes:
        """Up to the end of the line."""
        ...


class Bounded:
    """A stream that reads no more than what is left of its file, however much is asked for.

    Python takes memory for as many bytes as it is asked to read, before it finds that they are not there.
    """

    def __init__(self, stream: IO[bytes], end: int) -> None:
        """Read `stream` from where it stands, up to `end`."""
        self._stream, self._end = stream, end

    def tell(self) -> int:
        """Where it stands."""
        return self._stream.tell()

    def read(self, length: int = -1) -> bytes:
        """Up to `length` bytes."""
        left = max(0, self._end - self._stream.tell())
        return self._stream.read(left if length < 0 else min(length, left))

    def readline(self) -> bytes:
        """Up to the end of the line."""
        return self._stream.readline(max(0, self._end - self._stream.tell()))


def fill(stream: io.BufferedReader | io.RawIOBase, buffer: memoryview | bytearray) -> int:
    """Read into a buffer piece by piece; how many bytes there were."""
    view, at = memoryview(buffer), 0
    while at < len(view):
        length = stream.readinto(view[at : at + _PIECE])
        if not length:
            break
        at += length
    return at


def sibling(path: Path, name: str, place: str) -> Path:
    """The file of this name beside `path`, where a file's own content names another.

    Raises:
        CheckpointError: the name leaves the folder, or what it names is a link that does.
    """
    plain = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or len(plain.parts) != 1 or plain.parts[0] in ("/", "..", "."):
        raise CheckpointError(f"{path}: {place}: names the file {name!r}, which is not a plain name beside it.")
    found = path.parent / name
    if found.resolve().parent != path.parent.resolve():
        raise CheckpointError(f"{path}: {place}: names {name!r}, which links to another folder.")
    return found


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
