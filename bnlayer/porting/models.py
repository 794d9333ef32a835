"""Live models in porting: read as a checkpoint, and filled from one with its batch norms' settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checkpoint as checkpoints
from ..checkpoint.checkpoint import Checkpoint
from ..registry import adapter
from .planning import plan
from .sidecars import read_sidecar


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
