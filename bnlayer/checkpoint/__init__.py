"""Checkpoints in and out, with no framework: one module per format, one neutral `Checkpoint`.

    checkpoint = bnlayer.checkpoint.open("model.weights.h5")
    checkpoint["layers/conv2d/vars/0"]         # one tensor, read now
    checkpoint.batch_norms()                   # name, spec, state, and what of it is assumed
    checkpoint.save("model.npz")

Every file is taken for hostile: no code of it runs, no other file is opened than those it is made of, and a declared
size is checked against the stored one before memory is taken. A format's own library is imported by that format's
module alone; `pip install 'bnlayer[checkpoints]'` brings them all.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .atomic import replacing
from .checkpoint import Checkpoint, Layer, Tensor
from .formats import FORMATS, Options, detected, named

__all__ = ["FORMATS", "Checkpoint", "CheckpointError", "Layer", "Tensor", "open", "save"]


def open(
    path: str | Path, *, key: str | None = None, module_stubs: bool = False, template: Checkpoint | None = None
) -> Checkpoint:
    """Read a checkpoint of any format; tensors are read when they are asked for.

    Args:
        path: a file, a folder (Orbax, SavedModel), or a TensorFlow checkpoint's name before `.index`.
        key: which of several containers in it, such as "model_ema".
        module_stubs: read a pickled torch module through inert stand-ins for its classes: no code of it runs.
        template: names, shapes and dtypes in order, for a format that stores none (`.eqx`).

    Raises:
        CheckpointError: it is damaged, hostile, or of no known format; the message has the file, the place, the cause.
        BackendUnavailable: the format's library is not installed; the message has the command.
        OSError: it is not there, or may not be read.
    """
    path = Path(path)
    options = Options(key=key, module_stubs=module_stubs, template=template)
    try:
        return detected(path).load().read(path, options)
    except RecursionError as error:  # as where a message shows a part of the file
        raise CheckpointError(f"{path}: something in it is nested too deep.") from error


def save(checkpoint: Checkpoint, path: str | Path, format: str | None = None, *, force: bool = False) -> None:
    """Write a checkpoint, whole or not at all: a failure or a kill leaves what was there.

    Args:
        checkpoint: what to write.
        path: where to.
        format: a name of `FORMATS`; None: as the path's name says.
        force: replace what is there.

    Raises:
        CheckpointError: the format cannot hold it, or something is there already.
        OSError: the disk is full, or the folder may not be written to.
    """
    path = Path(path)
    module = named(path, format).load()
    if not checkpoint:
        raise CheckpointError(f"{path}: there is no tensor in the checkpoint that would be written there.")
    save_all = getattr(module, "save", None)  # of a format whose checkpoint is several files
    if save_all is not None:
        save_all(checkpoint, path, force=force)
        return
    with replacing(path, force=force) as new:
        module.write(checkpoint, new)
