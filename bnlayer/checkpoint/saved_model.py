"""The variables of a TensorFlow SavedModel: a checkpoint in `variables/variables`. The graph is not read.

Keras 3's export numbers its variables and holds each twice; there the variables' full names take the numbers' place.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from .checkpoint import Checkpoint, Tensor
from .formats import Options
from .tensorflow_bundle import read_bundle

_NUMBERED = re.compile(r"(_all_variables|variables|trainable_variables|non_trainable_variables)/\d+/\.ATTRIBUTES/")


def read(path: Path, options: Options) -> Checkpoint:
    """Read the variables' index; `FormatModule.read`."""
    found = read_bundle(path / "variables" / "variables", "savedmodel")
    names = found.metadata.get("full_names", {})
    tensors: dict[str, Tensor] = {}
    for key, tensor in found.tensors.items():
        full = names.get(key, "")
        name = full if _NUMBERED.match(key) and full else key
        tensors.setdefault(name, tensor)
    return replace(found, tensors=tensors, path=path)
