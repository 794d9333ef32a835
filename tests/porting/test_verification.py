"""Verification names what is wrong with a port, proves it, and finds nothing in a good one.

The pair is two torch models, or a torch and a flax.nnx one: a good port first, and then mistakes are planted in the
target, one and two at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from bnlayer.porting.verification import Verification, verify

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
