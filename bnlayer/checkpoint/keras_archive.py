"""A Keras model file (`.keras`): a zip with the configuration and the weights.

The configuration tells epsilon, momentum and axis; it is read as JSON, and nothing is built from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from zipfile import ZIP_STORED

from . import hdf5
from .archive import members, opened, whole, window
from .checkpoint import Checkpoint
from .formats import Options
from .keras_h5 import checkpoint_of
from .source import Source
from .strict import strict_json

_WEIGHTS: Final = "model.weights.h5"
_LONGEST_CONFIG: Final = 2**26
_LARGEST_UNPACKED: Final = 2**32


def read(path: Path, options: Options) -> Checkpoint:
    """Read the configuration and every dataset's header; `FormatModule.read`."""
    source = Source(path)
    with opened(source) as archive:
        inside = members(archive, source, plain=False)
        if "config.json" not in inside or _WEIGHTS not in inside:
            source.refuse("", f"config.json and {_WEIGHTS} were expected in it; it has {', '.join(list(inside)[:20])}")
        config = strict_json(whole(archive, inside["config.json"], source, _LONGEST_CONFIG), f"{path}: config.json")

        # HDF5 reads here and there, and what is compressed can only be read forward: that is taken to memory, once.
        weights = inside[_WEIGHTS]
        stored = weights.compress_type == ZIP_STORED
        unpacked = b"" if stored else whole(archive, weights, source, _LARGEST_UNPACKED)

    @contextmanager
    def reopen() -> Iterator[Any]:
        with source.open() as file:
            stream = window(weights, file, source) if stored else BytesIO(unpacked)
            with hdf5.opened(source, stream) as root:
                yield root

    with reopen() as root:
        found = checkpoint_of(root, source, reopen, config=config)
    return replace(found, format="keras")
