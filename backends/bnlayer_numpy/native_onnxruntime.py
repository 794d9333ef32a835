"""ONNX Runtime's BatchNormalization as a conformance target: one node of opset 15, run on the CPU.

It takes and gives numpy arrays. Imports neither onnx nor onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from bnlayer.call import trains
from bnlayer.contract import CallOutcome, Missing, NDArray, Outcome, Request, require
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import FLOAT_DTYPES, BatchNormSpec
from bnlayer.state import BatchNormState

_OPSET: Final = 15
_IR_VERSION: Final = 8  # the first for this opset; a newer onnx package would write one that the runtime may not read
_NO_ATTRIBUTE: Final = "the node has no such attribute"
_NO_GRADIENTS: Final = "an inference session has no gradients"
_INPUTS: Final = ("gamma", "beta", "moving_mean", "moving_variance")
_MISSING: Final = Missing(
    fields={
        "renorm": _NO_ATTRIBUTE,
        "virtual_batch_size": _NO_ATTRIBUTE,
        "zero_debias": _NO_ATTRIBUTE,
        "synchronized": _NO_ATTRIBUTE,
        "moving_variance_estimator": "the node's is biased",
        "nonfinite": "the node always propagates",
        "center": "B is an input of every node",
        "scale": "scale is an input of every node",
        "track_moving_stats": "mean and var are inputs of every node",
    },
    dtypes={"bfloat16": "ONNX Runtime has no such kernel on the CPU"},
    adjustment="the node has no such input",
    shards="a session runs on one device",
)


@dataclass(frozen=True, eq=False)
class Node:
    """A BatchNormalization node and its inputs but x.

    Attributes:
        spec: what was asked for; `extract` reads back what the node says of it.
        state: scale, B, mean and var by their names in `BatchNormState`.
    """

    spec: BatchNormSpec
    state: BatchNormState[NDArray]


class OnnxRuntime:
    """ONNX Runtime's BatchNormalization on the CPU."""

    name = "onnxruntime"

    @property
    def deviations(self) -> Path:
        """The file of ONNX Runtime's known deviations."""
        return Path(__file__).with_name("deviations") / "onnxruntime.txt"

    @property
    def lacks(self) -> Mapping[str, str]:
        """See `bnlayer.contract.NativeBackend`."""
        gradients = dict.fromkeys(("dx", "dgamma", "dbeta", "dweights", "hvp"), _NO_GRADIENTS)
        return {**gradients, "num_updates": "the node has no counter"}

    def version(self) -> str:
        require("onnx", "onnx")
        return str(require("onnxruntime", "onnx").__version__)

    def owns(self, layer: Any) -> bool:
        return isinstance(layer, Node)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        reason = _MISSING.reason(spec, request)
        if reason is not None:
            return reason
        if spec.decay == "cumulative":
            return "decay: the node has no cumulative average"
        if spec.axis not in (1, -1):
            return "axis: the node's channel axis is 1"
        dtypes = {spec.param_dtype, spec.stats_dtype}
        if "float64" in dtypes and len(dtypes) > 1:
            return "stats_dtype: ONNX Runtime has no kernel of float64 beside another dtype"
        return None if request is None else _unsupported_request(spec, request)

    def build(self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None) -> Node:
        self._refuse(spec)
        if device is not None:
            raise UnsupportedError(f"backend {self.name!r} runs on the CPU; leave device out.")
        self.version()
        return Node(spec, (BatchNormState.initial(spec) if state is None else state).checked(spec))

    def extract(self, layer: Node) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        attributes = {a.name: a.f for a in _node(layer.spec, training=False).attribute}
        said = {"epsilon": _shortest(attributes["epsilon"]), "decay": _shortest(attributes["momentum"])}
        return layer.spec.replace(**said), layer.state.copy()

    def load(self, layer: Node, state: BatchNormState[NDArray]) -> Node:
        return self.build(layer.spec, state)

    def step(self, layer: Node, request: Request) -> tuple[Node, Outcome]:
        self._refuse(layer.spec, request)
        training = trains(layer.spec, request.training, request.frozen_statistics)
        held, calls = layer.state, []
        for call in request.calls:
            y, *moved = _run(layer.spec, call.x, held, training=training)
            if moved and request.update_stats:
                held = held.replace(moving_mean=moved[0], moving_variance=moved[1])
            calls.append(CallOutcome(y))
        return replace(layer, state=held), Outcome(tuple(calls), state=held.copy())

    def _refuse(self, spec: BatchNormSpec, request: Request | None = None) -> None:
        reason = self.unsupported(spec, request)
        if reason is not None:
            raise UnsupportedError(f"backend {self.name!r} does not support {reason}.")


def _unsupported_request(spec: BatchNormSpec, request: Request) -> str | None:
    for call in request.calls:
        if call.weights is not None:
            return "weights: the node has no such input"
        if call.dy is not None:
            return f"dy: {_NO_GRADIENTS}"
        if spec.axis == -1 and call.x.ndim > 2:
            return "axis: the node's channel axis is 1"
        dtype = call.x.dtype.name
        if dtype in FLOAT_DTYPES and (dtype == "float64") != (spec.param_dtype == "float64"):
            return f"{dtype}: ONNX Runtime has no kernel of float64 beside another dtype"
    return None


def _run(spec: BatchNormSpec, x: NDArray, state: BatchNormState[NDArray], *, training: bool) -> list[NDArray]:
    """y, and in training the moving mean and variance after.

    Raises:
        InputError: ONNX Runtime refuses x.
    """
    refusals = require("onnxruntime.capi.onnxruntime_pybind11_state", "onnx")
    inputs = {name: getattr(state, name) for name in _INPUTS}
    try:
        outputs: list[NDArray] = _session(spec, x.dtype, training).run(None, {"x": x, **inputs})
    except (refusals.InvalidArgument, refusals.InvalidGraph, refusals.Fail, refusals.NotImplemented) as error:
        raise InputError(f"ONNX Runtime refuses x of {x.dtype.name} {x.shape}: {error}") from error
    return outputs


@lru_cache(maxsize=64)
def _session(spec: BatchNormSpec, x: np.dtype[Any], training: bool) -> Any:
    """A session of the one node, for x of any shape."""
    from onnx import helper

    onnxruntime = require("onnxruntime", "onnx")

    def typed(name: str, dtype: np.dtype[Any], shape: list[int] | None) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    vector, param, stats = [spec.num_features], np.dtype(spec.param_dtype), np.dtype(spec.stats_dtype)
    node = _node(spec, training=training)
    inputs = [typed(name, param if name in ("gamma", "beta") else stats, vector) for name in _INPUTS]
    outputs = [typed(name, stats, vector) for name in node.output[1:]]
    graph = helper.make_graph([node], "batch_norm", [typed("x", x, None), *inputs], [typed("y", x, None), *outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the arrays are small
    options.log_severity_level = 4  # what fails is told by the exception
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _node(spec: BatchNormSpec, *, training: bool) -> Any:
    from onnx import helper

    return helper.make_node(
        "BatchNormalization",
        ["x", *_INPUTS],
        ["y", "new_mean", "new_variance"] if training else ["y"],
        epsilon=spec.epsilon,
        momentum=spec.decay,
        training_mode=int(training),
    )


def _shortest(attribute: float) -> float:
    """The shortest decimal number that is this float32, as which the node holds it."""
    return float(str(np.float32(attribute)))


BACKEND = OnnxRuntime()
