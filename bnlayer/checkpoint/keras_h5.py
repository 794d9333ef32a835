"""Keras's weights in HDF5: `.weights.h5` of Keras 3, and the older `.h5` of whole models or of weights.

The new ones number a layer's variables under its path; the old ones name them, in an order that attributes give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import h5py
import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from . import hdf5
from .checkpoint import Checkpoint, Layer, Tensor
from .formats import Options
from .keras_config import layers_of
from .source import Source
from .strict import strict_json
from .writing import NUMBERS, nested, refuse_unfit

_DTYPES: Final = NUMBERS | {np.dtype(ml_dtypes.bfloat16)}
_TEXTS: Final = ("keras_version", "backend")
_MODEL, _TOP = "model_weights", "top_level_model_weights"  # the groups of a whole model; of no layer's weights
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
    weights = _listed(root, source, tensors)
    legacy = weights is not None
    if weights is not None:
        order = [f"{layer}/{weight}" for layer, listed in weights.items() for weight in listed]
        if len(set(order)) != len(order):
            source.refuse("layer_names", "a weight is listed twice")
        order += [name for name in tensors if name not in set(order)]
    else:
        order = sorted(tensors, key=_natural)
        for path in {p.rsplit("/", 1)[0] for p in tensors}:
            name = hdf5.text_attribute(_group(root, path), "name", source) if path.endswith("/vars") else None
            if name is not None:
                names[path.removesuffix("/vars")] = name
    metadata: dict[str, Any] = {}
    for key in _TEXTS:
        value = hdf5.text_attribute(root, key, source)
        if value is not None:
            metadata[key] = value
    if names:
        metadata["layer_names"] = names
    if weights:
        metadata["weight_names"] = weights
    layers: tuple[Layer, ...] = () if config is None else layers_of(config, order, names, legacy=legacy)
    # Keras 3 numbers layers of one class in the model's order, but the classes apart; old files list the layers.
    return Checkpoint(
        "keras.h5", {name: tensors[name] for name in order}, order_is_meaningful=legacy, path=source.path,
        metadata=metadata, layers=layers,
    )  # fmt: skip


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write every tensor at its own path, and the attributes by which Keras finds it; `FormatModule.write`.

    Keras 3 reads `.weights.h5` where the paths are its own (`layers/conv2d/vars/0`), and a checkpoint that was read
    from an old `.h5` is written as one; a model's configuration is not.
    """
    refuse_unfit(checkpoint, path, "HDF5", dtypes=_DTYPES, problem=nested(checkpoint))
    metadata = checkpoint.metadata if checkpoint.format.startswith("keras") else {}
    weights: Mapping[str, list[str]] = metadata.get("weight_names", {})
    for name in (f"{layer}/{weight}" for layer, names in weights.items() for weight in names):
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{path}: {name} is among the weights that Keras lists, and not in the checkpoint.")
    with h5py.File(path, "x") as root:
        for name in checkpoint.tensors:
            hdf5.write_tensor(root, name, checkpoint[name])
        for layer, text in metadata.get("layer_names", {}).items():
            if f"{layer}/vars" in root:
                root[f"{layer}/vars"].attrs["name"] = text
        # The attributes of old files: which layers there are, and which weights each has, in order.
        base = root.require_group(_MODEL) if any(layer.startswith(f"{_MODEL}/") for layer in weights) else root
        for layer, names in weights.items():
            hdf5.write_list(root.require_group(layer), "weight_names", names)
        if weights:
            layers = [layer.removeprefix(f"{_MODEL}/") for layer in weights]
            hdf5.write_list(base, "layer_names", [layer for layer in layers if layer != _TOP])
        for key in _TEXTS:
            if key in metadata:
                base.attrs[key] = metadata[key]


def _group(root: Any, path: str) -> Any:
    node = root
    for part in path.split("/"):  # never a path of several parts at once, which follows links
        node = node[part]
    return node


def _listed(root: Any, source: Source, tensors: Mapping[str, Tensor]) -> dict[str, list[str]] | None:
    """The weights of each layer by the attributes `layer_names` and `weight_names`; None for a file without."""
    base, prefix = (root[_MODEL], f"{_MODEL}/") if _MODEL in root else (root, "")
    layers = hdf5.list_attribute(base, "layer_names", source)
    if layers is None:
        return None
    weights: dict[str, list[str]] = {}
    for layer in [*layers, _TOP]:
        group = f"{prefix}{layer}"
        if "/" in layer or layer not in base:
            if layer in layers:
                weights[group] = [t.removeprefix(f"{group}/") for t in tensors if t.startswith(f"{group}/")]
            continue
        weights[group] = hdf5.list_attribute(base[layer], "weight_names", source) or []
        for weight in weights[group]:
            if f"{group}/{weight}" not in tensors:
                source.refuse(f"{group}/{weight}", "the file lists this weight, and does not hold it")
    return weights


def _natural(name: str) -> tuple[Any, ...]:
    """Numbers by their size, so that layer 10 comes after layer 2."""
    return tuple(
        (1, int(part), "") if part.isdigit() and len(part) < 19 else (0, 0, part) for part in _NUMBER.split(name)
    )
