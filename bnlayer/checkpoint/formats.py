"""The formats, and how one is told by content. Each format is a module of its own, imported when it is needed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from ..errors import BackendUnavailable, CheckpointError
from . import detect
from .checkpoint import Checkpoint
from .source import Source


@dataclass(frozen=True)
class Options:
    """What a caller may say about a file that the file does not.

    Attributes:
        key: which of several containers to read, such as "state_dict" or "model_ema".
        module_stubs: read a pickled torch module through inert stand-ins for its classes.
        template: for a format that stores no names: the tensors' names, shapes and dtypes, in order.
    """

    _: KW_ONLY
    key: str | None = None
    module_stubs: bool = False
    template: Checkpoint | None = None


class FormatModule(Protocol):
    """What a format's module has; `write` in formats that can be written.

    One whose checkpoint is several files side by side has `save(checkpoint, path, *, force)` too, and sees to it that
    they are replaced whole or not at all.
    """

    def read(self, path: Path, options: Options) -> Checkpoint:
        """Read names, dtypes and shapes; tensors when they are asked for.

        Raises:
            CheckpointError: the file is damaged, hostile, or not of this format.
        """
        ...

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write to a new path (a file, or a folder that the format makes).

        Raises:
            CheckpointError: the format cannot hold something in the checkpoint; the message names it.
        """
        ...


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as in `--to` and in messages.
        about: one line for people.
        module: its module inside this package.
        tells: whether a path is of this format: the path, and the first bytes (empty for a folder).
        suffixes: what a file to be written is taken for by its name; the first is the usual one.
        writes: whether it can be written.
    """

    name: str
    about: str
    module: str
    tells: Callable[[Path, bytes], bool]
    _: KW_ONLY
    suffixes: tuple[str, ...] = ()
    writes: bool = False

    def load(self) -> FormatModule:
        """Its module.

        Raises:
            BackendUnavailable: its library is not installed; the message has the command.
        """
        try:
            module: ModuleType = import_module(f"{__package__}.{self.module}")
        except ModuleNotFoundError as error:
            raise BackendUnavailable(
                f"{self.about} needs {error.name}, which is not installed. Run: pip install 'bnlayer[checkpoints]'"
            ) from error
        return cast("FormatModule", module)


# In the order in which they are asked, the surest signs first.
_ALL = (
    Format("torch", "a torch file", "torch_file", detect.torch_zip, suffixes=(".pt", ".pth", ".bin"), writes=True),
    Format("torch.legacy", "a torch file from before 1.6", "torch_legacy", detect.torch_legacy),
    Format("keras", "a Keras model (.keras)", "keras_archive", detect.keras_archive),
    Format("npz", "an npz file", "npz", detect.npz, suffixes=(".npz",), writes=True),
    Format("keras.h5", "Keras weights in HDF5", "keras_h5", detect.hdf5, suffixes=(".weights.h5", ".h5"), writes=True),
    Format("savedmodel", "a TensorFlow SavedModel", "saved_model", detect.saved_model),
    Format("orbax", "an Orbax checkpoint", "orbax", detect.orbax, suffixes=(".orbax",), writes=True),
    Format("tensorflow", "a TensorFlow checkpoint", "tensorflow_bundle", detect.tensorflow_index,
           suffixes=(".index", ".ckpt"), writes=True),
    Format("equinox", "an Equinox file", "equinox", detect.numpy_stream, suffixes=(".eqx",), writes=True),
    Format("safetensors", "a safetensors file", "safetensors", detect.safetensors,
           suffixes=(".safetensors",), writes=True),
    Format("safetensors.index", "a model in several safetensors files", "safetensors_index", detect.safetensors_index),
    Format("haiku", "a pickle of Haiku's parameters", "haiku", detect.pickled,
           suffixes=(".haiku.pkl", ".pkl"), writes=True),
    Format("onnx", "an ONNX model", "onnx_model", detect.onnx, suffixes=(".onnx",), writes=True),
    Format("flax", "Flax's msgpack", "flax_msgpack", detect.msgpack_map, suffixes=(".msgpack",), writes=True),
)  # fmt: skip
FORMATS: Mapping[str, Format] = {entry.name: entry for entry in _ALL}


def detected(path: Path) -> Format:
    """The format of a file or folder, by its content.

    Raises:
        CheckpointError: it is none of them.
        OSError: it cannot be read.
    """
    head = Source(path).head(detect.HEAD) if path.exists() and not path.is_dir() else b""
    for entry in FORMATS.values():
        if entry.tells(path, head):
            return entry
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if head.startswith(b"PK\x03\x04") and not detect.members(path, head):
        raise CheckpointError(f"{path}: it is a zip archive that is damaged or cut off: its directory cannot be read.")
    begins = f"begins with {head[:16]!r}" if head else "is empty" if path.is_file() else "is a folder of something else"
    raise CheckpointError(f"{path}: it {begins}; expected {', '.join(entry.about for entry in FORMATS.values())}.")


def named(path: Path, format: str | None) -> Format:
    """The format to write: the one asked for, or the one that the path's name ends like.

    Raises:
        CheckpointError: there is no such format, it cannot be written, or the name tells none.
    """
    writable = ", ".join(entry.name for entry in FORMATS.values() if entry.writes)
    if format is None:
        fits = [e for e in FORMATS.values() if e.writes and path.name.endswith(e.suffixes)]
        if not fits:
            raise CheckpointError(f"{path}: its name tells no format that can be written; give one of {writable}.")
        return fits[0]
    if format not in FORMATS or not FORMATS[format].writes:
        raise CheckpointError(f"{path}: the format must be one of {writable}; got {format!r}.")
    return FORMATS[format]
