"""What the writers share: what a format cannot hold is refused by name, never changed to fit; and an array's bytes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import CheckpointError
from .checkpoint import Checkpoint, NDArray
from .flatten import DEEPEST

Problem = Callable[[str], str | None]
NUMBERS: Final = frozenset(np.dtype(code) for code in "?bBhHiIlLqQefdFD")  # what numpy alone names
LONGEST_NAME: Final = 2**14  # bytes; readers refuse longer ones


def refuse_unfit(
    checkpoint: Checkpoint,
    path: Path,
    format: str,
    *,
    dtypes: Container[np.dtype[Any]],
    problem: Problem,
    others: Iterable[str] = (),
) -> None:
    """Check every tensor before the first is written.

    Args:
        checkpoint: what is to be written.
        path: where to, for the message.
        format: what the format is called in it.
        dtypes: those that the format has.
        problem: why a name cannot be one of the format's, or None.
        others: names of what is written beside the tensors.

    Raises:
        CheckpointError: a tensor's name or dtype does not fit.
    """
    for name in [*checkpoint.tensors, *others]:
        why = _unwritable(name) or problem(name)
        if why is not None:
            raise CheckpointError(f"{path}: the name {name[:200]!r} {why}, so {format} cannot hold it; rename it.")
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype.name}, which {format} cannot hold; convert it.")


def _unwritable(name: str) -> str | None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "is no text that UTF-8 can write"
    return f"has {length} bytes" if length > LONGEST_NAME else None


def any_name(name: str) -> str | None:
    """The problem of formats that hold every name."""
    return None


def plain(name: str) -> str | None:
    """The problem of formats whose names are not empty and end at a NUL."""
    if not name:
        return "is empty"
    return "has a NUL in it" if "\0" in name else None


def nested(names: Iterable[str]) -> Problem:
    """The problem of formats that make folders of a name's parts, which slashes separate.

    Args:
        names: all of them, none of which may be the folder of another.
    """
    folders: set[str] = set()
    for name in names:
        parts = name.split("/")
        if len(parts) < DEEPEST:  # deeper ones are refused anyway
            folders.update("/".join(parts[:i]) for i in range(1, len(parts)))

    def problem(name: str) -> str | None:
        parts = name.split("/")
        if len(parts) >= DEEPEST:
            return f"has {len(parts)} parts"
        if not all(parts) or "." in parts or ".." in parts:
            return "has a part that is empty, or a dot or two"
        return "is also the folder of other tensors" if name in folders else plain(name)

    return problem


def bytes_of(array: NDArray) -> memoryview:
    """The elements' bytes in C order; the array's own memory where it lies so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
