"""Every diagnosis has a file that triggers it, and a healthy model triggers none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import checkpoint
from bnlayer.checkpoint import Checkpoint, Tensor
from bnlayer.diagnostics import diagnose

CHANNELS = 16


def healthy(seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """A trained torch layer's tensors."""
    random = np.random.default_rng(seed)
    arrays = {
        "weight": random.normal(1.0, 0.2, CHANNELS),
        "bias": random.normal(0.0, 0.3, CHANNELS),
        "running_mean": random.normal(0.0, 1.0, CHANNELS),
        "running_var": random.uniform(0.2, 3.0, CHANNELS),
    }
    found = {name: array.astype(np.float32) for name, array in arrays.items()}
    found["num_batches_tracked"] = np.array(1000)
    found.update(changes)
    return {name: array for name, array in found.items() if array is not None}


def new(seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """A layer that never trained."""
    start = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    arrays = {name: np.full(CHANNELS, value, np.float32) for name, value in start.items()}
    return {**arrays, "num_batches_tracked": np.array(0), **changes}


def codes(tmp_path: Path, **layers: dict[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """Write the layers to a file, read it, and give layer and severity of each diagnosis by its code."""
    tensors = {f"{layer}.{n}": Tensor.of(a) for layer, arrays in layers.items() for n, a in arrays.items()}
    path = tmp_path / "x.pt"
    Checkpoint("torch", tensors, order_is_meaningful=True).save(path, force=True)
    found = checkpoint.open(path)
    every = diagnose(found.batch_norms(), found)
    for one in every:
        assert one.message.endswith("."), one
        assert one.remedy.endswith("."), one
    return {one.code: (one.layer, one.severity) for one in every}


def with_value(name: str, value: float, *, at: int = 3, dtype: str = "float32") -> dict[str, np.ndarray]:
    layer = healthy()
    layer[name] = layer[name].astype(dtype)
    layer[name][at] = value
    return layer


def halved(**values: float) -> dict[str, np.ndarray]:
    layer = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in healthy().items()}
    for name, value in values.items():
        layer[name][2] = value
    return layer


def swapped() -> dict[str, np.ndarray]:
    layer = healthy()
    return {**layer, "running_mean": layer["running_var"], "running_var": layer["running_mean"]}


def as_gamma() -> dict[str, np.ndarray]:
    layer = healthy()
    return {"weight": layer["bias"], **{n: a for n, a in layer.items() if n not in ("weight", "bias")}}


SICK = {
    "not-finite": ({"bn": with_value("running_mean", np.nan)}, "error"),
    "negative-variance": ({"bn": with_value("running_var", -1e-3)}, "error"),
    "mean-and-variance-swapped": ({"bn": swapped()}, "error"),
    "float16-overflow": ({"bn": halved(running_var=np.inf)}, "error"),
    "float16-underflow": ({"bn": halved(running_var=1e-7)}, "warning"),
    "dead-channels": ({"bn": with_value("running_var", 0.0)}, "note"),
    "beta-as-gamma": ({"bn": as_gamma()}, "warning"),
    "counter-inconsistent": ({"bn": healthy(num_batches_tracked=np.array(0))}, "warning"),
    "never-trained": ({"a": new(), "b": new()}, "error"),
    "statistics-at-start": ({"a": healthy(), "bn": new()}, "error"),
    "statistics-behind": ({"a": healthy(), "bn": healthy(1, num_batches_tracked=np.array(10))}, "warning"),
    "statistics-missing": (
        {"a": healthy(), "bn": {k: v for k, v in healthy(1).items() if "running" not in k}},
        "error",
    ),
}


@pytest.mark.parametrize("code", SICK)
def test_it_is_told(code: str, tmp_path: Path) -> None:
    layers, severity = SICK[code]
    found = codes(tmp_path, **layers)
    assert found == {code: ("bn" if code != "never-trained" else "", severity)}


def test_a_trained_model_is_quiet(tmp_path: Path) -> None:
    assert codes(tmp_path, **{f"layer{i}.bn": healthy(i) for i in range(30)}) == {}


def test_a_new_model_was_never_trained_and_nothing_else(tmp_path: Path) -> None:
    zeros = np.zeros(CHANNELS, np.float32)
    found = codes(tmp_path, **{f"layer{i}.bn": new(weight=zeros) if i % 3 == 2 else new() for i in range(9)})
    assert found == {"never-trained": ("", "error")}


def test_a_layer_that_lost_its_statistics_and_kept_the_counter(tmp_path: Path) -> None:
    lost = codes(tmp_path, a=healthy(), bn=new(num_batches_tracked=np.array(500)))
    assert lost["counter-inconsistent"] == ("bn", "error")


def test_gammas_of_zero_are_a_note(tmp_path: Path) -> None:
    assert codes(tmp_path, bn=with_value("weight", 0.0)) == {"dead-channels": ("bn", "note")}
    assert codes(tmp_path, bn=healthy(weight=np.zeros(CHANNELS, np.float32))) == {}


def test_a_constant_layer_is_a_warning(tmp_path: Path) -> None:
    dead = healthy(running_var=np.zeros(CHANNELS, np.float32))
    assert codes(tmp_path, bn=dead)["dead-channels"] == ("bn", "warning")


def test_a_wide_range_of_variances_is_healthy(tmp_path: Path) -> None:
    wide = np.logspace(-4, 2, CHANNELS).astype(np.float32)
    assert codes(tmp_path, bn=healthy(running_var=wide)) == {}


def test_any_plausible_statistics_are_healthy(tmp_path: Path) -> None:
    """A ResNet's 53 batch norms, with wide lognormal variances and gammas here and there below 0."""
    rng = np.random.default_rng(0)
    widths = [64 * 2 ** (i // 14) for i in range(53)]
    layers = {
        f"layer{i}.bn": {
            "weight": rng.normal(1, 0.3, n).astype(np.float32), "bias": rng.normal(0, 0.5, n).astype(np.float32),
            "running_mean": rng.normal(0, 1, n).astype(np.float32),
            "running_var": rng.lognormal(0, 1.5, n).astype(np.float32), "num_batches_tracked": np.array(5000),
        }
        for i, n in enumerate(widths)
    }  # fmt: skip
    assert codes(tmp_path, **layers) == {}


def test_a_layernorm_is_not_taken_for_a_batch_norm_that_lost_its_statistics(tmp_path: Path) -> None:
    other = {k: v for k, v in healthy(1).items() if k in ("weight", "bias")}
    assert codes(tmp_path, bn=healthy(), ln=other, norm=other, **{"encoder.layer_norm": other}) == {}


def test_an_optimizer_s_averages_are_no_batch_norms_that_lost_their_statistics(tmp_path: Path) -> None:
    arrays = {f"params/BatchNorm_0/{leaf}": np.ones(4, np.float32) for leaf in ("scale", "bias")}
    arrays |= {f"opt_state/0/mu/BatchNorm_0/{leaf}": np.ones(4, np.float32) for leaf in ("scale", "bias")}
    rng = np.random.default_rng(0)
    arrays["batch_stats/BatchNorm_0/mean"] = rng.normal(0, 1, 4).astype(np.float32)
    arrays["batch_stats/BatchNorm_0/var"] = rng.lognormal(0, 0.5, 4).astype(np.float32)
    np.savez(tmp_path / "state.npz", **arrays)
    opened = checkpoint.open(tmp_path / "state.npz")
    assert [d.code for d in diagnose(opened.batch_norms(), opened) if d.severity == "error"] == []


def test_inverted_momentum_is_told_where_the_decay_is_known() -> None:
    arrays = {f"bn.{n}": Tensor.of(a) for n, a in healthy().items()}
    found = Checkpoint("torch", arrays, order_is_meaningful=True)
    assert diagnose(found.batch_norms()) == []
    (told,) = diagnose(found.batch_norms(decay=0.003))
    assert (told.code, told.severity, told.layer) == ("momentum-inverted", "warning", "bn")
    assert "0.997" in told.message and "0.003" in told.remedy


def test_two_at_once_are_both_told_and_errors_come_first(tmp_path: Path) -> None:
    found = codes(tmp_path, a=with_value("running_var", 0.0), b=with_value("running_mean", np.inf))
    assert list(found) == ["not-finite", "dead-channels"]


def test_live_models_can_be_diagnosed() -> None:
    import bnlayer
    from bnlayer.contract import LayerRecord

    spec = bnlayer.BatchNormSpec(4)
    record = LayerRecord("bn", object(), "native", spec, bnlayer.BatchNormState.initial(spec))
    assert [one.code for one in diagnose([record])] == ["never-trained"]
