"""The batch norms of Flax, Equinox and Haiku as conformance targets: what the harness does, and known defects."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import bnlayer
from bnlayer import BackendUnavailable, BatchNormSpec, BatchNormState, Renorm, UnsupportedError
from bnlayer.contract import Call, NativeBackend, Request
from bnlayer.state import array_dtype, array_names
from bnlayer_conformance import vector
from bnlayer_conformance.runner import run_vector

pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")

LIBRARIES = {
    "flax.nnx": "flax",
    "flax.linen": "flax",
    "equinox.nn.batch": "equinox",
    "equinox.nn.ema": "equinox",
    "haiku": "haiku",
}
# The zero_debias that each says.
DEBIASES = {"equinox.nn.batch": "all", "haiku": "all"}


def target(name: str) -> Any:
    pytest.importorskip(LIBRARIES[name], reason=f"pip install 'bnlayer[{LIBRARIES[name]}]'")
    return bnlayer.backend(name)


def plain(name: str, **fields: Any) -> BatchNormSpec:
    """A spec with every field at a value that this target's layer has."""
    return BatchNormSpec(3, **{"axis": 1, "zero_debias": DEBIASES.get(name, "none"), **fields})


def drawn(spec: BatchNormSpec, updates: int) -> BatchNormState[Any]:
    rng = np.random.default_rng(7)
    arrays = {n: rng.uniform(0.5, 2, spec.num_features).astype(array_dtype(spec, n)) for n in array_names(spec)}
    return BatchNormState(**arrays, num_updates=updates)


def data(rows: int = 64, mean: float = 0.0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(3).normal(mean, 1.0, (rows, 3)).astype(dtype)


def training(*x: np.ndarray, **options: Any) -> Request:
    return Request(tuple(Call(each) for each in x), training=True, **options)


def y_of(name: str, layer: Any, x: np.ndarray, *, train: bool, **call: Any) -> tuple[Any, np.ndarray]:
    layer, outcome = target(name).step(layer, Request((Call(x, **call),), training=train))
    return layer, outcome.calls[0].y


@pytest.mark.parametrize(
    "module",
    ["bnlayer_jax.native_nnx", "bnlayer_jax.native_linen", "bnlayer_jax.native_equinox", "bnlayer_jax.native_haiku"],
)
def test_importing_a_target_imports_no_jax(module: str) -> None:
    code = f"""if True:
        import sys, {module} as m, bnlayer
        for backend in [getattr(m, name) for name in ("BACKEND", "BATCH", "EMA") if hasattr(m, name)]:
            backend.owns(object()), backend.unsupported(bnlayer.BatchNormSpec(3)), backend.lacks
            assert backend.deviations.is_file()
        assert not {{"jax", "flax", "equinox", "haiku"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_absent_library_is_told_with_its_install_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match=rf"pip install 'bnlayer\[{LIBRARIES[name]}\]'"):
        bnlayer.backend(name).version()


@pytest.mark.parametrize("single_value", ["raise", "allow"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", LIBRARIES)
def test_what_is_built_is_extracted(name: str, affine: bool, single_value: str) -> None:
    backend = target(name)
    spec = plain(name, epsilon=0.01, decay=0.75, center=affine, scale=affine, single_value=single_value)
    state = drawn(spec, updates=1)
    layer = backend.build(spec, state)
    assert isinstance(backend, NativeBackend) and backend.owns(layer) and bnlayer.extract(layer)[0] == spec
    held_spec, held = backend.extract(layer)
    assert held_spec == spec
    for array, values in state.arrays().items():
        if array not in backend.lacks:
            np.testing.assert_array_equal(getattr(held, array), values, strict=True)
    if "num_updates" not in backend.lacks:
        assert held.num_updates == 1
    other = state.replace(moving_mean=np.full(3, 5, np.float32), hidden_mean=state.hidden_mean)
    loaded = backend.extract(backend.load(layer, other))[1]
    if "moving_mean" not in backend.lacks:
        np.testing.assert_array_equal(loaded.moving_mean, np.full(3, 5, np.float32))


@pytest.mark.parametrize("name", LIBRARIES)
def test_float64_is_held_and_computed_in(name: str) -> None:
    backend = target(name)
    spec = plain(name, param_dtype="float64", stats_dtype="float64")
    layer, outcome = backend.step(backend.build(spec, drawn(spec, 1)), training(data(dtype="float64")))
    assert backend.extract(layer)[0] == spec
    dtypes = {outcome.calls[0].y.dtype.name, *(a.dtype.name for a in outcome.state.arrays().values())}
    assert dtypes == {"float64"}


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        *[(name, {"renorm": Renorm(), "zero_debias": "none"}, "renorm") for name in LIBRARIES],
        *[(name, {"virtual_batch_size": 2}, "virtual_batch_size") for name in LIBRARIES],
        *[(name, {"synchronized": True}, "synchronized") for name in LIBRARIES],
        *[(name, {"moving_variance_estimator": "unbiased"}, "moving_variance_estimator") for name in LIBRARIES],
        *[(name, {"nonfinite": "keep", "zero_debias": "none"}, "nonfinite") for name in LIBRARIES],
        *[(name, {"zero_debias": "mean"}, "zero_debias") for name in LIBRARIES],
        *[(name, {"zero_debias": "none"}, "zero_debias") for name in DEBIASES],
        *[(name, {"decay": "cumulative"}, "decay") for name in LIBRARIES if name not in DEBIASES],
        *[(name, {"track_moving_stats": False}, "track_moving_stats") for name in LIBRARIES if name not in DEBIASES],
        ("flax.nnx", {"stats_dtype": "float16"}, "stats_dtype"),
        ("equinox.nn.ema", {"axis": 2}, "axis"),
        ("equinox.nn.ema", {"center": False}, "center"),
        ("equinox.nn.batch", {"scale": False}, "scale"),
        ("equinox.nn.ema", {"param_dtype": "float16"}, "stats_dtype"),
        ("haiku", {"axis": 2}, "axis"),
        ("haiku", {"param_dtype": "float16"}, "stats_dtype"),
    ],
)
def test_what_the_layer_lacks_is_unsupported_by_name(name: str, fields: dict[str, Any], field: str) -> None:
    spec = plain(name, **fields)
    reason = bnlayer.backend(name).unsupported(spec)
    assert reason is not None and reason.startswith(f"{field}: ")
    with pytest.raises(UnsupportedError, match=f"{name!r} does not support {field}"):
        bnlayer.backend(name).build(spec)


@pytest.mark.parametrize(
    ("name", "fields", "request_", "word"),
    [
        ("flax.nnx", {}, training(data(), update_stats=False), "update_stats"),
        ("flax.nnx", {}, Request((Call(data(), weights=np.ones(64, np.float32)),), training=True), "weights"),
        ("flax.linen", {}, Request((Call(data(), weights=np.ones(64, np.int64)),), training=True), "weights"),
        ("haiku", {}, Request((Call(data(), weights=np.ones(64, bool)),), training=True), "weights"),
        ("haiku", {}, training(data(dtype="float16")), "float16"),
        ("equinox.nn.ema", {"axis": -1}, training(np.zeros((4, 2, 3), np.float32)), "axis"),
        ("equinox.nn.batch", {}, Request((Call(data(), weights=np.ones(64, bool)),), training=True), "weights"),
        ("flax.linen", {}, Request((Call(data(), adjustment=(data(), data())),), training=True), "adjustment"),
    ],
)
def test_what_the_call_lacks_is_unsupported_by_name(
    name: str, fields: dict[str, Any], request_: Request, word: str
) -> None:
    reason = bnlayer.backend(name).unsupported(plain(name, **fields), request_)
    assert reason is not None and reason.startswith(f"{word}: ")


@pytest.mark.parametrize(
    ("name", "vector_id"),
    [
        *[(name, i) for name in ("flax.nnx", "flax.linen") for i in (
            "second_order/random", "scenarios/call-twice-image", "modes/frozen-then-thawed", "weights/mask-rows")],
        ("equinox.nn.ema", "modes/eval-uses-moving"),
        ("haiku", "zero_debias/all-goes-on"),
        ("equinox.nn.batch", "zero_debias/all-goes-on"),
    ],
)  # fmt: skip
def test_the_harness_brings_right_layers_through_vectors(name: str, vector_id: str) -> None:
    """Gradients of both orders, several calls, masks, modes: where a layer is right, the harness finds it right."""
    found = vector.load(vector_id)
    assert [v.id for v in found] == [vector_id]
    result = run_vector(found[0], target(name))
    assert (result.status, result.reason) == ("pass", "")


@pytest.mark.parametrize("name", ["flax.linen", "equinox.nn.batch", "equinox.nn.ema", "haiku"])
def test_a_caller_may_keep_the_variables_from_before(name: str) -> None:
    backend, spec = target(name), plain(name)
    layer, outcome = backend.step(backend.build(spec, drawn(spec, 1)), training(data(), update_stats=False))
    for array, values in backend.extract(backend.build(spec, drawn(spec, 1)))[1].arrays().items():
        np.testing.assert_array_equal(getattr(outcome.state, array), values)
    moved = backend.step(layer, training(data()))[1].state
    entered = "hidden_mean" if name in DEBIASES else "moving_mean"
    assert (getattr(moved, entered) != getattr(outcome.state, entered)).all()


# What these layers are known to do


@pytest.mark.parametrize("name", ["flax.nnx", "flax.linen"])
def test_flax_loses_the_variance_of_a_large_mean(name: str) -> None:
    x = data(rows=4096, mean=1e3)
    exact = (x - x.mean(0, dtype=np.float64)) / np.sqrt(x.var(0, dtype=np.float64) + 1e-5)
    layer = target(name).build(plain(name))
    assert np.abs(y_of(name, layer, x, train=True)[1] - exact).max() > 0.05
    near = x - np.float32(1e3)
    assert np.abs(y_of(name, layer, near, train=True)[1] - exact).max() < 1e-4


@pytest.mark.parametrize("name", ["flax.nnx", "flax.linen", "equinox.nn.ema"])
def test_an_empty_batch_makes_the_averages_nan_for_good(name: str) -> None:
    backend = target(name)
    layer, outcome = backend.step(backend.build(plain(name)), training(np.zeros((0, 3), np.float32), data()))
    assert [call.y.shape for call in outcome.calls] == [(0, 3), (64, 3)]
    assert np.isnan(backend.extract(layer)[1].moving_mean).all()


@pytest.mark.parametrize("name", ["flax.nnx", "flax.linen"])
def test_flax_returns_float32_for_half(name: str) -> None:
    assert y_of(name, target(name).build(plain(name)), data(dtype="float16"), train=True)[1].dtype == np.float32


@pytest.mark.parametrize("name", ["flax.nnx", "flax.linen"])
def test_a_mask_of_flax_that_leaves_nothing_gives_nan(name: str) -> None:
    _, y = y_of(name, target(name).build(plain(name)), data(), train=True, weights=np.zeros(64, bool))
    assert np.isnan(y).all()


@pytest.mark.parametrize(("steps", "deviation"), [(1, 0.100), (2, 0.141), (10, 0.309)])
def test_equinox_shrinks_what_it_infers_early(steps: int, deviation: float) -> None:
    name = "equinox.nn.batch"
    x = (data(rows=512) - data(rows=512).mean(0)) / data(rows=512).std(0)
    layer, _ = target(name).step(target(name).build(plain(name, decay=0.99)), training(*[x] * steps))
    np.testing.assert_allclose(y_of(name, layer, x, train=False)[1].std(0), deviation, atol=1e-3)


def test_equinox_s_default_normalizes_with_its_averages_in_training() -> None:
    name = "equinox.nn.ema"
    layer, first = y_of(name, target(name).build(plain(name)), data(), train=True)
    np.testing.assert_allclose(first.mean(0), 0, atol=1e-6)
    _, second = y_of(name, layer, data() + 5, train=True)
    assert (second.mean(0) > 4).all()


def test_haiku_divides_by_sqrt_eps_before_its_first_update() -> None:
    layer = target("haiku").build(plain("haiku"))
    np.testing.assert_allclose(y_of("haiku", layer, data(), train=False)[1], data() / np.sqrt(1e-5), rtol=1e-5)
