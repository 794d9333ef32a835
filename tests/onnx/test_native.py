"""ONNX Runtime's BatchNormalization as a conformance target: what the harness does with it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import bnlayer
from bnlayer import BackendUnavailable, BatchNormSpec, BatchNormState, InputError, Renorm, UnsupportedError
from bnlayer.contract import Call, NativeBackend, Request

pytest.importorskip("onnx", reason="pip install 'bnlayer[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'bnlayer[onnx]'")

BACKEND = bnlayer.backend("onnxruntime")
X = np.random.default_rng(0).normal(2, 3, (6, 3)).astype(np.float32)


def state(**counter: int) -> BatchNormState[Any]:
    rng = np.random.default_rng(1)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    return BatchNormState(**{n: rng.uniform(0.5, 2, 3).astype(np.float32) for n in names}, **counter)


def test_importing_the_target_imports_no_runtime() -> None:
    code = """if True:
        import sys, bnlayer, bnlayer_numpy.native_onnxruntime as m
        assert not m.BACKEND.owns(object()) and m.BACKEND.unsupported(bnlayer.BatchNormSpec(3)) is None
        assert m.BACKEND.deviations.is_file() and not {"onnx", "onnxruntime"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_an_absent_runtime_is_told_with_its_install_command(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match=r"pip install 'bnlayer\[onnx\]'"):
        BACKEND.version()


@pytest.mark.parametrize("fields", [{}, {"axis": 1, "epsilon": 1e-3, "decay": 0.999, "single_value": "allow"}])
def test_what_is_built_is_extracted(fields: dict[str, Any]) -> None:
    """Also the numbers that the node holds as float32 attributes: 0.001 is read back as 0.001."""
    spec = BatchNormSpec(3, **fields)
    layer = BACKEND.build(spec, state())
    assert isinstance(BACKEND, NativeBackend) and BACKEND.owns(layer)
    held_spec, held = bnlayer.extract(layer)
    assert held_spec == spec
    for name, array in state().arrays().items():
        np.testing.assert_array_equal(getattr(held, name), array, strict=True)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"renorm": Renorm()}, "renorm"),
        ({"virtual_batch_size": 2}, "virtual_batch_size"),
        ({"zero_debias": "all"}, "zero_debias"),
        ({"synchronized": True}, "synchronized"),
        ({"nonfinite": "keep"}, "nonfinite"),
        ({"moving_variance_estimator": "unbiased"}, "moving_variance_estimator"),
        ({"center": False}, "center"),
        ({"scale": False}, "scale"),
        ({"track_moving_stats": False}, "track_moving_stats"),
        ({"decay": "cumulative"}, "decay"),
        ({"axis": 2}, "axis"),
        ({"param_dtype": "bfloat16"}, "bfloat16"),
        ({"stats_dtype": "float64"}, "stats_dtype"),
    ],
)
def test_what_the_node_lacks_is_unsupported_by_name(fields: dict[str, Any], field: str) -> None:
    spec = BatchNormSpec(3, **fields)
    reason = BACKEND.unsupported(spec)
    assert reason is not None and reason.startswith(f"{field}: ")
    with pytest.raises(UnsupportedError, match=field):
        BACKEND.build(spec)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (Call(X, dy=X), "dy"),
        (Call(X, weights=np.ones(6, bool)), "weights"),
        (Call(X, adjustment=(X, X)), "adjustment"),
        (Call(X.astype(np.float64)), "float64"),
        (Call(np.zeros((2, 4, 3), np.float32)), "axis"),
    ],
)
def test_what_a_call_lacks_is_unsupported_by_name(call: Call, word: str) -> None:
    reason = BACKEND.unsupported(BatchNormSpec(3), Request((call,), training=True))
    assert reason is not None and reason.startswith(f"{word}: ")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_calls_go_on_from_each_other_and_the_dtype_is_kept(dtype: str) -> None:
    spec = BatchNormSpec(3, axis=1)
    request = Request((Call(X.astype(dtype)), Call((2 * X).astype(dtype))), training=True)
    layer, outcome = BACKEND.step(BACKEND.build(spec, state()), request)
    _, wanted = bnlayer.backend("numpy").step(bnlayer.build(spec, "numpy", state(num_updates=0)), request)
    for got, want in zip(outcome.calls, wanted.calls, strict=True):
        np.testing.assert_allclose(got.y, want.y, rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-5, strict=True)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_allclose(getattr(outcome.state, name), getattr(wanted.state, name), rtol=1e-5, strict=True)
        np.testing.assert_array_equal(getattr(BACKEND.extract(layer)[1], name), getattr(outcome.state, name))


def test_the_caller_may_keep_the_averages_from_before() -> None:
    layer = BACKEND.build(BatchNormSpec(3), state())
    for options in ({"update_stats": False, "training": True}, {"training": False}):
        _, outcome = BACKEND.step(layer, Request((Call(X),), **options))
        np.testing.assert_array_equal(outcome.state.moving_mean, state().moving_mean)


@pytest.mark.parametrize("x", [X[:, :2], X[0], X.astype(np.int32)])
def test_what_the_runtime_refuses_is_an_input_error(x: np.ndarray) -> None:
    with pytest.raises(InputError, match="ONNX Runtime refuses x"):
        BACKEND.step(BACKEND.build(BatchNormSpec(3, axis=1)), Request((Call(x),), training=True))


def test_an_empty_batch_makes_the_averages_nan() -> None:
    _, outcome = BACKEND.step(BACKEND.build(BatchNormSpec(3)), Request((Call(X[:0]),), training=True))
    assert outcome.calls[0].y.shape == (0, 3) and np.isnan(outcome.state.moving_mean).all()
