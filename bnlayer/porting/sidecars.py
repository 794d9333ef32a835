"""`PATH.bnlayer.json`: the spec of every batch norm of a ported checkpoint, which most formats cannot hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..checkpoint.atomic import replacing
from ..checkpoint.strict import strict_json
from ..errors import BatchNormError, FileError
from ..spec import BatchNormSpec

_VERSION: Final = 1
_LARGEST: Final = 2**26  # bytes; 10,000 batch norms take four million


def sidecar(path: str | Path) -> Path:
    """Where a ported checkpoint's specs lie."""
    path = Path(path)
    return path.with_name(path.name + ".bnlayer.json")


def write_sidecar(path: str | Path, specs: Mapping[str, BatchNormSpec], *, force: bool = False) -> None:
    """Write the spec of every batch norm beside a checkpoint, by the layers' names.

    Raises:
        CheckpointError: it is there already, and `force` is False.
        OSError: it cannot be written.
    """
    document = {"bnlayer": _VERSION, "batch_norms": {name: spec.to_dict() for name, spec in specs.items()}}
    with replacing(sidecar(path), force=force) as new:
        new.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def read_sidecar(path: str | Path) -> dict[str, BatchNormSpec]:
    """The specs beside a checkpoint; empty where there are none.

    Raises:
        FileError: the file is damaged.
    """
    place = sidecar(path)
    if not place.exists():
        return {}
    if place.stat().st_size > _LARGEST:
        raise FileError(f"{place}: it has {place.stat().st_size} bytes, and specs of batch norms were expected.")
    document = strict_json(place.read_bytes(), str(place))
    layers = document.get("batch_norms") if isinstance(document, dict) else None
    if not isinstance(layers, dict) or document.get("bnlayer") != _VERSION:
        raise FileError(f"{place}: expected {{'bnlayer': {_VERSION}, 'batch_norms': ...}}.")
    try:
        return {name: BatchNormSpec.from_dict(fields) for name, fields in layers.items()}
    except (BatchNormError, TypeError, AttributeError) as error:
        raise FileError(f"{place}: {error}") from error
