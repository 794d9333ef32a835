"""Verification names what is wrong with a port, proves it, and finds nothing in a good one.

The pair is two torch models, or a torch and a flax.nnx one: a good port first, and then mistakes are planted in the
target, one and two at a time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from bnlayer.commands.verify import command
from bnlayer.errors import BatchNormError
from bnlayer.porting.matching import Ambiguous, Match
from bnlayer.porting.planning import plan
from bnlayer.porting.rules import Rules
from bnlayer.porting.swaps import try_swaps
from bnlayer.porting.units import units_of
from bnlayer.porting.verification import Verification, verify
from bnlayer.registry import adapter

torch = pytest.importorskip("torch")
nn = torch.nn

LAYERS = ["stem", "stem_bn", "left", "left_bn", "right", "right_bn", "down", "down_bn", "head"]
SAME_NAMES = [(name, name) for name in LAYERS]
SHAPES = [(3, 17, 17, 3), (3, 16, 16, 3)]


class Net(nn.Module):
    """Two branches of equal shape, a strided convolution whose padding shows, a dense layer."""

    def __init__(self, same: bool = False) -> None:
        super().__init__()
        self.same = same
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.left_bn = nn.BatchNorm2d(8)
        self.right = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.right_bn = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2, bias=False)
        self.down_bn = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = x + torch.relu(self.left_bn(self.left(x)))
        x = x + torch.relu(self.right_bn(self.right(x)))
        # SAME: at odd sizes one on both sides, at even ones none before.
        before = 1 if x.shape[-1] % 2 or not self.same else 0
        x = nn.functional.pad(x, (before, 1, before, 1))
        x = torch.relu(self.down_bn(self.down(x)))
        return self.head(x.mean(dim=(2, 3)))


def trained(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(100)
    return model.eval()


def good_port(source: Any) -> Any:
    target = Net()
    target.load_state_dict(source.state_dict())
    return target.eval()


def inverted_momentum(model: Any) -> tuple[str, str]:
    model.left_bn.momentum = 0.9
    return "momentum-inverted", "left_bn"


def epsilon(model: Any) -> tuple[str, str]:
    model.stem_bn.eps = 1e-3
    return "epsilon", "stem_bn"


def at_start(model: Any) -> tuple[str, str]:
    model.down_bn.running_mean.zero_()
    model.down_bn.running_var.fill_(1)
    return "statistics-at-start", "down_bn"


def swapped(model: Any) -> tuple[str, str]:
    mean, variance = model.stem_bn.running_mean.clone(), model.stem_bn.running_var.clone()
    model.stem_bn.running_mean.copy_(variance)
    model.stem_bn.running_var.copy_(mean)
    return "mean-and-variance-swapped", "stem_bn"


def padding(model: Any) -> tuple[str, str]:
    model.same = True
    return "padding", "down_bn"


def order(model: Any) -> tuple[str, str]:
    state = dict(model.state_dict())
    for name in list(state):
        if name.startswith("left"):
            other = name.replace("left", "right")
            a, b = state[name].clone(), state[other].clone()
            state[name], state[other] = b, a
    model.load_state_dict(state)
    return "order", "left"


def never_training(model: Any) -> tuple[str, str]:
    model.right_bn.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", False))
    return "never-training", "right_bn"


def train_mode(model: Any) -> tuple[str, str]:
    model.right_bn.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", True))
    return "train-mode", "right_bn"


MISTAKES: list[Callable[[Any], tuple[str, str]]] = [
    inverted_momentum, epsilon, at_start, swapped, padding, order, never_training, train_mode,
]  # fmt: skip
# One layer cannot both train always and never.
PAIRS = [pair for pair in combinations(MISTAKES, 2) if set(pair) != {never_training, train_mode}]


def named(found: Verification) -> dict[str, tuple[str, ...]]:
    return {cause.code: cause.layers for cause in found.causes}


def planted(*mistakes: Callable[[Any], tuple[str, str]]) -> tuple[Verification, dict[str, str]]:
    source = trained()
    target = good_port(source)
    with torch.no_grad():
        expected = dict(mistake(target) for mistake in mistakes)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    found = verify(source, target, SAME_NAMES, shapes=SHAPES)
    after = target.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "its tensors were not put back"
    return found, expected


def test_a_good_port_has_no_cause() -> None:
    found, _ = planted()
    assert found.ok, str(found)
    assert found.causes == ()
    assert [step.name for step in found.steps] == [
        "static", "round trip", "replay", "eval 3x17x17x3", "eval 3x16x16x3", "train",
    ]  # fmt: skip
    assert found.to_dict()["ok"] is True


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_one_mistake_is_named_with_its_layer(mistake: Callable[[Any], tuple[str, str]]) -> None:
    found, expected = planted(mistake)
    assert not found.ok
    assert named(found).keys() == expected.keys(), str(found)
    for code, layer in expected.items():
        assert layer in named(found)[code], str(found)
        if code != "order":
            assert named(found)[code] == (layer,), str(found)
        (cause,) = (cause for cause in found.causes if cause.code == code)
        assert cause.before > 5 * cause.after
        assert cause.proof
        assert cause.remedy


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}")
def test_two_mistakes_are_both_named(pair: Any) -> None:
    found, expected = planted(*pair)
    assert named(found).keys() == expected.keys(), str(found)
    assert all(layer in named(found)[code] for code, layer in expected.items()), str(found)


@pytest.mark.parametrize(
    "pair",
    [(epsilon, swapped), (epsilon, train_mode), (at_start, train_mode), (inverted_momentum, train_mode)],
    ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}",
)
def test_two_mistakes_in_one_layer_are_both_named(pair: Any) -> None:
    source = trained()
    target = good_port(source)
    moved = {"right_bn": "stem_bn", "left_bn": "stem_bn", "down_bn": "stem_bn", "stem_bn": "stem_bn"}

    class OneLayer:
        def __getattr__(self, name: str) -> Any:
            return getattr(target, moved.get(name, name))

    with torch.no_grad():
        codes = {mistake(OneLayer())[0] for mistake in pair}
    found = verify(source, target, SAME_NAMES, shapes=SHAPES)
    assert named(found) == dict.fromkeys(codes, ("stem_bn",)), str(found)


def crossed(*names: str) -> list[tuple[str, str]]:
    """The matching with two branches taken for each other, and a target that was filled by it."""
    other = {"left": "right", "right": "left", "left_bn": "right_bn", "right_bn": "left_bn"}
    return [(name, other.get(name, name)) for name in LAYERS]


@pytest.mark.parametrize("mistakes", [(), (epsilon, padding), (train_mode,), (at_start, inverted_momentum)])
def test_a_matching_in_the_wrong_order_is_named_beside_others(mistakes: Any) -> None:
    source = trained()
    target = good_port(source)
    with torch.no_grad():
        order(target)
        expected = dict(mistake(target) for mistake in mistakes)
    found = verify(source, target, crossed(), shapes=SHAPES)
    assert named(found).keys() == {"order", *expected}, str(found)
    assert set(named(found)["order"]) == {"left", "right"}


def test_random_values_are_planted_in_a_new_model_and_taken_back() -> None:
    torch.manual_seed(1)
    source = Net().eval()
    target = good_port(source)
    found = verify(source, target, SAME_NAMES, shapes=SHAPES)
    assert found.ok, str(found)
    assert "random" in found.notes[0]
    with torch.no_grad():
        mean, variance = target.stem_bn.running_mean, target.stem_bn.running_var
        mean.fill_(1)
        variance.zero_()
        order(target)
    found = verify(source, target, SAME_NAMES, shapes=SHAPES)
    assert named(found).keys() == {"mean-and-variance-swapped", "order"}, str(found)
    assert (target.stem_bn.running_mean == 1).all()
    assert (source.stem_bn.running_mean == 0).all()
    assert (source.stem_bn.weight == 1).all()


def test_a_bias_in_the_moving_mean_is_no_mistake() -> None:
    class Biased(Net):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)

    torch.manual_seed(0)
    source = Biased()
    source.load_state_dict(trained().state_dict() | {"stem.bias": torch.randn(8)})
    target = Net()
    state = {name: value for name, value in source.state_dict().items() if name != "stem.bias"}
    state["stem_bn.running_mean"] = state["stem_bn.running_mean"] - source.stem.bias.detach()
    target.load_state_dict(state)
    found = verify(source.eval(), target.eval(), SAME_NAMES, shapes=SHAPES)
    assert found.ok, str(found)


def test_an_unmatched_batch_norm_is_not_passed_over() -> None:
    source = trained()
    pairs = [pair for pair in SAME_NAMES if "left_bn" not in pair]
    found = verify(source, good_port(source), pairs, shapes=SHAPES)
    assert not found.ok
    assert "left_bn" in found.steps[0].details


@pytest.mark.parametrize("filled", ["as it is", "crossed"])
def test_swaps_decide_what_names_and_shapes_cannot(filled: str) -> None:
    source = trained()
    target = trained(1)
    names = sorted(LAYERS[2:6], key=LAYERS.index)
    reach = adapter(source)
    undecided = plan(reach.read(source), reach.read(target), given=None)
    pairs = {m.source: m for m in undecided.matching.matches}
    other = {"left": "right", "right": "left", "left_bn": "right_bn", "right_bn": "left_bn"}
    goal = {name: name if filled == "as it is" else other[name] for name in names}
    matching = replace(
        undecided.matching,
        matches=tuple(Match(n, n, m.kind if (m := pairs.get(n)) else "", ("names",)) for n in LAYERS if n not in names),
        ambiguous=(
            Ambiguous(("left", "right"), ("left", "right"), "", tuple((n, goal[n]) for n in ("left", "right"))),
            Ambiguous(
                ("left_bn", "right_bn"), ("left_bn", "right_bn"), "",
                tuple((n, goal[n]) for n in ("left_bn", "right_bn")),
            ),
        ),
    )  # fmt: skip
    before = {name: value.clone() for name, value in target.state_dict().items()}
    found = try_swaps(replace(undecided, matching=matching), source, target, SHAPES[0])
    assert {(one.source, one.target) for one in found} == {(name, name) for name in names}
    for one in found:
        assert one.after < 1e-5 < one.next_best
        assert (one.before > 1e-3) == (filled == "crossed")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_swaps_leave_twins_undecided() -> None:
    """Two layers of the same values: either order gives the same outputs."""
    source = trained()
    state = source.state_dict()
    for name in [name for name in state if name.startswith("left")]:
        state[name.replace("left", "right")] = state[name].clone()
    source.load_state_dict(state)
    reach = adapter(source)
    target = trained(1)
    undecided = plan(reach.read(source), reach.read(target))
    rest = tuple(Match(n, n, "", ("names",)) for n in LAYERS if not n.startswith(("left", "right")))
    twins = tuple(
        Ambiguous((f"left{end}", f"right{end}"), (f"left{end}", f"right{end}"), "",
                  ((f"left{end}", f"left{end}"), (f"right{end}", f"right{end}")))
        for end in ("", "_bn")
    )  # fmt: skip
    matching = replace(undecided.matching, matches=rest, ambiguous=twins)
    # The branches come one after the other, so their order shows unless they are twins.
    assert try_swaps(replace(undecided, matching=matching), source, target, SHAPES[0]) == []


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("models_of_this_test")
    source = trained()
    wrong = good_port(source)
    wrong.down_bn.eps = 1e-3
    module.source, module.good, module.wrong = lambda: source, lambda: good_port(source), lambda: wrong  # type: ignore[attr-defined]
    module.other = lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "models_of_this_test", module)
    shapes = ["--input", "3,17,17,3", "--also-input", "3,16,16,3"]

    def run(target: str, *more: str) -> Any:
        arguments = ["models_of_this_test:source", f"models_of_this_test:{target}", *shapes, *more]
        return CliRunner().invoke(command, arguments)

    done = run("wrong", "--json")
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert done.exit_code == 1
    assert "epsilon" in {cause["code"] for cause in document["causes"]}
    rules = tmp_path / "same.toml"
    rules.write_text("[[rule]]\nsrc = '(left|right)(_bn)?'\ndst = '{1}{2}'\n")
    text = run("good", "--map", str(rules))
    assert text.exit_code == 0, text.output
    assert "VERIFIED" in text.output
    assert isinstance(run("good", "--map", str(tmp_path / "none.toml")).exception, BatchNormError)
    assert run("good", "--input", "3").exit_code == 2
    assert isinstance(run("other").exception, BatchNormError)


def jax_port(source: Any) -> Any:
    """The same net in flax.nnx, filled by the plan."""
    nnx = pytest.importorskip("flax.nnx")
    jax = pytest.importorskip("jax")

    class Twin(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            def conv(inputs: int, outputs: int, **options: Any) -> Any:
                return nnx.Conv(inputs, outputs, (3, 3), use_bias=False, rngs=rngs, **options)

            self.edges = ((1, 1), (1, 1))
            self.stem, self.stem_bn = conv(3, 8), nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
            self.left, self.left_bn = conv(8, 8), nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
            self.right, self.right_bn = conv(8, 8), nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
            self.down, self.down_bn = (
                conv(8, 12, strides=2, padding=self.edges),
                nnx.BatchNorm(12, momentum=0.9, rngs=rngs),
            )
            self.head = nnx.Linear(12, 5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = jax.nn.relu(self.stem_bn(self.stem(x)))
            x = x + jax.nn.relu(self.left_bn(self.left(x)))
            x = x + jax.nn.relu(self.right_bn(self.right(x)))
            x = jax.nn.relu(self.down_bn(self.down(x)))
            return self.head(x.mean(axis=(1, 2)))

    model = Twin(nnx.Rngs(0))
    reach = adapter(model)
    units = units_of(reach.read(model))
    pairs = dict(zip(LAYERS, sorted((u.name for u in units.units), key=LAYERS.index), strict=True))
    made = plan(adapter(source).read(source), units.checkpoint, given=identity())
    assert not made.refused, made.report
    assert pairs == {m.source: m.target for m in made.matching.matches}
    return reach.write(model, made.apply())


def identity() -> Rules:
    return Rules(rules=((re.compile("(left|right)(_bn)?"), "{1}{2}", None),))


def test_another_framework_is_judged_alike() -> None:
    source = trained()
    target = jax_port(source)
    found = verify(source, target, SAME_NAMES, shapes=SHAPES)
    assert found.ok, str(found)
    assert "n/(n-1)" in found.steps[-1].text
    target.stem_bn.epsilon = 1e-3
    target.left_bn.momentum = 0.1
    target.down.padding = "SAME"
    found = verify(source, target, SAME_NAMES, shapes=SHAPES)
    assert named(found) == {
        "epsilon": ("stem_bn",), "momentum-inverted": ("left_bn",), "padding": ("down_bn",),
    }, str(found)  # fmt: skip
