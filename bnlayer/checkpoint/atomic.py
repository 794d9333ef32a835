"""Write a file, or a folder of files, whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError


@contextmanager
def replacing(path: Path, *, force: bool) -> Iterator[Path]:
    """A new path beside `path` to write to; when the block ends well, it takes `path`'s place.

    The new file (or every file of a new folder) is flushed to the disk before it is renamed, and the folder that holds
    the name after. Killed at any moment, `path` is the old one or the new one; at worst a folder `.NAME.*.writing`
    stays beside it. Where a folder is replaced (`force`), Linux exchanges the two in one step. Elsewhere the old one is
    moved into `.NAME.*.writing` first: killed right then, it lies there, whole.

    Raises:
        CheckpointError: `path` is there and `force` is False, or is a folder where a file is written or the reverse.
        OSError: as the disk says; `path` is as it was.
    """
    path = path.resolve() if path.is_symlink() else path  # the link stays, what it names is replaced
    if path.exists() and not force:
        raise CheckpointError(f"{path}: it is there already; give force=True (--force) to replace it.")
    room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".writing", dir=path.parent))
    new = room / path.name
    try:
        yield new
        if path.exists() and path.is_dir() != new.is_dir():
            raise CheckpointError(f"{path}: a {_kind(path)} is there, and a {_kind(new)} would take its place.")
        for file in [new, *new.rglob("*")] if new.is_dir() else [new]:
            _flush(file)
        if path.exists():
            shutil.copymode(path, new)
        else:
            new.chmod((0o777 if new.is_dir() else 0o666) & ~_umask())
        if new.is_dir() and path.exists():
            _exchange(new, path)
        else:
            new.replace(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextmanager
def replacing_files(last: Path, *, force: bool) -> Iterator[Path]:
    """A new folder to write several files into, `last` among them; when the block ends well, they move beside it.

    `last` moves after the others, and is what makes them a checkpoint: their names must be new ones, so that the older
    files, which the older `last` tells of, stay whole until then.

    Raises:
        CheckpointError: `last` is there and `force` is False, or is a folder.
        OSError: as the disk says; what was there is as it was.
    """
    if last.exists() and not force:
        raise CheckpointError(f"{last}: it is there already; give force=True (--force) to replace it.")
    if last.is_dir():
        raise CheckpointError(f"{last}: a folder is there, and a file would take its place.")
    room = Path(tempfile.mkdtemp(prefix=f".{last.name}.", suffix=".writing", dir=last.parent))
    placed: list[Path] = []
    try:
        yield room
        for file in sorted(room.iterdir(), key=lambda file: file.name == last.name):
            file.chmod(0o666 & ~_umask())
            _flush(file)
            if file.name == last.name:
                _flush(last.parent)
            placed.append(file.replace(last.with_name(file.name)))
    except BaseException:
        for file in placed:
            file.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(room, ignore_errors=True)
    _flush(last.parent)


def _exchange(new: Path, path: Path) -> None:
    """Put the folder `new` in the place of `path`, and `path` in its own."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
        if hasattr(libc, "renameat2") and libc.renameat2(here, bytes(new), here, bytes(path), exchange) == 0:
            return  # where the file system cannot, the two moves below can
    old = new.with_name(f"{path.name}.replaced")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # there a folder cannot be opened, and renames are written through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o077)  # the only way to ask is to set
    os.umask(mask)
    return mask


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"
