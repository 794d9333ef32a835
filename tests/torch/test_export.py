"""torch.export, ONNX, and TorchScript: what is in the exported graph, and that it runs to the same numbers."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, Renorm, UnsupportedError

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
nn = torch.nn
BatchNorm, BatchNorm1d, BatchNorm2d = bnlayer_torch.BatchNorm, bnlayer_torch.BatchNorm1d, bnlayer_torch.BatchNorm2d

OPTIONS: list[dict[str, Any]] = [
    {},
    {"moving_variance_estimator": "biased"},
    {"momentum": None},
    {"zero_debias": "all"},
    {"renorm": Renorm(r_max=1.5), "moving_variance_estimator": "biased"},
    {"virtual_batch_size": 4},
    {"track_running_stats": False},
]


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(module: Any, x: Any) -> Any:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed) + 2)
    module(x * 3 + 1)
    return module


def called(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_plain_layer_is_torchs_kernel(strict: bool) -> None:
    x = normal(8, 3, 4, 5)
    training = torch.export.export(BatchNorm2d(3), (x,), strict=strict)
    assert sorted(called(training)) == ["aten.add_.Tensor", "aten.batch_norm.default"]
    node = next(n for n in training.graph.nodes if str(n.target) == "aten.batch_norm.default")
    assert node.args[5:8] == (True, 0.1, 1e-5)
    lowered = training.run_decompositions({})
    assert set(lowered.graph_signature.buffers_to_mutate.values()) == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    exported = torch.export.export(BatchNorm2d(3).eval(), (x,), strict=False)
    assert called(exported) == ["aten.batch_norm.default"]
    assert not exported.run_decompositions({}).graph_signature.buffers_to_mutate


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_exported_programs_run_to_the_same_numbers_and_statistics(arguments: dict[str, Any], training: bool) -> None:
    x = normal(8, 3, 4, 5)
    module = trained(BatchNorm2d(3, **arguments), x).train(training)
    reference = copy.deepcopy(module)
    program = torch.export.export(module, (x,), strict=False)
    moved = set(program.run_decompositions({}).graph_signature.buffers_to_mutate.values())
    assert moved == (set(dict(module.named_buffers())) if training else set())
    run = program.module()
    for seed in range(2):
        batch = normal(8, 3, 4, 5, seed=seed)
        torch.testing.assert_close(run(batch), reference(batch))
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(run.get_buffer(name), buffer, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"moving_variance_estimator": "biased"}, {"zero_debias": "all"}], ids=str)
def test_exported_for_any_number_of_rows(arguments: dict[str, Any], training: bool) -> None:
    module = trained(BatchNorm1d(3, **arguments), normal(8, 3, 4)).train(training)
    reference = copy.deepcopy(module)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (normal(8, 3, 4),), dynamic_shapes=({0: rows},), strict=False)
    run = program.module()
    for n in (2, 8, 13):
        torch.testing.assert_close(run(normal(n, 3, 4)), reference(normal(n, 3, 4)))
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(run.get_buffer(name), buffer, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, {"moving_variance_estimator": "biased"}], ids=str)
def test_traced_modules_go_on_alike(arguments: dict[str, Any], training: bool) -> None:
    x = normal(8, 3, 4, 5)
    module = trained(BatchNorm2d(3, **arguments), x).train(training)
    reference = copy.deepcopy(module)
    traced = torch.jit.trace(copy.deepcopy(module), x, check_trace=False)
    with torch.no_grad():  # tracing was a call
        for name, buffer in traced.named_buffers():
            buffer.copy_(reference.get_buffer(name))
    for seed in range(2):
        batch = normal(8, 3, 4, 5, seed=seed)
        torch.testing.assert_close(traced(batch), reference(batch))
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(traced.get_buffer(name), buffer, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, {"affine": False}, {"eps": 0.1}], ids=str)
def test_scripted_modules_are_torchs_over_the_same_tensors(arguments: dict[str, Any], training: bool) -> None:
    x = normal(8, 3, 4, 5)
    module = trained(BatchNorm2d(3, **arguments), x).train(training)
    reference = copy.deepcopy(module)
    scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(x), reference(x))
    torch.testing.assert_close(module.running_var, reference.running_var)
    assert "aten::batch_norm" in str(scripted.inlined_graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torchscript_would_lose_is_refused() -> None:
    for arguments in OPTIONS[1:]:
        if set(arguments) <= {"momentum", "track_running_stats"}:
            continue
        with pytest.raises(UnsupportedError, match=r"torch\.jit\.script would lose"):
            torch.jit.script(BatchNorm2d(3, **arguments))
    frozen = BatchNorm2d(3)
    frozen.frozen_statistics = True
    with pytest.raises(UnsupportedError, match="frozen_statistics"):
        torch.jit.script(frozen)


onnx_warnings = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)


def to_onnx(module: Any, x: Any, *, training: bool) -> Any:
    onnx = pytest.importorskip("onnx", reason="pip install 'bnlayer[onnx]'")
    file = io.BytesIO()
    torch.onnx.export(
        module.train(training),
        (x,),
        file,
        dynamo=False,  # the other exporter needs onnxscript
        opset_version=17,
        input_names=["x"],
        output_names=["y"],
        training=torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL,
        do_constant_folding=False,
    )
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model)
    return model


def attributes(model: Any) -> dict[str, Any]:
    import onnx

    (node,) = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def run_onnx(model: Any, x: Any) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'bnlayer[onnx]'")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x.numpy()})[0]


@onnx_warnings
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("eps", "momentum"), [(1e-5, 0.1), (1e-3, 0.01), (0.25, 1.0)])
def test_onnx_has_the_epsilon_and_momentum_of_the_layer(eps: float, momentum: float, training: bool) -> None:
    x = normal(8, 3, 4, 5)
    module = trained(BatchNorm2d(3, eps=eps, momentum=momentum), x)
    model = to_onnx(module, x, training=training)
    found = attributes(model)
    np.testing.assert_allclose(found["epsilon"], eps, rtol=1e-6)
    np.testing.assert_allclose(found["momentum"], 1 - momentum, rtol=1e-6, atol=1e-7)
    assert found["training_mode"] == training
    # Nothing but the kernel, on the module's own tensors by their names.
    assert [node.op_type for node in model.graph.node] == ["BatchNormalization"]
    held = {i.name for i in model.graph.initializer}
    assert held == {"weight", "bias", "running_mean", "running_var"}
    np.testing.assert_allclose(run_onnx(model, x), module(x).detach(), rtol=1e-5, atol=1e-5)


@onnx_warnings
def test_onnx_of_a_new_layer_shares_equal_tensors_and_computes_the_same() -> None:
    # torch's exporter keeps one of several equal tensors; a new layer's beta and moving mean are both 0.
    x = normal(8, 3, 4, 5)
    theirs, mine = (to_onnx(m(3), x, training=False) for m in (nn.BatchNorm2d, BatchNorm2d))
    assert [n.op_type for n in mine.graph.node] == [n.op_type for n in theirs.graph.node]
    assert attributes(mine) == attributes(theirs)
    np.testing.assert_array_equal(run_onnx(mine, x), run_onnx(theirs, x))


@onnx_warnings
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_onnx_files_compute_what_the_layer_does(arguments: dict[str, Any], training: bool) -> None:
    x = normal(8, 3, 4, 5)
    module = trained(BatchNorm2d(3, **arguments), x)
    model = to_onnx(module, x, training=training)
    wanted = module(x, update_stats=False).detach()  # the file has the state after tracing, which was a call
    if not training or not {"virtual_batch_size", "renorm"} & set(arguments):
        # Where the batch normalizes, in training or because nothing is tracked, the file says so.
        tracked = arguments.get("track_running_stats", True)
        assert attributes(model)["training_mode"] == (training or not tracked)
        np.testing.assert_allclose(attributes(model)["epsilon"], 1e-5, rtol=1e-6)
    np.testing.assert_allclose(run_onnx(model, x), wanted, rtol=1e-4, atol=1e-4)


@onnx_warnings
def test_onnx_of_a_model_folds_as_torchs_does() -> None:
    torch.manual_seed(0)
    x = normal(2, 2, 6, 6)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), trained(BatchNorm2d(3), normal(8, 3, 4, 5)), nn.ReLU()).eval()
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    onnx = pytest.importorskip("onnx", reason="pip install 'bnlayer[onnx]'")
    exported = onnx.load_from_string(file.getvalue())
    assert [node.op_type for node in exported.graph.node] == ["Conv", "Relu"]
    np.testing.assert_allclose(run_onnx(exported, x), model(x).detach(), rtol=1e-4, atol=1e-4)


@onnx_warnings
def test_onnx_of_another_channel_axis() -> None:
    x = normal(8, 4, 5, 3)
    module = trained(BatchNorm(BatchNormSpec(3)), x)
    for training in (False, True):
        wanted = copy.deepcopy(module).train(training)(x).detach()
        np.testing.assert_allclose(run_onnx(to_onnx(module, x, training=training), x), wanted, rtol=1e-4, atol=1e-4)
