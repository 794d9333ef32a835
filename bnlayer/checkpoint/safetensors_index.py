"""A model in several safetensors files: a JSON index of which tensor is in which file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from . import safetensors
from .checkpoint import Checkpoint, Tensor
from .formats import Options
from .source import Source, sibling
from .strict import strict_json

_LONGEST: Final = 2**26
_MOST_FILES: Final = 10_000


def read(path: Path, options: Options) -> Checkpoint:
    """Read the index and every file's header; `FormatModule.read`."""
    source = Source(path)
    if source.size > _LONGEST:
        source.refuse("", f"an index has up to {_LONGEST} bytes; it has {source.size}")
    document = strict_json(source.read(0, source.size, "index"), str(path))
    index = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        source.refuse("weight_map", "an object of tensors' names to files' names was expected")
    files = dict.fromkeys(index.values())
    if len(files) > _MOST_FILES:
        source.refuse("weight_map", f"it names {len(files)} files")
    tensors: dict[str, Tensor] = {}
    for name in files:
        part = sibling(path, name, "weight_map")
        if not part.is_file():
            source.refuse("weight_map", f"the file {name} is not beside it")
        shard = safetensors.read(part, options)
        for tensor, stored in shard.tensors.items():
            if index.get(tensor) != name:
                source.refuse(tensor, f"it is in {name}, and the index says {index.get(tensor, 'nothing of it')}")
            tensors[tensor] = stored
    missing = [tensor for tensor in index if tensor not in tensors]
    if missing:
        source.refuse(missing[0], f"the index says that it is in {index[missing[0]]}, where it is not")
    metadata = {k: v for k, v in document.items() if k != "weight_map"}
    return Checkpoint("safetensors.index", tensors, order_is_meaningful=False, path=path, metadata=metadata)
