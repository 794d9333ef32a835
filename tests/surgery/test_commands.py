"""The commands that run a model, and what they write beside a checkpoint, on torch models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bnlayer import checkpoint, cli
from bnlayer.porting import load_into
from bnlayer.porting.sidecars import read_sidecar, sidecar, write_sidecar

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")

MODULE = """
from collections import OrderedDict

import torch
from torch import nn

def net(**layers):
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 4, 3), **layers)).eval()

def build():
    return net(bn1=nn.BatchNorm2d(4, eps=1e-3), act=nn.ReLU())

def folded():
    return net(act=nn.ReLU())

def elsewhere():
    return net(act=nn.ReLU(), bn1=nn.BatchNorm2d(4, eps=1e-3))
"""
X = np.random.default_rng(3).normal(size=(7, 6, 5, 3)).astype("f4")
IMAGES = torch.from_numpy(X.transpose(0, 3, 1, 2).copy())


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module above, importable from the working directory, where model.pt lies."""
    (tmp_path / "surgery_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import surgery_models

    model = surgery_models.build()
    for tensor in (model.bn1.weight, model.bn1.bias, model.bn1.running_mean, model.bn1.running_var):
        tensor.data.uniform_(0.5, 2.0)
    torch.save(model.state_dict(), "model.pt")
    yield surgery_models
    del sys.modules["surgery_models"]


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == code, result.output
    return result


def output(model: Any, path: str) -> Any:
    model.load_state_dict(torch.load(path))
    with torch.no_grad():
        return model(IMAGES).numpy()


def close(got: Any, wanted: Any) -> None:
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_fold_with_a_model(models: Any):
    wanted = output(models.build(), "model.pt")
    shown = run("fold", "model.pt", "folded.pt", "--model", "surgery_models:build", "--input", "2,6,5,3").output
    assert "VERIFIED" in shown and "ASSUMED" not in shown
    close(output(models.folded(), "folded.pt"), wanted)
    run("fold", "model.pt", "kept.pt", "--keep", "--model", "surgery_models:build", "--input", "2,6,5,3")
    close(output(models.build(), "kept.pt"), wanted)
    bare = run("fold", "model.pt", "no.pt", "--model", "surgery_models:folded", "--input", "2,6,5,3", code=3).output
    assert "is not of this model" in bare and not Path("no.pt").exists()


def test_fold_refuses_what_a_run_disproves(models: Any):
    torch.save(models.elsewhere().state_dict(), "elsewhere.pt")
    options = ("--model", "surgery_models:elsewhere", "--input", "2,6,5,3")
    assert "does not follow it" in run("fold", "elsewhere.pt", "no.pt", *options, code=3).output
    assert not Path("no.pt").exists()


@pytest.mark.parametrize("size", ["2", "64"])
def test_recalibrate(models: Any, size: str):
    np.savez("x.npz", x=X)
    options = ("--model", "surgery_models:build", "--data", "x.npz", "--batch-size", size)
    assert f"statistics of {-(-7 // int(size))} batches" in run("recalibrate", "model.pt", "new.pt", *options).output
    made, old = torch.load("new.pt"), torch.load("model.pt")
    with torch.no_grad():
        model = models.build()
        model.load_state_dict(old)
        y = model.conv1(IMAGES).double().transpose(0, 1).reshape(4, -1)
    np.testing.assert_allclose(made["bn1.running_mean"], y.mean(1), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(made["bn1.running_var"], y.var(1, unbiased=True), rtol=1e-6)
    assert {name for name in old if not torch.equal(old[name], made[name])} == {"bn1.running_mean", "bn1.running_var"}


def test_recalibrate_takes_batches_of_a_factory_and_refuses_none(models: Any):
    models.nothing = lambda: iter(())
    options = ("--model", "surgery_models:build", "--data", "surgery_models:nothing")
    assert "no batch" in run("recalibrate", "model.pt", "no.pt", *options, code=3).output
    models.batches = lambda: iter([X[:3], X[3:]])
    run("recalibrate", "model.pt", "new.pt", *options[:-1], "surgery_models:batches")


def test_a_new_epsilon_reaches_the_model(models: Any):
    """torch's file does not say epsilon: what is beside it does, through every operation after."""
    wanted = output(models.build(), "model.pt")
    shown = run("set-epsilon", "model.pt", "same.pt", "2e-5", "--from", "1e-3", code=1).output
    assert "decay 0.9 beside" in shown and "same.pt.bnlayer.json" in shown
    model = load_into(models.build(), "same.pt")
    assert model.bn1.eps == 2e-5
    with torch.no_grad():
        close(model(IMAGES).numpy(), wanted)
    # From here on nobody has to say which epsilon it is.
    run("set-epsilon", "same.pt", "back.pt", "1e-3", code=1)
    assert read_sidecar("back.pt")["bn1"].epsilon == 1e-3
    close(output(models.build(), "back.pt"), wanted)
    run("fold", "same.pt", "folded.pt")
    close(output(models.folded(), "folded.pt"), wanted)
    assert not sidecar("folded.pt").exists()  # there is no batch norm left in it
    # A model of another epsilon gets the one that the checkpoint is made for.
    run("fold", "same.pt", "proven.pt", "--model", "surgery_models:build", "--input", "2,6,5,3")
    close(output(models.folded(), "proven.pt"), wanted)
    run("absorb", "same.pt", "absorbed.pt", "--keep")
    run("average", "same.pt", "same.pt", "mean.pt")
    for name in ("absorbed.pt", "mean.pt"):
        assert read_sidecar(name) == read_sidecar("same.pt")
    run("freeze", "same.pt", "frozen.pt")
    assert not sidecar("frozen.pt").exists()


def test_what_is_beside_a_checkpoint_is_never_another_ones(models: Any):
    run("set-epsilon", "model.pt", "same.pt", "2e-5", "--from", "1e-3", code=1)
    Path("same.pt").unlink()
    assert "same.pt.bnlayer.json is there" in run("absorb", "model.pt", "same.pt", code=3).output
    assert not Path("same.pt").exists()
    run("absorb", "model.pt", "same.pt", "--force", "--keep")
    assert not sidecar("same.pt").exists()
    specs = {"bn1": checkpoint.open("model.pt").batch_norms(epsilon=1e-3)[0].spec}
    write_sidecar("model.pt", specs)
    assert "differ" in run("average", "model.pt", "same.pt", "mean.pt", code=3).output
    write_sidecar("model.pt", {**specs, "other": specs["bn1"].replace(epsilon=1.0)}, force=True)
    assert "several epsilons (0.001, 1)" in run("fold", "model.pt", "no.pt", code=3).output
    run("fold", "model.pt", "yes.pt", "--only", "bn1")
