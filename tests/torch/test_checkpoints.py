"""Checkpoints of torch.nn's layers load into ours and ours into theirs, as strictly as torch's."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import Renorm

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
nn = torch.nn

KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
PAIRS = [
    (bnlayer_torch.BatchNorm1d, nn.BatchNorm1d, (6, 3)),
    (bnlayer_torch.BatchNorm2d, nn.BatchNorm2d, (4, 3, 2, 2)),
    (bnlayer_torch.BatchNorm3d, nn.BatchNorm3d, (4, 3, 2, 2, 2)),
]
ARGUMENTS: list[dict[str, Any]] = [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}]


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(kind: Any, shape: tuple[int, ...], seed: int = 0, **arguments: Any) -> Any:
    layer = kind(3, **arguments)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(3, seed=seed + i))
    layer(normal(*shape, seed=seed) * 2 + 1)
    return layer


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_state_dicts_are_the_same_and_load_both_ways(
    ours: Any, theirs: Any, shape: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    reference = nn.Sequential(OrderedDict(norm=trained(theirs, shape, **arguments)))
    mine = nn.Sequential(OrderedDict(norm=ours(3, **arguments)))
    saved = reference.state_dict()
    assert list(mine.state_dict()) == list(saved)
    assert mine.state_dict()._metadata == saved._metadata
    assert mine.state_dict()._metadata["norm"] == {"version": 2}
    assert not any(mine.load_state_dict(through_a_file(saved)))
    for name, value in mine.state_dict().items():
        assert torch.equal(value, saved[name])
    back = nn.Sequential(OrderedDict(norm=theirs(3, **arguments)))
    assert not any(back.load_state_dict(through_a_file(mine.state_dict())))
    x = normal(*shape, seed=7)
    assert torch.equal(mine.eval()(x), back.eval()(x))


@pytest.mark.parametrize("drop", KEYS)
@pytest.mark.parametrize("version", [1, 2, None])
def test_what_is_missing_is_missed_as_torch_misses_it(drop: str, version: int | None) -> None:
    # Before version 2 torch did not count; a plain dictionary says no version.
    source = trained(nn.BatchNorm2d, (4, 3, 2, 2)).state_dict()
    outcomes = []
    for layer in (bnlayer_torch.BatchNorm2d(3), nn.BatchNorm2d(3)):
        with torch.no_grad():
            layer.num_batches_tracked.fill_(5)
        state = OrderedDict((name, value) for name, value in source.items() if name != drop)
        if version is not None:
            state._metadata = {"": {"version": version}}  # type: ignore[attr-defined]
        try:
            layer.load_state_dict(state)
            outcomes.append(int(layer.num_batches_tracked))
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert isinstance(outcomes[0], int) == (drop == "num_batches_tracked" and version != 2)


def test_what_is_unexpected_or_misshapen_is_refused_as_torch_refuses_it() -> None:
    source = trained(nn.BatchNorm1d, (6, 3)).state_dict()
    for bad in ({**source, "extra": torch.zeros(3)}, {**source, "weight": torch.zeros(4)}):
        messages = []
        for layer in (bnlayer_torch.BatchNorm1d(3), nn.BatchNorm1d(3)):
            with pytest.raises(RuntimeError) as caught:
                layer.load_state_dict(bad)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        loose = [layer(3).load_state_dict({**source, "extra": torch.zeros(3)}, strict=False).unexpected_keys
                 for layer in (bnlayer_torch.BatchNorm1d, nn.BatchNorm1d)]  # fmt: skip
        assert loose[0] == loose[1] == ["extra"]


def test_tensors_of_a_file_can_take_the_place_of_the_modules() -> None:
    source = trained(nn.BatchNorm2d, (4, 3, 2, 2)).state_dict()
    with torch.device("meta"):
        layer = bnlayer_torch.BatchNorm2d(3)
    layer.load_state_dict(source, assign=True)
    assert layer.running_mean is source["running_mean"]
    assert layer.weight.requires_grad
    layer(normal(4, 3, 2, 2))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize(("extra", "arguments"), [
    (["hidden_mean"], {"zero_debias": "mean"}),
    (["hidden_mean", "hidden_variance"], {"zero_debias": "all"}),
    (["renorm_mean", "renorm_stddev", "moving_stddev"], {"renorm": Renorm(), "moving_variance_estimator": "biased"}),
])  # fmt: skip
def test_averages_that_torch_does_not_have_are_asked_for_by_name(extra: list[str], arguments: dict[str, Any]) -> None:
    layer = bnlayer_torch.BatchNorm2d(3, **arguments)
    assert sorted(set(layer.state_dict()) - set(KEYS)) == sorted(extra)
    with pytest.raises(RuntimeError, match=extra[0]):
        layer.load_state_dict(nn.BatchNorm2d(3).state_dict())
    layer(normal(4, 3, 2, 2))
    twin = bnlayer_torch.BatchNorm2d(3, **arguments)
    twin.load_state_dict(through_a_file(layer.state_dict()))
    for each in (layer, twin):
        each(normal(4, 3, 2, 2, seed=1))
    for name, value in twin.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name]), name


def test_a_model_saved_whole_loads_whole() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), trained(bnlayer_torch.BatchNorm2d, (4, 3, 2, 2), single_value="allow"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = normal(4, 2, 2, 2)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert loaded[1].spec.single_value == "allow"


def test_buffers_can_be_left_out_of_a_file_as_torchs() -> None:
    layer = bnlayer_torch.BatchNorm1d(3)
    layer.register_buffer("running_mean", layer.running_mean, persistent=False)
    assert "running_mean" not in layer.state_dict()
    with pytest.raises(KeyError):
        layer.register_buffer("eps", torch.zeros(1))  # the name is an attribute's
