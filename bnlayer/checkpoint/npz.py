"""numpy.savez's archives: one `.npy` member an array.

bfloat16 is kept as in `BatchNormState.to_npz`: its bits, and its name in the member `dtypes`.
"""

from __future__ import annotations

import json
import zipfile
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .archive import damage_told, members, opened
from .checkpoint import Checkpoint, NDArray, Tensor
from .formats import Options
from .npy import read_data, read_header
from .source import Source
from .strict import strict_json
from .writing import NUMBERS, plain, refuse_unfit

# What numpy's format cannot name, with the unsigned integers of the same size.
_BITS: Final[dict[str, tuple[np.dtype[Any], np.dtype[Any]]]] = {
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), np.dtype(np.uint16)),
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint8)),
    "float8_e5m2": (np.dtype(ml_dtypes.float8_e5m2), np.dtype(np.uint8)),
}
_DTYPES: Final = "dtypes"
_LONGEST_TEXT: Final = 2**26


def read(path: Path, options: Options) -> Checkpoint:
    """Read every header; arrays when they are asked for. `FormatModule.read`."""
    source = Source(path)
    headers: dict[str, tuple[np.dtype[Any], tuple[int, ...], zipfile.ZipInfo]] = {}
    texts: dict[str, str] = {}
    with opened(source) as archive:
        for filename, info in members(archive, source, plain=False).items():
            if not filename.endswith(".npy"):
                source.refuse(filename, "it is no .npy member, so the file is no npz")
            name, place = filename.removesuffix(".npy"), f"{path}: {filename}"
            with archive.open(info) as stream:
                dtype, shape, _ = read_header(stream, place)
                if stream.tell() + prod(shape) * dtype.itemsize != info.file_size:
                    source.refuse(filename, f"{dtype} {shape} does not fit its {info.file_size} bytes")
                if dtype.kind == "U":
                    if info.file_size > _LONGEST_TEXT:
                        source.refuse(filename, "the text is too long")
                    texts[name] = _text(stream.read(), place)
                elif dtype.kind not in "biufc":
                    source.refuse(filename, f"its dtype {dtype} is not one of numbers")
                else:
                    headers[name] = dtype.newbyteorder("="), shape, info
    named = _named(texts.pop(_DTYPES, None), path)
    tensors = {
        name: _lazy(archive, source, info, name, dtype, shape, named.get(name))
        for name, (dtype, shape, info) in headers.items()
    }
    return Checkpoint("npz", tensors, order_is_meaningful=True, path=path, metadata=texts)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write every tensor, and the texts of a checkpoint that was an npz; `FormatModule.write`."""
    named = {name: t.dtype.name for name, t in checkpoint.tensors.items() if t.dtype.name in _BITS}
    texts = dict(checkpoint.metadata) if checkpoint.format == "npz" else {}
    if named:
        texts[_DTYPES] = json.dumps(named)

    def problem(name: str) -> str | None:
        return "is that of one of the file's texts" if name in texts else plain(name)

    refuse_unfit(checkpoint, path, "an npz", dtypes=NUMBERS | dict(_BITS.values()).keys(), problem=problem)
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in checkpoint.tensors:
            _add(archive, name, checkpoint[name], _BITS[named[name]][1] if name in named else None)
        for name, text in texts.items():
            _add(archive, name, np.array(text))


def _add(archive: zipfile.ZipFile, name: str, array: NDArray, as_bits: np.dtype[Any] | None = None) -> None:
    info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
    with archive.open(info, "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, array if as_bits is None else array.view(as_bits), allow_pickle=False)


def _lazy(
    archive: zipfile.ZipFile,
    source: Source,
    info: zipfile.ZipInfo,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    named: str | None,
) -> Tensor:
    place = f"{source.path}: {name}"
    if named is not None and (named not in _BITS or _BITS[named][1] != dtype):
        source.refuse(name, f"it is stored as {dtype}, and said to be {named!r}")

    def load() -> NDArray:
        with damage_told(source), archive.open(info) as stream:
            array = read_data(stream.read, *read_header(stream, place), place)
        return array if named is None else array.view(_BITS[named][0])

    return Tensor(dtype if named is None else _BITS[named][0], shape, load)


def _named(text: str | None, path: Path) -> dict[str, str]:
    if text is None:
        return {}
    found = strict_json(text, f"{path}: {_DTYPES}")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{path}: {_DTYPES}: a JSON object of dtypes' names was expected.")
    return {name: dtype for name, dtype in found.items() if dtype in _BITS}


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-32-le").rstrip("\0")
    except UnicodeError as error:
        raise CheckpointError(f"{place}: it is no text ({error}).") from error
