"""ONNX models: the initializers by name, and each BatchNormalization node with its attributes.

Data that lies in other files is refused: a path in a model could lead anywhere.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import numpy_helper

from ..errors import CheckpointError
from .checkpoint import Checkpoint, Layer, NDArray, Tensor
from .formats import Options
from .source import Source

_LARGEST: Final = 2**31  # protobuf's own limit
_INPUTS: Final = ("gamma", "beta", "moving_mean", "moving_variance")


def read(path: Path, options: Options) -> Checkpoint:
    """Read the model; `FormatModule.read`."""
    model = _load(path)
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for graph in _graphs(model.graph):
        for initializer in graph.initializer:
            name = initializer.name
            if name in tensors:
                raise CheckpointError(f"{path}: the initializer {name!r} is there twice.")
            tensors[name] = _tensor(initializer, path)
        # An exporter that finds two equal tensors keeps one, and makes the other of it by Identity.
        same.update({node.output[0]: node.input[0] for node in graph.node if _is_alias(node)})
    layers = [
        _layer(node, number, same, tensors)
        for number, node in enumerate(
            node for graph in _graphs(model.graph) for node in graph.node if node.op_type == "BatchNormalization"
        )
    ]
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    metadata = {"producer": model.producer_name, "opset": versions}
    return Checkpoint("onnx", tensors, order_is_meaningful=True, path=path, metadata=metadata, layers=tuple(layers))


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write the model that the checkpoint was read from, with the checkpoint's values; `FormatModule.write`.

    The graph comes from that file: a checkpoint holds tensors, not programs.
    """
    if checkpoint.format != "onnx" or checkpoint.path is None:
        raise CheckpointError(
            f"{path}: an ONNX file needs a graph; open the model's own ONNX file, replace() its tensors, and save that."
        )
    model = _load(checkpoint.path)
    left = dict(checkpoint.tensors)
    for graph in _graphs(model.graph):
        for initializer in graph.initializer:
            name, stored = initializer.name, _tensor(initializer, checkpoint.path)
            new = left.pop(name, None)
            if new is None or (new.dtype, new.shape) != (stored.dtype, stored.shape):
                came = "nothing" if new is None else f"{new.dtype} {new.shape}"
                raise CheckpointError(f"{path}: {name} is {stored.dtype} {stored.shape} in the graph; got {came}.")
            about = initializer.doc_string
            initializer.CopyFrom(numpy_helper.from_array(checkpoint[name], name))
            initializer.doc_string = about
    if left:
        raise CheckpointError(f"{path}: the graph has no initializers {', '.join(left)}.")
    try:
        path.write_bytes(model.SerializeToString())
    except (EncodeError, ValueError) as error:
        raise CheckpointError(f"{path}: the model does not fit in an ONNX file ({error}).") from error


def _load(path: Path) -> Any:
    source = Source(path)
    if source.size > _LARGEST:
        source.refuse("", f"an ONNX file has less than {_LARGEST} bytes; it has {source.size}")
    try:
        model = onnx.load_model_from_string(source.read(0, source.size, "model"))
    except (DecodeError, ValueError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path}: it is no ONNX model, or is damaged ({error}).") from error
    if not model.HasField("graph"):
        source.refuse("", "it is no ONNX model: it has no graph")
    return model


def _graphs(graph: Any) -> list[Any]:
    """The graph and those inside of its nodes."""
    found, stack = [], [graph]
    while stack:
        graph = stack.pop()
        found.append(graph)
        for node in graph.node:
            for attribute in node.attribute:
                stack += [attribute.g] if attribute.HasField("g") else []
                stack += list(attribute.graphs)
    return found


def _tensor(initializer: Any, path: Path) -> Tensor:
    place = f"{path}: {initializer.name}"
    if initializer.data_location == onnx.TensorProto.EXTERNAL or initializer.external_data:
        raise CheckpointError(f"{place}: its data lies in another file; save the model with its data inside.")
    if initializer.HasField("segment"):
        raise CheckpointError(f"{place}: it lies in segments, which are not joined here.")
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: its dtype {initializer.data_type} is unknown.") from error
    shape = tuple(initializer.dims)
    if any(n < 0 for n in shape):
        raise CheckpointError(f"{place}: its shape {shape} makes no sense.")
    if initializer.HasField("raw_data") and np.dtype(dtype).itemsize * prod(shape) != len(initializer.raw_data):
        raise CheckpointError(f"{place}: {dtype} {shape} does not fit its {len(initializer.raw_data)} bytes.")

    def load() -> NDArray:
        try:
            return np.array(numpy_helper.to_array(initializer))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{place}: it is damaged ({error}).") from error

    return Tensor(np.dtype(dtype), shape, load)


def _is_alias(node: Any) -> bool:
    return node.op_type == "Identity" and len(node.input) == 1 and len(node.output) == 1


def _layer(node: Any, number: int, same: dict[str, str], tensors: dict[str, Tensor]) -> Layer:
    parts = {}
    for role, name in zip(_INPUTS, node.input[1:], strict=False):
        seen: set[str] = set()
        while name in same and name not in tensors and name not in seen:
            seen.add(name)
            name = same[name]
        if name in tensors:
            parts[role] = name
    settings: dict[str, Any] = {"dialect": "onnx"}
    for attribute in node.attribute:
        if attribute.name in ("epsilon", "momentum"):
            # Attributes are float32; the shortest decimal is what was meant.
            settings[attribute.name] = float(str(np.float32(attribute.f)))
        elif attribute.name in ("training_mode", "spatial"):
            settings[attribute.name] = attribute.i
    return Layer(node.name or f"BatchNormalization_{number}", "BatchNormalization", parts, settings)
