"""torch.save's files from before torch 1.6: pickles one after the other, then the storages' bytes.

In order: a magic number, a protocol number, the writing system, the object, the list of storages' keys, and for each
storage its length in elements (8 bytes) and its data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .checkpoint import Checkpoint
from .formats import Options
from .pickles import Call, Global, Persistent, Reader
from .source import Bounded, Source
from .torch_objects import DTYPES, STORAGES, checkpoint_of

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL: Final = 1001
_MOST: Final = 1_000_000


def read(path: Path, options: Options) -> Checkpoint:
    """Read the pickles; storages when a tensor is asked for. `FormatModule.read`."""
    source = Source(path)
    with source.open() as file:
        stream = Bounded(file, source.size)
        magic, protocol, system, root, keys = (Reader(f"{path}: pickle {i}").run(stream) for i in range(5))
        if magic != _MAGIC or protocol != _PROTOCOL:
            source.refuse("beginning", f"magic number {magic!r} or protocol {protocol!r} are not torch's")
        if isinstance(system, dict) and system.get("little_endian") is False:
            source.refuse("beginning", "it is big-endian; only little-endian files are read")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
            source.refuse("storages", "their keys are no list of different texts")
        start = file.tell()
    widths = _widths(root)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(source.read(start, 8, f"storage {key}"), "little")
        size = count * widths.get(key, 1)
        if start + 8 + size > source.size:
            source.refuse(f"storage {key}", f"it declares {count} elements, and the file ends before")
        places[key] = start + 8, size
        start += 8 + size

    def sizes(key: str) -> int | None:
        return places[key][1] if key in places else None

    def storage(key: str, length: int, place: str) -> bytes:
        return source.read(places[key][0], length, place.removeprefix(f"{path}: "))

    return checkpoint_of(root, path, "torch.legacy", options, sizes, storage)


def _widths(root: Any) -> Mapping[str, int]:
    """Bytes of an element of each storage, by its key: only the references to storages tell."""
    widths: dict[str, int] = {}
    stack, seen = [root], set[int]()
    while stack and len(seen) < _MOST:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Persistent):
            _, kind, key, *_ = (*node.identity, None, None, None) if isinstance(node.identity, tuple) else (None,) * 3
            name = STORAGES.get(kind.name, "") if isinstance(kind, Global) else ""
            if name in DTYPES:
                widths[str(key)] = DTYPES[name].itemsize
        elif isinstance(node, Call):
            stack += [*node.arguments, node.state, *node.items.values(), *node.elements]
        elif isinstance(node, dict):
            stack += list(node.values())
        elif isinstance(node, (list, tuple)):
            stack += list(node)
    return widths
