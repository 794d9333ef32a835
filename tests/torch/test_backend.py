"""The `torch` and `torch.nn` backends: laziness, strides, and agreement with NumPy on random specs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bnlayer
from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm, UnsupportedError
from bnlayer.contract import Call, Outcome, Request

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")

OURS, NATIVE, NUMPY = bnlayer.backend("torch"), bnlayer.backend("torch.nn"), bnlayer.backend("numpy")


@pytest.mark.parametrize("module", ["bnlayer_torch", "bnlayer_torch.backend", "bnlayer_torch.native"])
def test_importing_a_backend_does_not_import_torch(module: str) -> None:
    code = f"""if True:
        import sys, {module}, bnlayer
        assert not bnlayer.backend("torch").owns(object()) and not bnlayer.backend("torch.nn").owns(object())
        assert bnlayer.backend("torch").unsupported(bnlayer.BatchNormSpec(3)) is None
        assert "torch" not in sys.modules
        from bnlayer_torch import batch_norm, BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
        assert "torch" in sys.modules and "BatchNorm2d" in dir(sys.modules["bnlayer_torch"])
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_is_nothing_else_in_the_package() -> None:
    import bnlayer_torch

    with pytest.raises(AttributeError, match="BatchNorm4d"):
        bnlayer_torch.BatchNorm4d  # noqa: B018


def test_each_backend_owns_its_own() -> None:
    spec = BatchNormSpec(3, axis=1, moving_variance_estimator="unbiased")
    ours, native = OURS.build(spec), NATIVE.build(spec)
    assert (OURS.owns(ours), NATIVE.owns(ours)) == (True, False)
    assert (OURS.owns(native), NATIVE.owns(native)) == (False, True)
    assert NATIVE.owns(torch.nn.BatchNorm2d(3))
    assert not NATIVE.owns(torch.nn.InstanceNorm2d(3))
    assert bnlayer.extract(torch.nn.BatchNorm2d(3))[0] == bnlayer.extract(ours)[0] == spec


def random_state(rng: np.random.Generator, spec: BatchNormSpec) -> BatchNormState[Any]:
    drawn = {n: rng.normal(size=a.shape).astype(a.dtype) for n, a in BatchNormState.initial(spec).arrays().items()}
    for name in ("moving_variance", "hidden_variance", "renorm_stddev", "moving_stddev"):
        if name in drawn:
            drawn[name] = np.exp(drawn[name])
    return BatchNormState(**drawn, num_updates=int(rng.integers(5)) if spec.track_moving_stats else 0)


def random_case(seed: int) -> tuple[BatchNormSpec, BatchNormState[Any], Request]:
    """Float64 throughout, where only a formula can differ."""
    rng = np.random.default_rng([21, seed])

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    rank = pick(2, 3, 4, 5)
    shape = tuple(int(n) for n in rng.integers(1, 5, rank))
    axis = int(rng.integers(1, rank))
    track = bool(rng.uniform() < 0.85)
    decay = pick(0.0, 0.5, 0.9, 1.0, "cumulative") if track else 0.9
    spec = BatchNormSpec(
        shape[axis],
        axis=pick(axis, axis - rank),
        epsilon=pick(1e-5, 1e-3, 0.1),
        decay=decay,
        center=pick(True, False),
        scale=pick(True, False),
        moving_variance_estimator=pick("biased", "unbiased"),
        track_moving_stats=track,
        single_value="allow",
        nonfinite="propagate" if decay == "cumulative" else pick("propagate", "keep"),
        param_dtype="float64",
        stats_dtype="float64",
    )
    calls = []
    for _ in range(pick(1, 2)):
        x, dy = laid_out(rng.normal(size=shape), pick(0, 1, 2, 3)), laid_out(rng.normal(size=shape), pick(0, 1))
        given = pick(shape[:1], shape[:axis] + shape[axis + 1 :], (*shape[:axis], 1, *shape[axis + 1 :]))
        drawn = rng.uniform(0.0, 2.0, given) * (rng.uniform(size=given) < 0.7)
        calls.append(Call(x, dy=dy, weights=pick(None, None, drawn, drawn > 0.5, np.zeros(given))))
    request = Request(
        tuple(calls),
        training=bool(rng.uniform() < 0.75),
        update_stats=bool(rng.uniform() < 0.85),
        frozen_statistics=track and bool(rng.uniform() < 0.1),
    )
    return spec, random_state(rng, spec), request


def laid_out(array: np.ndarray, view: int) -> np.ndarray:
    if view == 1:
        return np.asfortranarray(array)
    if view == 2:
        return np.repeat(array, 2, axis=0)[::2]
    return array[::-1] if view == 3 else array


def flat(outcome: Outcome) -> dict[str, Any]:
    named = {"dgamma": outcome.dgamma, "dbeta": outcome.dbeta, "num_updates": outcome.state.num_updates}
    named |= outcome.state.arrays()
    for i, call in enumerate(outcome.calls):
        named |= {f"y{i}": call.y, f"dx{i}": call.dx, f"dweights{i}": call.dweights}
    return {name: value for name, value in named.items() if value is not None}


def compare(got: Outcome, wanted: Outcome, rtol: float, atol: float) -> None:
    mine, reference = flat(got), flat(wanted)
    assert mine.keys() == reference.keys()
    for name, value in reference.items():
        assert np.asarray(mine[name]).dtype == np.asarray(value).dtype, name
        np.testing.assert_allclose(mine[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("seed", range(200))
def test_it_agrees_with_numpy(seed: int) -> None:
    spec, state, request = random_case(seed)
    outcomes = []
    for backend in (OURS, NUMPY):
        layer = backend.build(spec, state)
        assert backend.extract(layer)[0] == spec
        outcomes.append(backend.step(layer, request)[1])
    compare(*outcomes, rtol=1e-9, atol=1e-9)


def with_options(seed: int) -> tuple[BatchNormSpec, BatchNormState[Any], Request]:
    """A random case, with the options that go together in it."""
    spec, _, request = random_case(seed)
    rng = np.random.default_rng([22, seed])

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    options: dict[str, Any] = {
        "virtual_batch_size": pick(None, 1, 2, 3),
        "virtual_batch_layout": pick("strided", "consecutive"),
    }
    if spec.track_moving_stats and spec.decay != "cumulative":
        if rng.uniform() < 0.5:
            clips = {"r_max": pick(None, 1.5), "r_min": pick(None, 0.7), "d_max": pick(None, 0.5)}
            options |= {"renorm": Renorm(**clips, decay=0.8), "moving_variance_estimator": "biased"}
        elif spec.decay != 1.0:
            options |= {"zero_debias": pick("mean", "all"), "nonfinite": "propagate"}
    spec = spec.replace(**options)
    calls = list(request.calls)
    if spec.virtual_batch_size is None:
        for i, call in enumerate(calls):
            shape = call.x.shape
            narrow = tuple(length if rng.uniform() < 0.5 else 1 for length in shape[pick(0, 1) :])
            adjustment = pick(None, (rng.normal(size=narrow), rng.normal(size=shape)))
            calls[i] = replace(call, adjustment=adjustment)
    given = pick(None, {"r_max": 2.0, "r_min": None}, {"d_max": 0.1}) if spec.renorm is not None else None
    request = replace(request, calls=tuple(calls), renorm_clips=given)
    return spec, random_state(rng, spec), request


@pytest.mark.parametrize("seed", range(1000, 1300))
def test_it_agrees_with_numpy_in_every_option(seed: int) -> None:
    spec, state, request = with_options(seed)
    outcomes = []
    for backend in (OURS, NUMPY):
        layer = backend.build(spec, state)
        assert backend.extract(layer)[0] == spec
        layer, first = backend.step(layer, request)
        outcomes.append((first, backend.step(layer, request)[1]))
    for got, wanted in zip(*outcomes, strict=True):
        compare(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (4, 3, 2, 5), (2, 3, 2, 3, 2)])
def test_torchs_own_agrees_with_numpy(shape: tuple[int, ...], training: bool) -> None:
    spec = BatchNormSpec(3, axis=1, moving_variance_estimator="unbiased")
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    request = Request((Call(x, dy=dy), Call(x[::-1], dy=dy)), training=training)
    state = random_state(rng, spec)
    compare(*(b.step(b.build(spec, state), request)[1] for b in (NATIVE, NUMPY)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [
    {"axis": 2}, {"moving_variance_estimator": "biased"}, {"scale": False}, {"stats_dtype": "float64"},
    {"nonfinite": "keep"}, {"zero_debias": "all"}, {"virtual_batch_size": 2},
    {"renorm": Renorm(), "moving_variance_estimator": "biased"},
])  # fmt: skip
def test_torchs_own_names_what_it_lacks(change: dict[str, Any]) -> None:
    spec = BatchNormSpec(3, axis=1, moving_variance_estimator="unbiased").replace(**change)
    with pytest.raises(UnsupportedError, match=next(iter(change))):
        NATIVE.build(spec)
    assert OURS.unsupported(spec) is None


def test_torchs_own_refuses_what_it_has_no_argument_for() -> None:
    spec = BatchNormSpec(3, axis=1, moving_variance_estimator="unbiased")
    x = np.zeros((4, 3), np.float32)
    asked = {
        "weights": Request((Call(x, weights=np.ones(4)),), training=True),
        "update_stats": Request((Call(x),), training=True, update_stats=False),
        "float64": Request((Call(x.astype(np.float64)),), training=True),
        "adjustment": Request((Call(x, adjustment=(x, x)),), training=True),
    }
    for name, request in asked.items():
        assert name in (NATIVE.unsupported(spec, request) or "")
    with pytest.raises(InputError, match="more than 1 value"):
        NATIVE.step(NATIVE.build(spec), Request((Call(x[:1]),), training=True))
    assert NATIVE.deviations.is_file()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_arrays_keep_their_strides_and_bits(dtype: Any) -> None:
    from bnlayer_torch.bridge import to_array, to_tensor

    base = np.arange(120).reshape(2, 3, 4, 5).astype(dtype)
    frozen = base.copy()
    frozen.flags.writeable = False
    for array in (base, base.transpose(0, 3, 1, 2), base[:, ::2, 1:], base[:0], frozen):
        tensor = to_tensor(array)
        assert tuple(s * array.itemsize for s in tensor.stride()) == array.strides
        assert to_array(tensor).dtype == array.dtype
        np.testing.assert_array_equal(to_array(tensor).astype(np.float64), array.astype(np.float64))
    np.testing.assert_array_equal(to_array(to_tensor(base[::-1])).astype(float), base[::-1].astype(float))


def test_dtypes_torch_lacks_are_refused() -> None:
    layer = OURS.build(BatchNormSpec(3))
    for dtype in (np.int64, np.bool_, np.complex64, np.longdouble):
        with pytest.raises(InputError):
            OURS.step(layer, Request((Call(np.zeros((4, 3), dtype), dy=np.zeros((4, 3))),), training=False))


def test_a_state_of_another_spec_is_refused_and_changes_nothing() -> None:
    spec = BatchNormSpec(3)
    layer = OURS.build(spec)
    for bad in (BatchNormState.initial(BatchNormSpec(4)), BatchNormState.initial(spec.replace(center=False))):
        with pytest.raises(bnlayer.StateError):
            OURS.load(layer, bad)
    np.testing.assert_array_equal(OURS.extract(layer)[1].gamma, np.ones(3, np.float32))
    state = random_state(np.random.default_rng(0), spec)
    assert OURS.load(layer, state) is layer
    np.testing.assert_array_equal(OURS.extract(layer)[1].moving_variance, state.moving_variance)
    assert OURS.extract(layer)[1].num_updates == state.num_updates
