"""No match is ever wrong, whatever a library calls its layers and in whatever order it holds them."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from bnlayer.checkpoint import Checkpoint
from bnlayer.porting.matching import Matching, match
from bnlayer.porting.units import Units, units_of

from . import zoo
from .zoo import ARCHITECTURES, CONVENTIONS, ORDERS, L

Side = tuple[Units, dict[str, tuple[object, ...]]]

_DIALECT = {"tf": "keras", "nnx": "flax"}
_PLAIN = ("torchvision", "timm", "transformers", "fastai", "keras.applications", "keras words", "fine first")


def _side(written: tuple[Checkpoint, zoo.Truth]) -> Side:
    checkpoint, truth = written
    units = units_of(checkpoint)
    return units, {unit.name: truth[next(iter(unit.parts.values()))] for unit in units.units}


@cache
def _made(architecture: str, convention: str, order: str = "definition") -> Side | None:
    """None where the convention gives two layers one name."""
    layers = ORDERS[order](ARCHITECTURES[architecture]())
    how = CONVENTIONS[convention]
    names = how.names(layers)
    if len(set(names)) < len(names):
        return None
    side = _side(zoo.write(layers, names, how.dialect, ordered=how.ordered))
    assert side[0].dialect == _DIALECT.get(how.dialect, how.dialect)
    return side


def _matched(source: Side, target: Side) -> Matching:
    """The matching, none of it wrong."""
    found = match(source[0], target[0])
    wrong = [m for m in found.matches if source[1][m.source] != target[1][m.target]]
    assert not wrong, wrong
    assert len({m.source for m in found.matches}) == len({m.target for m in found.matches}) == len(found.matches)
    return found


def _named(names: list[str], layers: list[L], *, ordered: bool = True, dialect: str = "torch") -> Side:
    return _side(zoo.write(layers, names, dialect, ordered=ordered))


def _convs(count: int) -> list[L]:
    return [L((n,), "conv", 1, "conv", (8, 8, 3, 3)) for n in range(count)]


# Ordinary models.

_ORDINARY = ("ResNet-18", "ResNet-50", "ResNet-50 V2", "ResNeXt-50", "WideResNet", "VGG-16", "MobileNetV2", "DenseNet",
             "EfficientNet-B0", "EfficientNet-B0, dense SE", "MLP", "stack 2x2", "siamese")  # fmt: skip


@pytest.mark.parametrize("architecture", _ORDINARY)
def test_names_that_say_where_a_layer_is_match_in_full(architecture: str) -> None:
    sides = [side for name in _PLAIN if (side := _made(architecture, name)) is not None]
    assert len(sides) >= 4
    for source, target in zip(sides, sides[1:] + sides[:1], strict=True):
        found = _matched(source, target)
        assert len(found.matches) == len(source[1]), found.ambiguous


def test_all_architectures_conventions_and_orders() -> None:
    rng = random.Random(0)
    table: dict[str, Counter[str]] = {}
    for architecture in ARCHITECTURES:
        row = table.setdefault(architecture, Counter())
        for _ in range(16):
            sides = []
            while len(sides) < 2:
                convention, order = rng.choice([*CONVENTIONS]), rng.choice([*ORDERS])
                # Numbers that count a false order are false, and a Sequential is in the order in which it runs.
                if order in ("reversed", "norms last") and CONVENTIONS[convention].counted:
                    continue
                side = _made(architecture, convention, order)
                if side is not None:
                    sides.append(side)
            found = _matched(*sides)
            row.update(pairs=1, layers=len(sides[0][1]), matched=len(found.matches))
            row["full"] += len(found.matches) == len(sides[0][1])
    print(f"\n{'':28}{'pairs':>7}{'full':>7}{'layers':>8}{'matched':>9}")
    for architecture, row in table.items():
        print(f"{architecture:28}{row['pairs']:7}{row['full']:7}{row['layers']:8}{row['matched']:9}")


def test_both_directions_agree() -> None:
    for a, b in itertools.pairwise(("keras.applications", "timm", "linen", "torchvision", "keras numbers", "haiku")):
        source, target = _made("ResNet-50", a), _made("ResNet-50", b)
        assert source is not None and target is not None
        there, back = _matched(source, target), _matched(target, source)
        assert {(m.source, m.target) for m in there.matches} == {(m.target, m.source) for m in back.matches}


def test_a_head_of_other_classes_is_the_only_one_left() -> None:
    layers = ARCHITECTURES["ResNet-18"]()
    other = [*layers[:-1], replace(layers[-1], shape=(10, 512))]
    found = _matched(
        _side(zoo.write(layers, zoo.torchvision(layers), "torch", ordered=True)),
        _side(zoo.write(other, zoo.keras_applications(other), "keras", ordered=True)),
    )
    assert len(found.matches) == len(layers) - 1
    assert found.unmatched_source == ("fc",)


# What names and orders can do to mislead.


@pytest.mark.parametrize("seed", range(40))
def test_numbers_with_offsets_and_gaps(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(2, 9)
    layers = _convs(count)
    first, step = rng.randint(0, 10**12), rng.randint(1, 7)
    gaps = sorted(rng.sample(range(1000), count))
    source = _named([f"a{first + step * n}" for n in range(count)], layers, ordered=rng.random() < 0.5)
    target = _named([f"b.{n}.w" for n in gaps], layers, ordered=rng.random() < 0.5)
    _matched(source, target)


@pytest.mark.parametrize("seed", range(60))
def test_names_that_the_order_contradicts(seed: int) -> None:
    """The order is the truth, and the names are not."""
    rng = random.Random(seed)
    count = rng.randint(2, 7)
    layers = _convs(count)
    numbers = rng.sample(range(count), count)
    source = _named([f"conv{n}" for n in range(count)], layers)
    if numbers != sorted(numbers):
        assert not _matched(source, _named([f"block.{n}" for n in numbers], layers)).matches
        assert not _matched(source, _named([f"conv{n}" for n in numbers], layers)).matches


@pytest.mark.parametrize(
    ("names", "ordered"),
    [("convs{c}.{b}", True), ("conv_{c}/block_{b}", True), ("convs{c}.{b}", False), ("w{c}_{b}", False)],
)
def test_two_indices_the_other_way_round(names: str, ordered: bool) -> None:
    """Modules in lists by convolution, then by block, are held in that order too.

    w{c}_{b} in that order is left out: names and order then agree on what is false, and no shape speaks.
    """
    layers = [L((0, b), f"conv{c}", c, "conv", (8, 8, 3, 3)) for b in (0, 1) for c in (0, 1)]
    turned = sorted(layers, key=lambda x: (x.number, x.place))
    source = _named([f"blocks.{x.place[1]}.conv{x.number}" for x in layers], layers)
    target = _named([names.format(b=x.place[1], c=x.number) for x in turned], turned, ordered=ordered)
    _matched(source, target)


def test_words_that_are_not_the_same_say_nothing() -> None:
    layers = [x for x in zoo.branches(equal=True) if x.kind != "bn"][1:4] * 2
    layers = [replace(x, place=(i // 3, i % 3)) for i, x in enumerate(layers)]
    source = _named([f"{'ab'[x.place[0]]}.{x.place[1]}" for x in layers], layers)
    target = _named([f"{('second', 'first')[x.place[0]]}.{x.place[1]}" for x in layers], layers)
    assert not _matched(source, target).matches


def test_the_same_words_on_both_sides() -> None:
    layers = [L((), word, 0, "dense", (8, 8)) for word in ("left", "right")]
    source = _named(["left", "right"], layers)
    assert len(_matched(source, source).matches) == 2
    turned = _named(["right", "left"], layers)
    assert not _matched(source, turned).matches


@pytest.mark.parametrize("missing", [0, 1, 7, 19])
def test_a_layer_that_one_side_lacks(missing: int) -> None:
    layers = ARCHITECTURES["ResNet-18"]()
    kernels = [i for i, x in enumerate(layers) if x.kind != "bn"]
    fewer = [x for i, x in enumerate(layers) if i != kernels[missing]]
    source = _side(zoo.write(layers, zoo.torchvision(layers), "torch", ordered=True))
    for names, dialect in ((zoo.keras_applications, "keras"), (zoo.timm, "torch"), (zoo.keras_numbers, "keras")):
        short = _side(zoo.write(fewer, names(fewer), dialect, ordered=dialect == "torch"))
        _matched(source, short)
        _matched(short, source)


@pytest.mark.parametrize("convention", ["torchvision", "keras numbers", "linen", "timm"])
def test_five_blocks_are_not_six(convention: str) -> None:
    def blocks(count: int) -> list[L]:
        return [L((), "stem", 0, "conv", (32, 3, 3, 3)), *zoo.stack(count, 2), L((), "end", 9, "conv", (7, 32, 3, 3))]

    how = CONVENTIONS[convention]
    six, five = blocks(6), blocks(5)
    source = _side(zoo.write(five, how.names(five), how.dialect, ordered=how.ordered))
    target = _side(zoo.write(six, zoo.transformers(six), "torch", ordered=True))
    for one, other in ((source, target), (target, source)):
        found = match(one[0], other[0])
        assert {one[1][m.source][1] for m in found.matches} == {"stem", "end"}


def test_an_extra_layer_takes_no_others_place() -> None:
    layers = _convs(5)
    head = replace(layers[0], word="head", place=())
    source = _named([*(f"blocks.{n}" for n in range(5)), "head"], [*layers, head])
    target = _named([f"stages.{n}" for n in range(6)], _convs(6))
    assert all(m.source != "head" for m in _matched(source, target).matches)


def test_another_model_is_no_full_match() -> None:
    for a, b in itertools.permutations(("ResNet-18", "ResNet-34", "ResNet-50", "VGG-16", "DenseNet", "MobileNetV2"), 2):
        source, target = _made(a, "keras.applications"), _made(b, "torchvision")
        assert source is not None and target is not None
        found = match(source[0], target[0])
        assert len(found.matches) < min(len(source[1]), len(target[1]))


def test_names_of_the_same_numbers() -> None:
    layers = _convs(3)
    source = _named(["conv", "conv_0", "conv_1"], layers)
    target = _named(["block.0", "block.1", "block.2"], layers)
    _matched(source, target)
    source = _named(["conv01", "conv1", "conv2"], layers)
    _matched(source, target)


def test_odd_names() -> None:
    layers = _convs(3)
    target = _named(["block.0", "block.1", "block.2"], layers)
    for names in (["ä.1", "ä.2", "ä.3"], ["٣", "٤", "٥"], ["²", "³", "x"], [f"c{n}" + "9" * 50 for n in (1, 2, 3)],
                  ["", "1", "2"], ["..", ".", "..."], [".".join("1" * 40), "a", "b"]):  # fmt: skip
        _matched(_named(names, layers), target)


@pytest.mark.parametrize("names", [("torchvision", "transformers"), ("keras numbers", "sequential")])
def test_thousands_of_layers(names: tuple[str, str]) -> None:
    layers = [x for x in zoo.stack(1000, 3) if x.kind != "bn"]
    sides = []
    for name in names:
        how = CONVENTIONS[name]
        sides.append(_side(zoo.write(layers, how.names(layers), how.dialect, ordered=how.ordered)))
    start = time.process_time()
    assert len(_matched(sides[0], sides[1]).matches) == len(layers)
    assert time.process_time() - start < 10


# Units.


def test_an_alias_is_no_layer_of_its_own() -> None:
    layers = [L((), "embedding", 0, "dense", (9, 4)), L((), "head", 1, "dense", (9, 4))]
    checkpoint, _ = zoo.write(layers, ["embedding", "head"], "torch", ordered=True)
    tied = Checkpoint("torch", checkpoint.tensors, order_is_meaningful=True,
                      metadata={"tied": {"head.weight": "embedding.weight"}})  # fmt: skip
    units = units_of(tied)
    assert [unit.name for unit in units.units] == ["embedding"]
    assert [(one.name, one.harmless) for one in units.strange] == [("head.weight", True)]


def test_owners_are_believed_only_where_all_fit() -> None:
    """Before an activation, bn1 is in front of conv1."""
    layers = ARCHITECTURES["ResNet-50 V2"]()
    units, _ = _side(zoo.write(layers, zoo.torchvision(layers), "torch", ordered=True))
    assert not [unit for unit in units.units if unit.certain_owner]


def test_statistics_behind_all_parameters_have_no_owner_by_their_place() -> None:
    layers = [L((), "a", 0, "conv", (8, 8, 3, 3)), L((), "a", 0, "bn", (8,)), L((), "b", 1, "dense", (8, 8))]
    checkpoint, _ = zoo.write(layers, ["conv", "other.inner", "head"], "equinox", ordered=True)
    bare = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("other.inner.weight")}
    bare = {name: t for name, t in bare.items() if name != "other.inner.bias"}
    units = units_of(Checkpoint("equinox", bare, order_is_meaningful=True))
    (norm,) = [unit for unit in units.units if unit.kind == "batch norm"]
    assert norm.owner is None
