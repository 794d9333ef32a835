"""Operations that need no framework: averages, differences and their causes, moments, and the commands."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bnlayer import cli
from bnlayer.checkpoint import Checkpoint, CheckpointError, Layer, Tensor
from bnlayer.surgery.average import average
from bnlayer.surgery.diff import diff
from bnlayer.surgery.freeze import freeze
from bnlayer.surgery.moments import Moments


def checkpoint(seed: int = 0, **changes: Any) -> Checkpoint:
    rng = np.random.default_rng(seed)
    tensors = {}
    for i in (1, 2):
        tensors |= {f"conv{i}.weight": rng.normal(size=(4, 4, 3, 3)), f"conv{i}.bias": rng.normal(size=4)}
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"bn{i}.{leaf}"] = rng.uniform(0.5, 2, size=4)
    arrays: dict[str, Any] = {name: array.astype("f4") for name, array in tensors.items()}
    arrays |= {f"bn{i}.num_batches_tracked": np.array(seed + 5) for i in (1, 2)}
    arrays |= {name.replace("__", "."): array for name, array in changes.items()}
    return Checkpoint("torch", {n: Tensor.of(a) for n, a in arrays.items()}, order_is_meaningful=True)


def test_average_of_one_or_of_the_same_is_itself():
    one = checkpoint()
    for made in (average([one]), average([one, one, one])):
        assert all(made[name].tobytes() == one[name].tobytes() for name in one)


def test_average_is_the_mixture():
    rng = np.random.default_rng(2)
    samples = [rng.normal(loc=i, scale=i + 1, size=(1000, 4)) for i in (0, 1)]
    files = [
        checkpoint(i, bn1__running_mean=s.mean(0).astype("f4"), bn1__running_var=s.var(0).astype("f4"))
        for i, s in enumerate(samples)
    ]
    both = np.concatenate([samples[0], samples[1], samples[1], samples[1]])
    made = average(files, [1, 3])
    np.testing.assert_allclose(made["bn1.running_mean"], both.mean(0), rtol=1e-6)
    np.testing.assert_allclose(made["bn1.running_var"], both.var(0), rtol=1e-6)
    np.testing.assert_allclose(
        made["conv1.weight"], 0.25 * files[0]["conv1.weight"] + 0.75 * files[1]["conv1.weight"], atol=1e-6
    )
    assert made["bn1.num_batches_tracked"] == 6


def test_average_refuses_other_shapes():
    with pytest.raises(CheckpointError, match=r"bn1\.weight is float32"):
        average([checkpoint(), checkpoint(bn1__weight=np.ones(5, "f4"))])


def bn(seed: int = 0) -> dict[str, Any]:
    one = checkpoint(seed)
    return {name: one[name] for name in one if name.startswith("bn1.")}


OLD = bn()
MISTAKES: dict[str, dict[str, Any]] = {
    "at-start": {"bn1.running_mean": np.zeros(4, "f4"), "bn1.running_var": np.ones(4, "f4")},
    "mean-and-variance-swapped": {"bn1.running_mean": OLD["bn1.running_var"],
                                  "bn1.running_var": OLD["bn1.running_mean"]},
    "gamma-and-beta-swapped": {"bn1.weight": OLD["bn1.bias"], "bn1.bias": OLD["bn1.weight"]},
    "beta-read-as-gamma": {"bn1.weight": OLD["bn1.bias"]},
    "sign": {"bn1.bias": -OLD["bn1.bias"]},
    "bessel": {"bn1.running_var": OLD["bn1.running_var"] * np.float32(98 / 97)},
    "stddev": {"bn1.running_var": np.sqrt(OLD["bn1.running_var"])},
    "epsilon-shifted": {"bn1.running_var": OLD["bn1.running_var"] + np.float32(1e-3 - 1e-5)},
    "bias-absorbed": {"bn1.running_mean": OLD["bn1.running_mean"] - checkpoint()["conv1.bias"],
                      "conv1.bias": np.zeros(4, "f4")},
    "rounding": {name: a.astype(ml_dtypes.bfloat16) for name, a in OLD.items() if a.dtype == "f4"},
}  # fmt: skip


@pytest.mark.parametrize("code", MISTAKES)
def test_the_cause_of_a_difference(code: str):
    other = checkpoint(**{name.replace(".", "__"): a for name, a in MISTAKES[code].items()})
    found = {layer.name: layer for layer in diff(checkpoint(), other).layers}
    assert [cause.code for cause in found["bn1"].causes] == [code]
    assert found["bn2"].same and not found["bn2"].causes
    assert not diff(checkpoint(), other).same


def test_exchanged_layers_and_no_cause_at_all():
    one = checkpoint()
    swapped = {
        n.replace("bn1", "bn0").replace("bn2", "bn1").replace("bn0", "bn2"): one[n] for n in one if n[:2] == "bn"
    }
    found = diff(one, one.replace(swapped))
    assert [[cause.code for cause in layer.causes] for layer in found.layers if layer.name[:2] == "bn"] == [
        ["order"]
    ] * 2
    assert diff(one, checkpoint()).same
    other = next(layer for layer in diff(one, checkpoint(7)).layers if layer.name == "bn1")
    assert not other.same and not other.causes


def told(**settings: Any) -> Checkpoint:
    """A checkpoint that says what its first batch norm is, as a whole torch module does."""
    bare = checkpoint()
    roles = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    words = {"num_features": 4, "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True, **settings}
    layer = Layer(
        "bn1", "BatchNorm2d", {role: f"bn1.{leaf}" for role, leaf in roles.items()}, words | {"dialect": "torch"}
    )
    return Checkpoint("torch", bare.tensors, order_is_meaningful=True, layers=(layer,))


@pytest.mark.parametrize(
    ("settings", "codes"),
    [
        ({}, []),
        ({"eps": 1e-3}, ["epsilon"]),
        ({"momentum": 0.9}, ["momentum-inverted"]),
        ({"momentum": 0.01}, ["decay"]),
        ({"momentum": None}, ["decay"]),
        ({"eps": 1e-3, "momentum": 0.9}, ["epsilon", "momentum-inverted"]),
    ],
)
def test_settings_that_differ_where_both_files_tell_them(settings: dict[str, Any], codes: list[str]):
    found = {layer.name: layer for layer in diff(told(), told(**settings)).layers}
    assert [cause.code for cause in found["bn1"].causes] == codes
    assert found["bn1"].same is (not codes)
    silent = {layer.name: layer for layer in diff(checkpoint(), told(**settings)).layers}
    assert not silent["bn1"].causes  # what a file does not say does not differ


def twins(averaged: bool) -> Checkpoint:
    """TensorFlow's variables with their exponential moving averages, or the averages in the variables' places."""
    rng = np.random.default_rng(0)
    words = ("gamma", "beta", "moving_mean", "moving_variance")
    values = {f"net/conv/BatchNorm/{word}": rng.uniform(0.5, 2, size=4).astype("f4") for word in words}
    averages = {f"{name}/ExponentialMovingAverage": a * np.float32(1.25) for name, a in values.items()}
    arrays = {name: averages[f"{name}/ExponentialMovingAverage"] for name in values} if averaged else values
    return Checkpoint(
        "tensorflow", {n: Tensor.of(a) for n, a in {**arrays, **averages}.items()}, order_is_meaningful=False
    )


def test_averages_in_the_place_of_variables():
    (norm,) = (layer for layer in diff(twins(False), twins(True)).layers if layer.kind == "batch norm")
    assert "ema" in [cause.code for cause in norm.causes]


def in_flax(torch: Checkpoint) -> Checkpoint:
    """The same numbers as Flax stores them."""
    arrays: dict[str, Any] = {}
    for i in (1, 2):
        arrays[f"params/conv{i}/kernel"] = torch[f"conv{i}.weight"].transpose(2, 3, 1, 0).copy()
        arrays[f"params/conv{i}/bias"] = torch[f"conv{i}.bias"]
        for leaf, word in (("weight", "scale"), ("bias", "bias")):
            arrays[f"params/bn{i}/{word}"] = torch[f"bn{i}.{leaf}"]
        for leaf, word in (("running_mean", "mean"), ("running_var", "var")):
            arrays[f"batch_stats/bn{i}/{word}"] = torch[f"bn{i}.{leaf}"]
    return Checkpoint("flax", {n: Tensor.of(a) for n, a in arrays.items()}, order_is_meaningful=True)


def test_across_frameworks():
    torch, flax = checkpoint(), in_flax(checkpoint())
    found = diff(torch, flax)
    assert found.same and len(found.layers) == 4, found
    mean, variance = "batch_stats/bn1/mean", "batch_stats/bn1/var"
    for code, changes in (
        ("at-start", {mean: np.zeros(4, "f4"), variance: np.ones(4, "f4")}),
        ("mean-and-variance-swapped", {mean: flax[variance], variance: flax[mean]}),
        ("bessel", {variance: flax[variance] * np.float32(97 / 98)}),
    ):
        layers = {layer.name: layer for layer in diff(torch, flax.replace(changes)).layers}
        assert [cause.code for cause in layers.pop("bn1 -> bn1").causes] == [code]
        assert all(layer.same for layer in layers.values())


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.sampled_from([0.0, 1e3, -1e6]), st.integers(0, 99))
def test_moments_are_associative_and_those_of_the_whole(sizes: list[int], center: float, seed: int):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(center, rng.uniform(0.1, 10), (size, 3)) for size in sizes]
    a, b, c = (Moments.of(part) for part in parts)
    whole = Moments.of(np.concatenate(parts))
    for made in ((a + b) + c, a + (b + c), c + (a + b), Moments.none(3) + a + b + c):
        assert made.count == whole.count == sum(sizes)
        np.testing.assert_allclose(made.mean, whole.mean, rtol=1e-13, atol=1e-13)
        # Of values about 1e6 a mean is known to 1e-10, and what that leaves in a sum of squares is far below 1e-9.
        np.testing.assert_allclose(made.m2, whole.m2, rtol=1e-9, atol=1e-9)


@given(
    st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 9),
)
def test_an_average_of_one_has_its_bits(dtype: str, data: bytes, count: int):
    """NaN, infinities and -0 too."""
    array = np.frombuffer(data, dtype)
    arrays = {"net.weight": array, "bn.num_batches_tracked": np.array(count)}
    arrays |= {f"bn.{leaf}": array for leaf in ("weight", "bias", "running_mean", "running_var")}
    one = Checkpoint("torch", {n: Tensor.of(a) for n, a in arrays.items()}, order_is_meaningful=True)
    made = average([one], [3.0])
    assert {n: (made[n].tobytes(), made[n].dtype) for n in made} == {
        n: (a.tobytes(), a.dtype) for n, a in arrays.items()
    }


def test_moments_add_up_in_any_order():
    rng = np.random.default_rng(4)
    x = rng.normal(1000, 1e-2, size=(60, 3, 4)).astype("f4")  # far from 0, where sums of squares would fail
    parts = [Moments.of(part) for part in (x[:1], x[1:20], x[20:20], x[20:])]
    left = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    right = parts[0] + (parts[1] + (parts[2] + parts[3]))
    whole = x.reshape(-1, 4).astype("f8")
    for made in (left, right, Moments.of(x), Moments.of(np.moveaxis(x, -1, 1), 1)):
        assert made.count == 180
        np.testing.assert_allclose(made.mean, whole.mean(0), rtol=1e-14)
        np.testing.assert_allclose(made.variance(), whole.var(0), rtol=1e-9)
        np.testing.assert_allclose(made.variance("unbiased"), whole.var(0, ddof=1), rtol=1e-9)


def test_freeze_has_the_tensors_of_a_frozen_one():
    bare = checkpoint()
    kept = {n: t for n, t in bare.tensors.items() if n not in ("bn2.weight", "bn2.bias")}
    bare = Checkpoint("torch", kept, order_is_meaningful=True)
    made = freeze(bare, epsilon=0.0, epsilon_now=1e-3)
    four = {"weight", "bias", "running_mean", "running_var"}
    for name in ("bn1", "bn2"):
        assert {n.removeprefix(f"{name}.") for n in made if n.startswith(f"{name}.")} == four
    np.testing.assert_allclose(made["bn1.running_var"], bare["bn1.running_var"] + 1e-3, rtol=1e-6)
    with pytest.raises(CheckpointError, match="does not say the epsilon"):
        freeze(bare)


def registered(*, group: str) -> list[EntryPoint]:
    """What pyproject.toml registers, which an installation may not have yet."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"].get(group, {})
    return [EntryPoint(name, value, group) for name, value in points.items()]


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "entry_points", registered)
    a, b, c = (str(tmp_path / name) for name in ("a.pt", "b.pt", "c.pt"))
    checkpoint().save(a)
    checkpoint(1).save(b)
    run = CliRunner().invoke
    for command, code in (
        (["diff", a, a], 0),
        (["diff", a, b], 1),
        (["average", a, b, c], 0),
        (["average", a, b, c], 3),  # it is there
        (["fold", a, str(tmp_path / "d.pt")], 3),  # whose epsilon?
        (["fold", a, str(tmp_path / "d.pt"), "--epsilon", "1e-5"], 0),
        (["fold", a, str(tmp_path / "e.pt"), "--model", "x:y"], 2),
        (["absorb", a, str(tmp_path / "f.pt"), "--keep"], 0),
        (["set-epsilon", a, str(tmp_path / "g.pt"), "1e-3", "--from", "1e-5"], 1),
        (["freeze", a, str(tmp_path / "h.pt"), "--from", "1e-5"], 0),
    ):
        result = run(cli.main, command)
        assert result.exit_code == code, (command, result.output)
    report = json.loads(run(cli.main, ["diff", a, b, "--json"]).output)
    assert report["same"] is False and {layer["name"] for layer in report["layers"]} == {"conv1", "conv2", "bn1", "bn2"}
