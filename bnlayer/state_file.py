"""A `BatchNormState` as an `.npz` file, out and in: `BatchNormState.to_npz` and `from_npz`, which say what it holds."""

from __future__ import annotations

import dataclasses
import json
import struct
import tokenize
import zipfile
from pathlib import Path
from typing import IO, Any, Final

import ml_dtypes
import numpy as np

from .errors import FileError, StateError
from .spec import FLOAT_DTYPES
from .state import BatchNormState, checked_count

# What zipfile, numpy's header reader and json raise on damaged bytes; none of them promises one kind of error.
_DAMAGE: Final = (
    ValueError, TypeError, KeyError, EOFError, OSError, RuntimeError, MemoryError, SyntaxError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip


def write(state: BatchNormState[Any], path: str | Path) -> None:
    """Write a numpy state.

    Raises:
        StateError: an array is not a vector of a spec's dtype, or the counter is not a count; nothing is written.
        OSError: the file cannot be written.
    """
    members: dict[str, np.ndarray[Any, Any]] = {}
    dtypes: dict[str, str] = {}
    for name, array in state.arrays().items():
        values = np.asarray(array)
        if values.ndim != 1 or values.dtype.name not in FLOAT_DTYPES:
            wanted = f"of shape (num_features,) and one of {', '.join(FLOAT_DTYPES)}"
            raise StateError(f"{name} must be {wanted}; got {values.dtype.name} {values.shape}.")
        dtypes[name] = values.dtype.name
        members[name] = values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values
    if state.num_updates is not None:
        members["num_updates"] = np.asarray(checked_count(state.num_updates), np.int64)
    members["dtypes"] = np.array(json.dumps(dtypes))
    # numpy.savez has no allow_pickle=False in every numpy that is supported.
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in members.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, values, version=(1, 0), allow_pickle=False)


def read(path: str | Path) -> BatchNormState[np.ndarray[Any, Any]]:
    """Read what `write` wrote; the file is not trusted.

    Raises:
        FileError: the file is not such an `.npz`, or is damaged.
        OSError: the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            return _read_npz(file, path)
        except FileError:
            raise
        except _DAMAGE as error:
            why = f"{type(error).__name__}: {error}"
            raise FileError(f"{path}: not a batch norm state, or damaged ({why}).") from error


def _read_npz(file: IO[bytes], path: str | Path) -> BatchNormState[np.ndarray[Any, Any]]:
    known = [f.name for f in dataclasses.fields(BatchNormState)]
    with zipfile.ZipFile(file) as archive:
        members: dict[str, np.ndarray[Any, Any]] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name not in [*known, "dtypes"] or name in members:
                raise FileError(f"{path}: unexpected member {info.filename!r}; a state has {', '.join(known)}, dtypes.")
            if info.compress_type != zipfile.ZIP_STORED:  # to_npz never compresses; a bomb has to
                raise FileError(f"{path}: {info.filename!r} is compressed; a state is stored plain.")
            with archive.open(info) as stream:
                members[name] = _read_npy(stream, info.file_size, f"{path}: {info.filename}")
    described = members.pop("dtypes", None)
    if described is None or described.shape != () or described.dtype.kind != "U":
        raise FileError(f"{path}: the text 'dtypes' is missing; this is not a file of BatchNormState.to_npz.")
    # numpy's own way to a str ends in a SystemError where the bytes are no code points.
    dtypes = json.loads(described.tobytes().decode("utf-32").rstrip("\0"))
    counter = members.pop("num_updates", None)
    if counter is not None and (counter.shape != () or counter.dtype != np.int64):
        raise FileError(f"{path}: num_updates must be one int64; got {counter.dtype} {counter.shape}.")
    if not isinstance(dtypes, dict) or set(dtypes) != set(members):
        raise FileError(f"{path}: the member 'dtypes' must name each array; it names {dtypes!r}.")
    for name, dtype in dtypes.items():
        stored = members[name]
        if dtype == "bfloat16" and stored.dtype == np.uint16:
            members[name] = stored.view(ml_dtypes.bfloat16)
        elif stored.dtype.name != dtype:
            raise FileError(f"{path}: {name} is stored as {stored.dtype}, but 'dtypes' says {dtype!r}.")
    return BatchNormState(**members, num_updates=None if counter is None else int(counter))


def _read_npy(stream: Any, size: int, place: str) -> np.ndarray[Any, Any]:
    """One array, its declared size checked against the stored one before memory is taken."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise FileError(f"{place}: expected numpy's array format 1.0; got {version}.")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    header = stream.tell()
    declared = dtype.itemsize
    for length in shape:
        declared *= length
    if dtype.hasobject or len(shape) > 1:
        raise FileError(f"{place}: expected one number or a vector of them; got {dtype} {shape}.")
    if declared != size - header:
        raise FileError(f"{place}: {dtype} {shape} needs {declared} bytes; {size - header} are stored.")
    payload = stream.read(declared)
    if len(payload) != declared:
        raise FileError(f"{place}: truncated; {len(payload)} of {declared} bytes are there.")
    return np.frombuffer(payload, dtype).reshape(shape).astype(dtype.newbyteorder("="))
