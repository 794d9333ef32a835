"""Keras's weights in HDF5: `.weights.h5` of Keras 3, and the older `.h5` of whole models or of weights.

The new ones number a layer's variables under its path; the old ones name them, in an order that attributes give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from ..errors import CheckpointError
from . import hdf5
from .checkpoint import Checkpoint, Layer, Tensor
from .formats import Options
from .keras_config import layers_of
from .source import Source
from .strict import strict_json

_NUMBER: Final = re.compile(r"(\d+)")


def read(path: Path, options: Options) -> Checkpoint:
    """Read every dataset's header; `FormatModule.read`."""
    source = Source(path)

    def reopen() -> AbstractContextManager[Any]:
        return hdf5.opened(source)

    with reopen() as root:
        return checkpoint_of(root, source, reopen, config=None)


def checkpoint_of(root: Any, source: Source, reopen: Any, *, config: Any) -> Checkpoint:
    """The checkpoint in an open HDF5 file.

    Args:
        root: the file.
        source: where it is.
        reopen: opens it again.
        config: the model's configuration, where it is known from elsewhere.

    Raises:
        CheckpointError: the file is damaged or hostile.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for path, dataset in hdf5.walk(root, source):
        found = hdf5.tensor(dataset, path, source, reopen)
        if found is not None:
            tensors[path] = found
    if config is None:
        text = hdf5.text_attribute(root, "model_config", source)
        config = None if text is None else strict_json(text, f"{source.path}: model_config")
    order = _legacy_order(root, source, tensors)
    legacy = order is not None
    if order is None:
        order = sorted(tensors, key=_natural)
        for path in {p.rsplit("/", 1)[0] for p in tensors}:
            name = hdf5.text_attribute(_group(root, path), "name", source) if path.endswith("/vars") else None
            if name is not None:
                names[path.removesuffix("/vars")] = name
    metadata: dict[str, Any] = {}
    for key in ("keras_version", "backend"):
        value = hdf5.text_attribute(root, key, source)
        if value is not None:
            metadata[key] = value
    if names:
        metadata["layer_names"] = names
    layers: tuple[Layer, ...] = () if config is None else layers_of(config, order, names, legacy=legacy)
    # Keras 3 numbers layers of one class in the model's order, but the classes apart; old files list the layers.
    return Checkpoint(
        "keras.h5", {name: tensors[name] for name in order}, order_is_meaningful=legacy, path=source.path,
        metadata=metadata, layers=layers,
    )  # fmt: skip


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write `.weights.h5`: every tensor at its own path; `FormatModule.write`.

    Keras 3 reads it where the paths are its own (`layers/conv2d/vars/0`), as those of a checkpoint read from Keras are.
    """
    names: Mapping[str, str] = checkpoint.metadata.get("layer_names", {})
    with h5py.File(path, "x") as root:
        for name, tensor in checkpoint.tensors.items():
            if tensor.dtype.kind not in "biufc":
                raise CheckpointError(f"{path}: {name} is {tensor.dtype.name}, which HDF5 cannot hold; convert it.")
            array = np.asarray(checkpoint[name], order="C")
            try:
                root.create_dataset(name, data=array)
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{path}: {name}: it cannot be a path in HDF5 ({error}).") from error
        for layer, text in names.items():
            if f"{layer}/vars" in root:
                root[f"{layer}/vars"].attrs["name"] = text


def _group(root: Any, path: str) -> Any:
    node = root
    for part in path.split("/"):  # never a path of several parts at once, which follows links
        node = node[part]
    return node


def _legacy_order(root: Any, source: Source, tensors: Mapping[str, Tensor]) -> list[str] | None:
    """The tensors in the order of the attributes `layer_names` and `weight_names`; None for a file without."""
    base = root
    prefix = ""
    if "model_weights" in root:
        base, prefix = root["model_weights"], "model_weights/"
    layers = hdf5.list_attribute(base, "layer_names", source)
    if layers is None:
        return None
    order: list[str] = []
    for layer in [*layers, "top_level_model_weights"]:
        if "/" in layer or layer not in base:
            if layer in layers:
                order += [t for t in tensors if t.startswith(f"{prefix}{layer}/") and t not in order]
            continue
        for weight in hdf5.list_attribute(base[layer], "weight_names", source) or []:
            name = f"{prefix}{layer}/{weight}"
            if name not in tensors:
                source.refuse(name, "the file lists this weight, and does not hold it")
            order.append(name)
    if len(set(order)) != len(order):
        source.refuse("layer_names", "a weight is listed twice")
    return [*order, *(name for name in tensors if name not in set(order))]


def _natural(name: str) -> tuple[Any, ...]:
    """Numbers by their size, so that layer 10 comes after layer 2."""
    return tuple(
        (1, int(part), "") if part.isdigit() and len(part) < 19 else (0, 0, part) for part in _NUMBER.split(name)
    )
