"""Live models in porting: read as a checkpoint, and filled from one with its batch norms' settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .. import checkpoint as checkpoints
from ..checkpoint.atomic import replacing
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.strict import strict_json
from ..errors import BatchNormError, FileError
from ..registry import adapter
from ..spec import BatchNormSpec
from .planning import plan

_VERSION: Final = 1
_LARGEST: Final = 2**26  # bytes of a sidecar; 10,000 batch norms take four million


def read(model: Any) -> Checkpoint:
    """A live model as a checkpoint that says what each of its layers is.

    Raises:
        UnknownBackend: no adapter knows such a model.
    """
    return adapter(model).read(model)


def filled(model: Any, source: Checkpoint, options: Mapping[str, Any]) -> tuple[Any, Checkpoint]:
    """A live model with a checkpoint's weights, and what it reads as then: the weights with all that the model tells.

    Args:
        model: of the checkpoint's framework and architecture; its own weights are replaced.
        source: the checkpoint; where it has other names than the model's file would, it is ported into the model.
        options: as of `units_of`, for the checkpoint.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
        PortError: it has other names, and layers of it could not be matched.
    """
    reach = adapter(model)
    mine = reach.read(model)
    same = source.keys() == mine.keys()
    weights = source if same else plan(source, mine, source_options=options).apply()
    model = reach.write(model, weights)
    return model, reach.read(model)


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


def load_into(model: Any, path: str | Path) -> Any:
    """Fill a live model from a ported checkpoint: weights, and each batch norm's epsilon and decay.

    Args:
        model: of the kind that the checkpoint was made for; its tensors must have the checkpoint's names.
        path: the checkpoint; `PATH.bnlayer.json` beside it, if there, has the batch norms' specs.

    Returns:
        The model; the same object where the framework's models are mutable.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit the model, which is as it was then.
        UnsupportedError: epsilon or decay differ, and lie in the model's code; nothing was changed.
        UnknownBackend: no adapter knows such a model.
    """
    reach = adapter(model)
    mine = reach.read(model)
    given = checkpoints.open(path, template=mine)
    specs = read_sidecar(path)
    if specs:
        model = reach.configure(model, specs)
    return reach.write(model, given)
