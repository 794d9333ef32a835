"""What convert and freeze promise for every framework, on a model that is a dict of layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest

import bnlayer
from bnlayer import BatchNormSpec, BatchNormState, InputError, UnknownBackend, UnsupportedError
from bnlayer.checkpoint import Checkpoint
from bnlayer.contract import Kind, LayerRecord, ModelAdapter, Part, Run

SPEC = BatchNormSpec(4, epsilon=1e-3)


class Layers:
    """An adapter of dicts from names to layers, which are (kind, note) pairs."""

    name = "dict"

    def __init__(self) -> None:
        self.frozen: list[tuple[tuple[str, ...], bool, Part]] = []

    def owns(self, model: Any) -> bool:
        return isinstance(model, dict)

    def batch_norms(self, model: Any) -> list[LayerRecord]:
        state = BatchNormState.initial(SPEC)
        return [
            LayerRecord(name, layer, layer[0], None, None, "is odd")
            if layer[1] == "odd"
            else LayerRecord(name, layer, layer[0], SPEC, state)
            for name, layer in model.items()
        ]

    def counterpart(self, record: LayerRecord, to: Kind) -> Any:
        if record.layer[1] == "stuck":
            raise UnsupportedError("axis would be lost")
        return (to, record.layer[1])

    def replace(self, model: Any, layers: Mapping[str, Any]) -> Any:
        model.update(layers)
        return model

    def freeze(self, model: Any, names: Collection[str], frozen: bool, part: Part) -> Any:
        self.frozen.append((tuple(names), frozen, part))
        return model

    # Porting's half of the protocol, which convert and freeze do not call.

    def read(self, model: Any) -> Checkpoint:
        raise NotImplementedError

    def write(self, model: Any, checkpoint: Checkpoint) -> Any:
        raise NotImplementedError

    def configure(self, model: Any, specs: Mapping[str, BatchNormSpec]) -> Any:
        raise NotImplementedError

    def run(self, model: Any, x: Any, *, training: bool, capture: bool = False) -> Run:
        raise NotImplementedError


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Layers:
    found = Layers()
    assert isinstance(found, ModelAdapter)
    monkeypatch.setattr("bnlayer.models.adapter", lambda model: found)
    return found


@pytest.mark.usefixtures("adapter")
def test_convert_replaces_the_native_ones_and_keeps_the_rest() -> None:
    model = {"a": ("native", ""), "b": ("bnlayer", ""), "c": ("native", "")}
    done = bnlayer.convert(model)
    assert done.model is model
    assert model == dict.fromkeys("abc", ("bnlayer", ""))
    assert [r.name for r in done.replaced] == ["a", "c"]
    assert [r.name for r in done.kept] == ["b"]
    assert done.refused == ()


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("note", ["odd", "stuck"])
def test_one_that_cannot_be_converted_stops_all(note: str) -> None:
    model = {"a": ("native", ""), "b": ("native", note)}
    before = dict(model)
    with pytest.raises(UnsupportedError, match=r"1 batch norms.*\n  b: (is odd|axis would be lost)"):
        bnlayer.convert(model)
    assert model == before
    done = bnlayer.convert(model, allow_partial=True)
    assert model == {"a": ("bnlayer", ""), "b": ("native", note)}
    assert [r.name for r in done.refused] == ["b"]
    assert done.refused[0].reason in ("is odd", "axis would be lost")


@pytest.mark.usefixtures("adapter")
def test_the_summary_names_every_layer_and_counts() -> None:
    text = str(
        bnlayer.convert({"a": ("native", ""), "b.c": ("bnlayer", ""), "d": ("native", "odd")}, allow_partial=True)
    )
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["replaced", "a"]
    assert "4 channels, epsilon 0.001, decay 0.9" in lines[0]
    assert lines[1].split()[:2] == ["kept", "b.c"]
    assert lines[2].split() == ["REFUSED", "d", "is", "odd"]
    assert lines[3] == "batch norms to bnlayer's: 1 replaced, 1 kept, 1 refused"


@pytest.mark.usefixtures("adapter")
def test_a_model_without_batch_norms_is_no_error() -> None:
    assert str(bnlayer.convert({})) == "batch norms to bnlayer's: 0 replaced, 0 kept, 0 refused"


@pytest.mark.usefixtures("adapter")
def test_where_to_is_checked() -> None:
    with pytest.raises(InputError, match="'bnlayer' or 'native'; got 'torch'"):
        bnlayer.convert({}, to="torch")  # type: ignore[arg-type]


def test_freeze_chooses_by_name_and_part(adapter: Layers) -> None:
    model = {"stem.bn": ("bnlayer", ""), "head.bn": ("bnlayer", "")}
    bnlayer.freeze(model, "stem.*", parameters=False)
    bnlayer.unfreeze(model, ["head.*", "stem.*"])
    assert adapter.frozen == [
        (("stem.bn",), True, "statistics"),
        (("stem.bn", "head.bn"), False, "statistics"),
        (("stem.bn", "head.bn"), False, "parameters"),
    ]


def test_a_pattern_that_matches_nothing_is_an_error(adapter: Layers) -> None:
    with pytest.raises(InputError, match=r"no batch norm matches 'tail.\*'; the model has stem.bn"):
        bnlayer.freeze({"stem.bn": ("bnlayer", "")}, ["stem.*", "tail.*"])
    assert adapter.frozen == []


def test_an_object_that_no_adapter_knows_is_refused() -> None:
    with pytest.raises(UnknownBackend, match=r"no adapter reaches into a builtins\.int"):
        bnlayer.batch_norms(3)
