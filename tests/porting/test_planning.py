"""What a plan does with the tensors: states, biases and epsilons without a place, flattened inputs, refusals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnlayer.checkpoint import Checkpoint, Tensor
from bnlayer.errors import BatchNormError, CheckpointError, PortError
from bnlayer.porting import Plan, Rules, load_into, plan, read
from bnlayer.porting.states import settled
from bnlayer.registry import adapter

RNG = np.random.default_rng(7)
TOLD = {"epsilon": 1e-5, "decay": 0.9}


def stored(format: str, arrays: Mapping[str, np.ndarray], ordered: bool = True) -> Checkpoint:
    return Checkpoint(format, {name: Tensor.of(a) for name, a in arrays.items()}, order_is_meaningful=ordered)


def drawn(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def torch_norm(name: str, n: int = 4, *, affine: bool = True, counter: int | None = 7) -> dict[str, np.ndarray]:
    made = {f"{name}.weight": drawn(n), f"{name}.bias": drawn(n)} if affine else {}
    made |= {f"{name}.running_mean": drawn(n), f"{name}.running_var": drawn(n) ** 2 + 0.5}
    return made | ({} if counter is None else {f"{name}.num_batches_tracked": np.array(counter, np.int64)})


def flax_norm(name: str, n: int = 4) -> dict[str, np.ndarray]:
    return {f"params/{name}/scale": drawn(n), f"params/{name}/bias": drawn(n), f"batch_stats/{name}/mean": drawn(n),
            f"batch_stats/{name}/var": drawn(n) ** 2 + 0.5}  # fmt: skip


def haiku_norm(name: str, n: int = 4, counter: int = 3) -> dict[str, np.ndarray]:
    made = {f"params/{name}/scale": drawn(1, 1, 1, n), f"params/{name}/offset": drawn(1, 1, 1, n)}
    for word in ("mean_ema", "var_ema"):
        made |= {f"state/{name}/~/{word}/{part}": drawn(1, 1, 1, n) ** 2 for part in ("average", "hidden")}
        made[f"state/{name}/~/{word}/counter"] = np.array(counter, np.int32)
    return made


def between(source: Checkpoint, target: Checkpoint, **options: Any) -> Plan:
    made = plan(source, target, **{"source_options": TOLD, **options})
    assert not made.refused, made.report
    return made


# The state of a batch norm


def test_a_plain_average_goes_on_in_haiku_as_it_was() -> None:
    source, target = stored("torch", torch_norm("bn")), stored("haiku", haiku_norm("net/~/bn"))
    made = between(source, target)
    result = made.apply()
    for word, name in (("mean_ema", "running_mean"), ("var_ema", "running_var")):
        for part in ("average", "hidden"):
            np.testing.assert_array_equal(result[f"state/net/~/bn/~/{word}/{part}"].reshape(-1), source[f"bn.{name}"])
        assert result[f"state/net/~/bn/~/{word}/counter"] == settled(0.9)
    assert any("counter set" in what for what in made.report.notes["converted"])
    assert not made.report.losses


@pytest.mark.parametrize(("counter", "lossy"), [(3, True), (settled(0.9), False)])
def test_a_zero_debiased_average_is_a_loss_while_it_is_young(counter: int, lossy: bool) -> None:
    source, target = stored("haiku", haiku_norm("net/~/bn", counter=counter)), stored("torch", torch_norm("bn"))
    made = between(source, target)
    result = made.apply()
    np.testing.assert_array_equal(result["bn.running_mean"], source["state/net/~/bn/~/mean_ema/average"].reshape(-1))
    assert result["bn.num_batches_tracked"] == counter
    assert bool(made.report.notes["lossy"]) == lossy


def test_haiku_to_haiku_keeps_everything() -> None:
    source, target = stored("haiku", haiku_norm("a/~/bn")), stored("haiku", haiku_norm("b/~/bn", counter=9))
    result = between(source, target).apply()
    for name in source:
        np.testing.assert_array_equal(result[name.replace("/a/", "/b/", 1)], source[name])


def test_a_plain_average_goes_on_in_equinox_as_it_was() -> None:
    equinox, torch = pytest.importorskip("equinox"), pytest.importorskip("torch")
    source = torch.nn.BatchNorm2d(4)
    source.load_state_dict({k.removeprefix("bn."): torch.from_numpy(np.array(a)) for k, a in torch_norm("bn").items()})
    layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(4, "batch", mode="batch", momentum=0.9)
    model = (layer, state)
    made = plan(read(torch.nn.Sequential(source)), read(model))
    assert not made.refused, made.report
    layer, state = adapter(model).write(model, made.apply())
    mean, variance = state.get(layer.batch_state_index)
    np.testing.assert_array_equal(mean, source.running_mean.numpy())
    np.testing.assert_array_equal(variance, source.running_var.numpy())
    assert state.get(layer.batch_counter) == settled(0.9)
    assert not made.report.losses


def test_a_counter_that_nobody_counted_is_0_and_said() -> None:
    made = between(stored("flax", flax_norm("bn")), stored("torch", torch_norm("bn")))
    assert made.apply()["bn.num_batches_tracked"] == 0
    assert any("number of updates" in what for what in made.report.notes["assumed"])


def test_absent_gamma_and_beta_are_filled() -> None:
    source = stored("torch", torch_norm("bn", affine=False))
    made = between(source, stored("flax", flax_norm("bn")))
    result = made.apply()
    np.testing.assert_array_equal(result["params/bn/scale"], np.ones(4))
    np.testing.assert_array_equal(result["params/bn/bias"], np.zeros(4))
    assert any("gamma filled" in what for what in made.report.notes["converted"])


def test_gamma_and_beta_without_a_place_are_refused_where_they_matter() -> None:
    source, target = stored("torch", torch_norm("bn")), stored("torch", torch_norm("bn", affine=False))
    made = plan(source, target, source_options=TOLD)
    with pytest.raises(BatchNormError, match="gamma"):
        made.apply()
    neutral = source.replace({"bn.weight": np.ones(4, np.float32), "bn.bias": np.zeros(4, np.float32)})
    np.testing.assert_array_equal(between(neutral, target).apply()["bn.running_mean"], source["bn.running_mean"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_dtypes_are_kept(dtype: Any) -> None:
    arrays = {"conv.weight": drawn(4, 3, 3, 3).astype(dtype), **torch_norm("bn")}
    target = {"params/conv/kernel": drawn(3, 3, 3, 4), **flax_norm("bn")}
    source = stored("torch", arrays)
    result = between(source, stored("flax", target)).apply()
    assert result["params/conv/kernel"].dtype == dtype
    np.testing.assert_array_equal(result["params/conv/kernel"], arrays["conv.weight"].transpose(2, 3, 1, 0))
    assert result["batch_stats/bn/mean"].dtype == np.float32


# Biases and epsilons without a place


def test_a_bias_without_a_place_goes_into_the_moving_mean() -> None:
    arrays = {"conv.weight": drawn(4, 3, 3, 3), "conv.bias": drawn(4), **torch_norm("conv_bn")}
    target = {"params/conv/kernel": drawn(3, 3, 3, 4), **flax_norm("conv_bn")}
    made = between(stored("torch", arrays), stored("flax", target, ordered=False))
    found = made.apply()["batch_stats/conv_bn/mean"]
    np.testing.assert_allclose(found, arrays["conv_bn.running_mean"] - arrays["conv.bias"], rtol=0, atol=2e-7)
    assert any("bias of the layer before" in what for what in made.report.notes["converted"])


def test_a_bias_without_a_place_is_refused_where_no_batch_norm_surely_follows() -> None:
    before = {**torch_norm("norm1", 3), "conv.weight": drawn(4, 3, 3, 3), "conv.bias": drawn(4)}
    target = {**flax_norm("norm1", 3), "params/conv/kernel": drawn(3, 3, 3, 4)}
    made = plan(stored("torch", before), stored("flax", target, ordered=False), source_options=TOLD)
    assert made.refused
    assert any("conv.bias has no place" in refusal for refusal in made.report.refusals)
    with pytest.raises(PortError, match=r"conv\.bias"):
        made.apply()


def normalized(x: np.ndarray, c: Checkpoint, epsilon: float) -> np.ndarray:
    gamma, beta, mean, variance = (
        c[f"bn.{word}"].astype(np.float64) for word in ("weight", "bias", "running_mean", "running_var")
    )
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


@pytest.mark.parametrize(("epsilon", "smallest"), [(1e-2, 0.5), (1e-6, 0.5), (1e-2, 0.0)])
def test_a_shifted_epsilon_is_exact_in_eval(epsilon: float, smallest: float) -> None:
    arrays = torch_norm("bn")
    arrays["bn.running_var"][0] = smallest
    source, target = stored("torch", arrays), stored("torch", torch_norm("bn"))
    options = {"epsilon": "shift", "target_options": {"epsilon": epsilon, "decay": 0.9}}
    made = between(source, target, **options)
    result = made.apply()
    x = drawn(5, 4)
    expected = normalized(x, source, 1e-5)
    np.testing.assert_allclose(normalized(x, result, epsilon), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    scaled = smallest + 1e-5 < epsilon
    assert scaled == (not np.array_equal(result["bn.weight"], source["bn.weight"]))
    assert scaled == np.array_equal(result["bn.running_var"], source["bn.running_var"])
    assert made.report.notes["lossy"]
    assert made.specs()["bn"].epsilon == epsilon


# Kernels


def test_a_1x1_convolution_and_a_dense_layer() -> None:
    kernel = drawn(5, 3)
    dense = stored("torch", {"head.weight": kernel, "head.bias": drawn(5)})
    conv = stored("flax", {"params/head/kernel": drawn(1, 1, 3, 5), "params/head/bias": drawn(5)})
    there = between(dense, conv).apply()
    np.testing.assert_array_equal(there["params/head/kernel"][0, 0], kernel.T)
    back = between(there, dense).apply()
    assert back["head.weight"].tobytes() == kernel.tobytes()


def flattening(pool: bool = False) -> tuple[Any, Any]:
    """A Keras model and the torch model of the same architecture: 6x6x3 to 4x4x4, flattened or pooled."""
    keras, torch = pytest.importorskip("keras"), pytest.importorskip("torch")
    layers = keras.layers
    last = layers.GlobalAveragePooling2D() if pool else layers.Flatten()
    source = keras.Sequential([
        keras.Input((6, 6, 3)), layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(), last, layers.Dense(5),
    ])  # fmt: skip
    for variable in source.variables:
        variable.assign(np.abs(drawn(*variable.shape)) + 0.1)
    middle = [torch.nn.AdaptiveAvgPool2d(1)] if pool else []
    torch.manual_seed(1)
    target = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), *middle, torch.nn.Flatten(),
        torch.nn.Linear(4 if pool else 64, 5),
    )  # fmt: skip
    return source, target.eval()


@pytest.mark.parametrize("pool", [False, True])
def test_what_a_flattened_layer_computes(pool: bool, tmp_path: Any) -> None:
    source, target = flattening(pool)
    made = plan(read(source), read(target))
    assert not made.refused, made.report
    result = made.apply()
    assert any("flattened" in what for what in made.report.notes["converted"]) == (not pool)
    x = drawn(2, 6, 6, 3)
    expected = adapter(source).run(source, x, training=False).output
    target = adapter(target).configure(adapter(target).write(target, result), made.specs())
    found = adapter(target).run(target, x, training=False).output
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    back = plan(result, read(source), source_options={"epsilon": 1e-3, "decay": 0.99})
    assert not back.refused, back.report
    again, own = back.apply(), read(source)
    for name in own:
        np.testing.assert_array_equal(again[name], own[name])


def flat(width: int = 4) -> tuple[Checkpoint, Checkpoint]:
    """Files of a convolution to 4 channels of 4x4, a batch norm, and a dense layer; another convolution of `width`."""
    source = {"first.weight": drawn(width, 3, 3, 3), "last.weight": drawn(4, width, 5, 5), **torch_norm("last_bn"),
              "head.weight": drawn(6, 64), "head.bias": drawn(6)}  # fmt: skip
    target = {"params/first/kernel": drawn(3, 3, 3, width), "params/last/kernel": drawn(5, 5, width, 4),
              **flax_norm("last_bn"), "params/head/kernel": drawn(64, 6), "params/head/bias": drawn(6)}  # fmt: skip
    return stored("torch", source), stored("flax", target, ordered=False)


@pytest.mark.parametrize("width", [8, 64])
def test_an_order_of_columns_that_nobody_tells_is_refused(width: int) -> None:
    """With 64 channels in another layer, too: the layer before has 4."""
    source, target = flat(width)
    made = plan(source, target, source_options=TOLD)
    assert any("flatten" in refusal for refusal in made.report.refusals), made.report
    rule = Rules(rules=((re.compile("head"), "head", (4, 4, 4)),))
    result = between(source, target, given=rule).apply()
    expected = source["head.weight"].reshape(6, 4, 4, 4).transpose(2, 3, 1, 0).reshape(64, 6)
    np.testing.assert_array_equal(result["params/head/kernel"], expected)
    wrong = Rules(rules=((re.compile("head"), "head", (5, 4, 4)),))
    assert any(
        "has 80" in refusal for refusal in plan(source, target, given=wrong, source_options=TOLD).report.refusals
    )


@pytest.mark.parametrize(
    ("torch_shape", "keras_name", "keras_shape", "axes"),
    [
        ((8, 1, 3, 3), "depthwise_conv2d/depthwise_kernel", (3, 3, 8, 1), (2, 3, 0, 1)),
        ((8, 2, 3, 3), "conv2d/kernel", (3, 3, 2, 8), (2, 3, 1, 0)),
    ],
)
def test_grouped_and_depthwise_kernels(
    torch_shape: tuple[int, ...], keras_name: str, keras_shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    kernel = drawn(*torch_shape)
    result = between(
        stored("torch", {"conv.weight": kernel}), stored("keras", {keras_name: drawn(*keras_shape)})
    ).apply()
    np.testing.assert_array_equal(result[keras_name], kernel.transpose(axes))


# What is not understood


@pytest.mark.parametrize("side", ["source", "template"])
@pytest.mark.parametrize("kind", ["LSTM", "MultiheadAttention"])
def test_layers_that_are_not_understood_are_named(side: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    odd = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    odd.odd = torch.nn.LSTM(4, 4) if kind == "LSTM" else torch.nn.MultiheadAttention(4, 2)
    source, target = (odd, plain) if side == "source" else (plain, odd)
    for from_file in (False, True):
        ends = [read(source), read(target)]
        if from_file:
            ends = [stored("torch", dict(c)) for c in ends]
        made = plan(ends[0], ends[1])
        assert made.refused
        assert any(f"of the {side} is not understood" in r and "odd" in r for r in made.report.refusals), made.report
        assert len(made.matching.matches) >= 2
        assert not any(m.source.startswith("odd") or m.target.startswith("odd") for m in made.matching.matches)


def test_kerass_normalization_is_named_and_not_carried() -> None:
    keras, torch = pytest.importorskip("keras"), pytest.importorskip("torch")
    layer = keras.layers.Normalization()
    layer.adapt(drawn(16, 4))
    source = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(3), keras.layers.BatchNormalization()])
    target = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    made = plan(read(source), read(target))
    said = [names for notes in (made.report.notes["not_carried"],) for names in notes.values()]
    assert any("normalization" in name for names in said for name in names), made.report
    assert made.report.losses
    pairs = {m.target for m in made.matching.matches}
    assert pairs == {"0", "1"}


def test_a_tensor_of_another_shape_is_never_written(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    read(model).replace({"0.weight": drawn(3, 5)}).save(tmp_path / "odd.pt")
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        load_into(model, tmp_path / "odd.pt")
    assert torch.equal(model[0].weight, before)


def test_a_tensor_under_two_names_is_written_under_both() -> None:
    """torch lists a tied parameter twice; the port fills both, so that a strict load finds them equal."""
    torch = pytest.importorskip("torch")

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(3, 3)
            self.b = torch.nn.Linear(3, 3)
            self.b.weight = self.a.weight

    class Source(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(3, 3)

    source, target = Source(), Tied()
    made = plan(read(source), read(target)).apply(allow_partial=True)
    np.testing.assert_array_equal(made["a.weight"], source.a.weight.detach().numpy())
    np.testing.assert_array_equal(made["b.weight"], made["a.weight"])
