"""Equinox's `.eqx`: numpy arrays one after the other, without names. A template says what they are.

Without one the arrays are numbered in their order. Python scalars (`inference`, a flag of the state) are arrays of no
axes; bfloat16 is written by numpy as two bytes without a name, and is read as bfloat16 where the template says so.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from .checkpoint import Checkpoint, NDArray, Tensor
from .formats import Options
from .npy import read_data, read_header
from .source import Bounded, Source
from .writing import NUMBERS, any_name, refuse_unfit

_MOST: Final = 1_000_000


def read(path: Path, options: Options) -> Checkpoint:
    """Read every header in turn; `FormatModule.read`."""
    source = Source(path)
    found: list[tuple[int, np.dtype[Any], tuple[int, ...], bool]] = []
    with source.open() as file:
        stream = Bounded(file, source.size)
        while file.tell() < source.size:
            dtype, shape, fortran = _header(stream, f"{path}: array {len(found)}")
            length = prod(shape) * dtype.itemsize
            if file.tell() + length > source.size:
                source.refuse(f"array {len(found)}", f"{dtype} {shape} needs {length} bytes, and the file ends before")
            found.append((file.tell(), dtype, shape, fortran))
            file.seek(length, 1)
            if len(found) > _MOST:
                source.refuse("", f"it has more than {_MOST} arrays")
    names = _names(source, found, options.template)
    tensors = {name: _lazy(source, name, *entry) for name, entry in zip(names, found, strict=True)}
    return Checkpoint(
        "equinox",
        tensors,
        order_is_meaningful=True,
        path=path,
        metadata={"named": options.template is not None},
        layers=() if options.template is None else options.template.layers,
    )


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the arrays in the checkpoint's order, which is all that says what they are; `FormatModule.write`."""
    refuse_unfit(checkpoint, path, "an Equinox file", dtypes=NUMBERS | {np.dtype(ml_dtypes.bfloat16)}, problem=any_name)
    with path.open("xb") as file:
        for name in checkpoint.tensors:
            np.lib.format.write_array(file, checkpoint[name], allow_pickle=False)


def _header(stream: Bounded, place: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    dtype, shape, fortran = read_header(stream, place)
    return (np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype), shape, fortran


def _names(source: Source, found: list[Any], template: Checkpoint | None) -> list[str]:
    if template is None:
        return [str(index) for index in range(len(found))]
    if len(template) != len(found):
        source.refuse("", f"it has {len(found)} arrays, and the template {len(template)}")
    for (_, dtype, shape, _), (name, tensor) in zip(found, template.tensors.items(), strict=True):
        if shape != tensor.shape or dtype.newbyteorder("=") != tensor.dtype:
            source.refuse(name, f"it is {dtype} {shape}, and in the template {tensor.dtype} {tensor.shape}")
    return list(template)


def _lazy(
    source: Source, name: str, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool
) -> Tensor:
    def load() -> NDArray:
        place = f"{source.path}: {name}"
        return read_data(lambda length: source.read(offset, length, name), dtype, shape, fortran, place)

    return Tensor(dtype.newbyteorder("="), shape, load)
