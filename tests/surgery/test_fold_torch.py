"""Folded checkpoints compute what torch's models compute, and what is no fold is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnlayer.checkpoint import CheckpointError
from bnlayer.surgery.absorb import absorb
from bnlayer.surgery.edits import Notes
from bnlayer.surgery.epsilon import set_epsilon
from bnlayer.surgery.fold import fold

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
nn = torch.nn
ADAPTER = pytest.importorskip("bnlayer_torch.model").ADAPTER
X = np.random.default_rng(3).normal(size=(2, 9, 7, 4)).astype("f4")
LAYERS: dict[str, Any] = {
    "conv": lambda bias: nn.Conv2d(4, 6, 3, padding=1, bias=bias),
    "depthwise": lambda bias: nn.Conv2d(4, 8, 3, groups=4, bias=bias),
    "grouped": lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias),
    "transposed": lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=bias),
    "grouped transposed": lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=bias),
}


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def close(got: Any, wanted: Any) -> None:
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_convolution(kind: str, bias: bool, affine: bool):
    torch.manual_seed(0)
    channels = 8 if kind == "depthwise" else 6
    model = randomized(nn.Sequential(LAYERS[kind](bias), nn.BatchNorm2d(channels, eps=1e-3, affine=affine), nn.ReLU()))
    checkpoint = ADAPTER.read(model)
    wanted = ADAPTER.run(model, X, training=False).output
    without = fold(checkpoint, model=model, x=X)
    smaller = nn.Sequential(LAYERS[kind](True), nn.Identity(), nn.ReLU())
    close(ADAPTER.run(ADAPTER.write(smaller, without), X, training=False).output, wanted)
    kept = fold(checkpoint, keep=True, model=model, x=X)
    assert ADAPTER.run(model, X, training=False).output.tobytes() == wanted.tobytes()  # the model itself is as it was
    close(ADAPTER.run(ADAPTER.write(model, kept), X, training=False).output, wanted)


def test_dense():
    model = randomized(nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)))
    x = X[:, 0, 0]
    wanted = ADAPTER.run(model, x, training=False).output
    without = fold(ADAPTER.read(model), model=model, x=x)
    assert list(without) == ["0.weight", "0.bias"]
    close(ADAPTER.run(ADAPTER.write(nn.Sequential(nn.Linear(4, 5)), without), x, training=False).output, wanted)


class Block(nn.Module):
    """One whose batch norms come before their namesakes, or whose first output is used twice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        if self.how == "before":
            return self.conv2(self.bn2(self.conv1(self.bn1(x)).relu()).relu())
        y = self.conv1(x)
        z = self.bn2(self.conv2(self.bn1(y).relu()))
        return y + z if self.how == "twice" else z


def test_names_alone_are_believed_and_a_run_is_not_deceived():
    torch.manual_seed(0)
    good = randomized(Block("after"))
    checkpoint, notes = ADAPTER.read(good), Notes()
    assert "bn1.weight" not in fold(checkpoint, note=notes.add)
    assert next(iter(notes.notes["assumed"].values())) == ["bn1", "bn2"]
    before = randomized(Block("before"))
    with pytest.raises(CheckpointError, match=r"bn1: no layer that is called before it"):
        fold(ADAPTER.read(before), model=before, x=X)
    twice = randomized(Block("twice"))
    with pytest.raises(CheckpointError, match=r"bn1: folded into conv1, .* becomes another"):
        fold(ADAPTER.read(twice), model=twice, x=X)
    partial = fold(ADAPTER.read(twice), model=twice, x=X, allow_partial=True)
    assert "bn1.weight" in partial and "bn2.weight" not in partial


def test_an_epsilon_that_the_file_does_not_tell_is_asked_for():
    from dataclasses import replace

    plain = replace(ADAPTER.read(randomized(Block("after"))), layers=())
    with pytest.raises(CheckpointError, match="does not say the epsilon"):
        fold(plain)
    assert len(fold(plain, accept_assumed=True)) == len(fold(plain, epsilon=1e-5)) == 4


@pytest.mark.parametrize("training", [True, False])
def test_absorbed_bias_changes_nothing(training: bool):
    torch.manual_seed(0)
    model = randomized(Block("after")).double()
    checkpoint = ADAPTER.read(model)
    wanted = ADAPTER.run(model, X, training=training)
    trained = ADAPTER.read(model)
    ADAPTER.write(model, absorb(checkpoint, keep=True))
    assert not model.conv1.bias.any()
    close(ADAPTER.run(model, X, training=training).output, wanted.output)
    close(model.bn1.running_mean.numpy(), trained["bn1.running_mean"] - checkpoint["conv1.bias"])
    close(model.bn1.running_var.numpy(), trained["bn1.running_var"])


@pytest.mark.parametrize(("small", "how"), [(False, "moving variance"), (True, "gamma")])
def test_set_epsilon(small: bool, how: str):
    model, notes = randomized(Block("after")), Notes()
    if small:
        model.bn1.running_var.mul_(1e-4)
    wanted = ADAPTER.run(model, X, training=False).output
    made = set_epsilon(ADAPTER.read(model), 1e-3, "bn1", note=notes.add)
    assert how in next(iter(notes.notes["lossy"]))
    ADAPTER.write(model, made)
    model.bn1.eps = 1e-3
    close(ADAPTER.run(model, X, training=False).output, wanted)
    assert {one.name: one.spec.epsilon for one in made.batch_norms()} == {"bn1": 1e-3, "bn2": 1e-5}
