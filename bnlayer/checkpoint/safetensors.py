"""safetensors: 8 bytes of header length, a JSON header of names, dtypes, shapes and offsets, then the data.

The format is small and frozen (github.com/huggingface/safetensors), so it is read and written here: lazily, and with
bfloat16 and the 8-bit floats, which numpy alone does not name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .checkpoint import Checkpoint, Tensor
from .formats import Options
from .source import Source
from .strict import strict_json
from .writing import bytes_of, refuse_unfit

_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype(np.complex64),
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA: Final = "__metadata__"
_LONGEST_HEADER: Final = 100_000_000  # bytes; the format's own limit


def read(path: Path, options: Options) -> Checkpoint:
    """Read the header; `FormatModule.read`."""
    source = Source(path)
    length = int.from_bytes(source.read(0, 8, "header length"), "little")
    if length > min(_LONGEST_HEADER, source.size - 8):
        source.refuse("header length", f"{length} bytes are declared, and the file has {source.size}")
    header = strict_json(source.read(8, length, "header"), f"{path}: header")
    if not isinstance(header, dict):
        source.refuse("header", "it is not a JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        source.refuse(_METADATA, "it must be an object of texts")
    placed = sorted(_entries(header, source), key=lambda entry: entry[3:])
    end = 0
    for name, _, _, begin, stop in placed:
        if begin != end:
            source.refuse(name, f"its data begins at {begin}, and the tensor before ends at {end}")
        end = stop
    if 8 + length + end != source.size:
        source.refuse("data", f"{end} bytes are declared, and {source.size - 8 - length} are stored")
    start = 8 + length
    tensors = {name: _lazy(source, name, dtype, shape, start + begin) for name, dtype, shape, begin, _ in placed}
    # The writer sorts by dtype and name, so the model's order is lost.
    return Checkpoint("safetensors", tensors, order_is_meaningful=False, path=path, metadata=metadata)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write every tensor; `FormatModule.write`. Wider dtypes first, then by name, as the format's own library."""
    refuse_unfit(checkpoint, path, "safetensors", dtypes=_NAMES, problem=_reserved)
    order = sorted(checkpoint.tensors, key=lambda name: (-checkpoint.tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    metadata = _metadata(checkpoint)
    if metadata:
        header[_METADATA] = metadata
    end = 0
    for name in order:
        tensor = checkpoint.tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the data is aligned
    if len(encoded) > _LONGEST_HEADER:
        raise CheckpointError(
            f"{path}: the names need {len(encoded)} bytes; the format has room for {_LONGEST_HEADER}."
        )
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            file.write(bytes_of(checkpoint[name]))


def _reserved(name: str) -> str | None:
    return "is where the format keeps its metadata" if name == _METADATA else None


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the file itself said; of a torch model "pt", without which some libraries refuse to read the file."""
    if checkpoint.format.startswith("safetensors"):
        return {key: value for key, value in checkpoint.metadata.items() if isinstance(value, str)}
    return {"format": "pt"} if checkpoint.format.startswith("torch") else {}


def _entries(
    header: Mapping[str, Any], source: Source
) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...], int, int]]:
    """Name, dtype, shape, begin and end of each tensor's data, checked one by one."""
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            source.refuse(name, f"dtype, shape and data_offsets were expected; got {str(entry)[:100]}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            source.refuse(name, f"its dtype {dtype!r} is unknown; known are {', '.join(_DTYPES)}")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                source.refuse(name, f"{what} must be a list of counts; got {str(numbers)[:100]}")
        needed = prod(shape) * _DTYPES[dtype].itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
            source.refuse(name, f"{dtype} {shape} needs {needed} bytes; data_offsets are {offsets}")
        yield name, _DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _lazy(source: Source, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Tensor:
    return Tensor(dtype, shape, lambda: source.array(offset, dtype, shape, name))
