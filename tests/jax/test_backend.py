"""The backend object: it loads JAX late, changes none of its settings, and keeps to the device it is given."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import bnlayer
from bnlayer import BatchNormSpec, InputError, UnsupportedError
from bnlayer.contract import Backend, Call, Request
from bnlayer_jax.backend import BACKEND

jax = pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_backend_imports_no_jax() -> None:
    code = (
        "import sys, bnlayer, bnlayer_jax, bnlayer_jax.backend as b\n"
        "b.BACKEND.owns(object()), b.BACKEND.unsupported(bnlayer.BatchNormSpec(3))\n"
        "print('jax' in sys.modules)\n"
        "bnlayer_jax.BatchNorm\n"
        "print('jax' in sys.modules)"
    )
    assert run(code).split() == ["False", "True"]


def test_a_missing_jax_is_named_with_its_install_command() -> None:
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "import bnlayer\n"
        "from bnlayer_jax.backend import BACKEND\n"
        "for use in (BACKEND.version, lambda: BACKEND.build(bnlayer.BatchNormSpec(3))):\n"
        "    try: use()\n"
        "    except bnlayer.BackendUnavailable as error: print(error)\n"
    )
    assert run(code).count("pip install 'bnlayer[jax]'") == 2


def test_it_is_a_backend_found_by_name() -> None:
    assert isinstance(BACKEND, Backend)
    assert bnlayer.backend("jax") is BACKEND
    assert BACKEND.version() == jax.__version__
    layer = bnlayer.build(BatchNormSpec(3), "jax")
    assert BACKEND.owns(layer)
    assert not BACKEND.owns(object())
    spec, state = bnlayer.extract(layer)
    assert spec == BatchNormSpec(3)
    assert state.num_updates == 0
    loaded = bnlayer.load(layer.replace(frozen_statistics=True), state.replace(num_updates=4))
    assert loaded.state.num_updates == 4
    assert loaded.frozen_statistics


def settings() -> dict[str, object]:
    return {
        name: getattr(jax.config, name)
        for name in ("jax_enable_x64", "jax_default_device", "jax_numpy_dtype_promotion")
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_changes_no_setting(dtype: str) -> None:
    before = settings()
    x = X.astype(dtype)
    spec = BatchNormSpec(3, param_dtype=dtype, stats_dtype=dtype)
    layer, got = BACKEND.step(BACKEND.build(spec, device="cpu"), Request((Call(x, dy=x),), training=True))
    assert settings() == before
    assert got.calls[0].y.dtype == got.calls[0].dx.dtype == got.dgamma.dtype == got.state.moving_mean.dtype == dtype
    assert int(layer.state.num_updates) == 1


def test_nothing_global_changes_when_a_step_fails() -> None:
    before = settings()
    request = Request((Call(X.astype("float64"), weights=np.full(6, -1.0)),), training=True)
    with pytest.raises(InputError, match="not negative"):
        BACKEND.step(BACKEND.build(BatchNormSpec(3)), request)
    assert settings() == before


def test_a_float64_layer_extracts_and_loads_exactly() -> None:
    spec = BatchNormSpec(3, param_dtype="float64", stats_dtype="float64")
    state = bnlayer.BatchNormState.initial(spec).replace(gamma=np.array([1.0 + 2.0**-50, 2.0, 3.0]), num_updates=2**40)
    _, back = BACKEND.extract(BACKEND.build(spec, state))
    assert back.gamma is not None
    np.testing.assert_array_equal(back.gamma, [1.0 + 2.0**-50, 2.0, 3.0])
    assert back.num_updates == 2**40


def test_a_call_without_dy_takes_no_part_in_the_gradients() -> None:
    spoiled = X.copy()
    spoiled[0, 0] = np.nan
    spec = BatchNormSpec(3, nonfinite="keep")
    request = Request((Call(spoiled), Call(X, dy=X)), training=True)
    _, got = BACKEND.step(BACKEND.build(spec), request)
    assert got.calls[0].dx is None
    assert np.isfinite(got.dgamma).all()
    _, none = BACKEND.step(BACKEND.build(spec), Request((Call(X),), training=True))
    assert none.dgamma is None
    assert none.dbeta is None


def test_a_device_is_a_name_or_a_jax_device() -> None:
    cpu = jax.devices("cpu")[0]
    for device in ("cpu", "cpu:0", cpu):
        layer = BACKEND.build(BatchNormSpec(3), device=device)
        after, _ = BACKEND.step(layer, Request((Call(X),), training=True))
        assert {leaf.device for leaf in jax.tree.leaves((layer, after))} == {cpu}
    with pytest.raises(UnsupportedError, match="no device 'abacus'; it has cpu"):
        BACKEND.build(BatchNormSpec(3), device="abacus")


def test_dy_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match="dy must have y's shape"):
        BACKEND.step(BACKEND.build(BatchNormSpec(3)), Request((Call(X, dy=X[:1]),), training=True))
