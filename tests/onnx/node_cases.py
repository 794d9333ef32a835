"""ONNX's own tests of the operator BatchNormalization, and one backend run on them.

    python node_cases.py write FOLDER           # the cases, from the onnx package
    python node_cases.py run FOLDER BACKEND     # what is wrong with each, as JSON

Two sets: the operator's node tests, whose data onnx draws when it is asked for them, and the batch norms among the
models that were once exported from PyTorch, whose data lie in files.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bnlayer
from bnlayer import BackendUnavailable, BatchNormSpec, BatchNormState
from bnlayer.contract import Call, Request

OP = "BatchNormalization"


@dataclass(frozen=True)
class NodeCase:
    """One node: its attributes, its inputs x, scale, B, mean, var, and its outputs y[, mean, var]."""

    name: str
    attributes: dict[str, Any]
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]
    rtol: float
    atol: float


def cases() -> Iterator[NodeCase]:
    """Every case whose model is one BatchNormalization node."""
    import onnx
    from onnx.backend.test.case.node import collect_testcases
    from onnx.backend.test.loader import load_model_tests

    np.random.seed(0)  # onnx draws from numpy's global generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other operators' cases, which onnx draws too
        drawn = collect_testcases(OP)
    for case in drawn:
        if case.model.graph.node[0].op_type == OP:
            for inputs, outputs in case.data_sets:
                yield NodeCase(case.name, said(case.model), list(inputs), list(outputs), case.rtol, case.atol)
    for case in load_model_tests(kind="pytorch-converted"):
        model = onnx.load(Path(case.model_dir) / "model.onnx")
        if [node.op_type for node in model.graph.node] == [OP]:
            yield converted(case, model)


def converted(case: Any, model: Any) -> NodeCase:
    """A case whose data lie in files: the inputs that the files lack are the model's initializers."""
    from onnx import numpy_helper

    folder = Path(case.model_dir) / "test_data_set_0"
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    given = iter(sorted(folder.glob("input_*.pb")))
    inputs = [held[name] if name in held else read(next(given)) for name in model.graph.node[0].input]
    outputs = [read(path) for path in sorted(folder.glob("output_*.pb"))]
    return NodeCase(case.name, said(model), inputs, outputs, case.rtol, case.atol)


def read(path: Path) -> np.ndarray:
    import onnx
    from onnx import numpy_helper

    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def said(model: Any) -> dict[str, Any]:
    """The node's attributes; `is_test`, opset 6's word, turned into today's."""
    import onnx

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    if "is_test" in attributes:
        attributes["training_mode"] = 1 - attributes.pop("is_test")
    return attributes


def wrong(case: NodeCase, backend: Any) -> str:
    """What a backend's layer gives otherwise than the case says; "" if nothing."""
    x, gamma, beta, mean, variance = case.inputs
    spec = BatchNormSpec.from_dialect("onnx", num_features=x.shape[1], **case.attributes)
    state = BatchNormState(gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, num_updates=0)
    training = bool(case.attributes.get("training_mode", 0))
    _, outcome = backend.step(backend.build(spec, state), Request((Call(x),), training=training))
    got = [outcome.calls[0].y, outcome.state.moving_mean, outcome.state.moving_variance]
    wanted = case.outputs if training else [*case.outputs, mean, variance]
    for name, have, want in zip(("y", "mean", "var"), got, wanted, strict=True):
        try:
            np.testing.assert_allclose(have, want, rtol=case.rtol, atol=case.atol, strict=True)
        except AssertionError as error:
            return f"{name}: {error}"
    return ""


def write(folder: Path) -> None:
    for case in cases():
        arrays = {f"{kind}_{i}": a for kind in ("inputs", "outputs") for i, a in enumerate(getattr(case, kind))}
        np.savez(folder / f"{case.name}.npz", **arrays)
        described = {"attributes": case.attributes, "rtol": case.rtol, "atol": case.atol}
        (folder / f"{case.name}.json").write_text(json.dumps(described))


def written(folder: Path) -> Iterator[NodeCase]:
    for path in sorted(folder.glob("*.json")):
        with np.load(path.with_suffix(".npz")) as arrays:
            sides = [[arrays[f] for f in arrays.files if f.startswith(kind)] for kind in ("inputs", "outputs")]
        described = json.loads(path.read_text())
        yield NodeCase(path.stem, described["attributes"], *sides, described["rtol"], described["atol"])


def run(folder: Path, name: str) -> dict[str, str]:
    """What is wrong with each case on this backend, by the case's name; "absent" where its framework is not there."""
    backend = bnlayer.backend(name)
    try:
        backend.version()
    except BackendUnavailable as error:
        return {"absent": str(error)}
    return {case.name: wrong(case, backend) for case in written(folder)}


if __name__ == "__main__":
    command, place, *rest = sys.argv[1:]
    if command == "write":
        write(Path(place))
    else:
        print(json.dumps(run(Path(place), *rest)))
