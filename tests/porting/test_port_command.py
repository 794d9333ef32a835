"""`bnlayer port`: what it writes, what it refuses, and its exit codes; with tiny models in a module of the user's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")
import torch

from bnlayer import checkpoint
from bnlayer.cli import main
from bnlayer.porting import load_into

MODULE = "tiny_models_of_this_test"
KEYS = {"matches", "exact", "not_carried", "ambiguous", "unmatched_source", "unmatched_target", "converted", "assumed",
        "lossy", "warnings", "verification"}  # fmt: skip
SMALL = ["--input", "2,9,9,3", "--also-input", "2,8,8,3"]
CODE = """
import torch
from torch import nn

def seeded(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tracked"):
                tensor.fill_(100)
            elif name.endswith("var"):
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=g) * 0.5)
    return model.eval()

class Mine(nn.Module):
    def __init__(self, momentum=0.1, eps=1e-5):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.stem_bn = nn.BatchNorm2d(4, momentum=momentum, eps=eps)
        self.body = nn.Conv2d(4, 6, 3, bias=False)
        self.body_bn = nn.BatchNorm2d(6, momentum=momentum, eps=eps)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.stem_bn(self.stem(x)))
        x = torch.relu(self.body_bn(self.body(x)))
        return self.head(x.mean((2, 3)))

class Theirs(nn.Module):
    def __init__(self, eps=1e-5, extra=False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=eps), nn.ReLU(),
            nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=eps), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        )
        self.extra = nn.Linear(2, 2) if extra else None

    def forward(self, x):
        return self.net(x)

class Twins(nn.Module):
    \"\"\"Two convolutions of equal shape.\"\"\"
    def __init__(self, words):
        super().__init__()
        self.words = words
        self.bn = nn.BatchNorm2d(3)
        for word in words:
            setattr(self, word, nn.Conv2d(3, 3, 3, padding=1, bias=False))

    def forward(self, x):
        x = self.bn(x)
        for word in sorted(self.words):
            x = torch.relu(getattr(self, word)(x))
        return x.mean((2, 3))

def mine(): return seeded(Mine(), 1)
def theirs(): return seeded(Theirs(), 2)
def theirs_other_epsilon(): return seeded(Theirs(eps=1e-3), 2)
def theirs_with_more(): return seeded(Theirs(extra=True), 2)
def planted():
    model = seeded(Theirs(), 2)
    model.net[0].padding = (1, 1)
    return model
def twins(): return seeded(Twins(["bert", "alice"]), 3)
def other_twins(): return seeded(Twins(["yves", "xenia"]), 4)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the models' module, and `mine` in mine.pt."""
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    torch.save(model("mine").state_dict(), tmp_path / "mine.pt")
    return tmp_path


def model(name: str) -> Any:
    return getattr(__import__(MODULE), name)()


def port(*words: str, code: int) -> Result:
    done = CliRunner().invoke(main, ["port", *words])
    assert done.exit_code == code, done.output
    return done


def written(folder: Path) -> set[str]:
    """But for what was there before, and Python's own."""
    return {path.name for path in folder.iterdir()} - {f"{MODULE}.py", "mine.pt", "__pycache__"}


def evaluated(one: Any) -> torch.Tensor:
    with torch.no_grad():
        return one.eval()(torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5)))


def test_a_port(here: Path) -> None:
    done = port("mine.pt", "theirs.pt", "--template", f"{MODULE}:theirs", "--report", "out.json", code=0)
    assert "5 layers matched" in done.output
    assert written(here) == {"theirs.pt", "theirs.pt.bnlayer.json", "out.json"}
    torch.testing.assert_close(evaluated(load_into(model("theirs"), "theirs.pt")), evaluated(model("mine")))
    report = json.loads((here / "out.json").read_text())
    assert report.keys() >= KEYS
    pairs = {(m["source"], m["target"]) for m in report["matches"]}
    assert pairs == {
        ("stem", "net.0"),
        ("stem_bn", "net.1"),
        ("body", "net.3"),
        ("body_bn", "net.4"),
        ("head", "net.8"),
    }
    assert all(m.keys() == {"source", "target", "kind", "votes"} for m in report["matches"])
    beside = json.loads((here / "theirs.pt.bnlayer.json").read_text())
    assert beside["batch_norms"].keys() == {"net.1", "net.4"}


def test_a_dry_run_writes_nothing(here: Path) -> None:
    port("mine.pt", "theirs.pt", "--template", f"{MODULE}:theirs", "--dry-run", code=0)
    assert written(here) == set()


@pytest.mark.parametrize("there", ["theirs.pt", "theirs.pt.bnlayer.json"])
def test_a_file_that_is_there_is_kept_unless_forced(here: Path, there: str) -> None:
    (here / there).write_text("precious")
    words = ["mine.pt", "theirs.pt", "--template", f"{MODULE}:theirs"]
    assert "--force" in port(*words, code=3).output
    assert (here / there).read_text() == "precious"
    assert written(here) == {there}
    port(*words, "--force", code=0)
    load_into(model("theirs"), "theirs.pt")


def test_a_template_that_is_a_file(here: Path) -> None:
    torch.save(model("theirs").state_dict(), here / "like.pt")
    port("mine.pt", "theirs.pt", "--template", "like.pt", code=0)
    torch.testing.assert_close(evaluated(load_into(model("theirs"), "theirs.pt")), evaluated(model("mine")))


def test_what_has_no_counterpart_is_refused_or_allowed(here: Path) -> None:
    words = ["mine.pt", "theirs.pt", "--template", f"{MODULE}:theirs_with_more"]
    refused = port(*words, "--report", "out.json", code=3)
    assert "extra" in refused.output
    assert "nothing was written" in refused.output
    assert written(here) == {"out.json"}  # the report says why
    assert json.loads((here / "out.json").read_text())["unmatched_target"] == ["extra"]
    port(*words, "--allow-partial", code=1)
    ported, untouched = load_into(model("theirs_with_more"), "theirs.pt"), model("theirs_with_more")
    assert torch.equal(ported.extra.weight, untouched.extra.weight)
    torch.testing.assert_close(evaluated(ported), evaluated(model("mine")))


def test_batch_norms_alone(here: Path) -> None:
    port("mine.pt", "theirs.pt", "--template", f"{MODULE}:theirs_with_more", "--only", "bn", code=0)
    ported, untouched, source = load_into(model("theirs_with_more"), "theirs.pt"), model("theirs"), model("mine")
    assert torch.equal(ported.net[0].weight, untouched.net[0].weight)
    assert torch.equal(ported.net[4].running_mean, source.body_bn.running_mean)


def test_a_rules_file(here: Path) -> None:
    torch.save(model("twins").state_dict(), here / "twins.pt")
    words = ["twins.pt", "other.pt", "--template", f"{MODULE}:other_twins"]
    assert "AMBIGUOUS" in port(*words, code=3).output
    (here / "map.toml").write_text("[[rule]]\nsrc = 'alice'\ndst = 'xenia'\n[[rule]]\nsrc = 'bert'\ndst = 'yves'\n")
    port(*words, "--map", "map.toml", code=0)
    torch.testing.assert_close(evaluated(load_into(model("other_twins"), "other.pt")), evaluated(model("twins")))
    (here / "map.toml").write_text("[[rule]]\nsrc = 'nobody'\ndst = 'xenia'\n")
    assert "matches no layer" in port(*words, "--map", "map.toml", "--force", code=3).output
    assert "No such file" in port(*words, "--map", "none.toml", "--force", code=3).output


def test_a_run_decides_between_equal_shapes(here: Path) -> None:
    torch.save(model("twins").state_dict(), here / "twins.pt")
    done = port(
        "twins.pt", "other.pt", "--template", f"{MODULE}:other_twins", "--verify-src", f"{MODULE}:twins",
        "--verify-dst", f"{MODULE}:other_twins", *SMALL, "--report", "out.json", code=0,
    )  # fmt: skip
    assert "chosen by a run: error" in done.output
    report = json.loads((here / "out.json").read_text())
    pairs = {m["source"]: m["target"] for m in report["matches"]}
    assert pairs == {"alice": "xenia", "bert": "yves", "bn": "bn"}
    assert report["verification"]["ok"]
    torch.testing.assert_close(evaluated(load_into(model("other_twins"), "other.pt")), evaluated(model("twins")))


def test_verification_finds_what_the_files_cannot_tell(here: Path) -> None:
    words = ["mine.pt", "theirs.pt", "--template", f"{MODULE}:theirs", "--verify-src", f"{MODULE}:mine", *SMALL]
    refused = port(*words, "--verify-dst", f"{MODULE}:planted", code=3)
    assert "FAILED" in refused.output
    assert "the first layer that differs is net.1" in refused.output
    assert written(here) == set()
    done = port(*words, "--verify-dst", f"{MODULE}:theirs", code=0)
    assert done.output.count("VERIFIED") == 6
    port(*words, "--verify-dst", f"{MODULE}:planted", "--allow-partial", "--force", code=1)
    assert "go together" in port(*words, code=2).output


def spec_beside(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(path.name + ".bnlayer.json").read_text())["batch_norms"]["net.1"]


def test_momentum_is_in_the_sense_of_the_source(here: Path) -> None:
    words = ["theirs.pt", "--template", f"{MODULE}:theirs"]
    port("mine.pt", *words, "--src-momentum", "0.01", "--src-epsilon", "0.002", code=0)
    assert spec_beside(here / "theirs.pt")["decay"] == pytest.approx(0.99)
    assert spec_beside(here / "theirs.pt")["epsilon"] == 0.002
    loaded = load_into(model("theirs"), "theirs.pt")
    assert loaded.net[1].momentum == pytest.approx(0.01)
    assert loaded.net[1].eps == 0.002
    own = model("mine").state_dict()
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    arrays = {}
    for name, tensor in own.items():
        layer, leaf = name.rsplit(".", 1)
        if layer.endswith("bn") and leaf in names:
            arrays[f"{layer}/{names[leaf]}"] = tensor.numpy()
        elif leaf != "num_batches_tracked":
            kernel = tensor.numpy()
            value = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
            arrays[f"{layer}/{'kernel' if leaf == 'weight' else 'bias'}"] = value
    np.savez(here / "keras.npz", **arrays)
    port("keras.npz", *words, "--src-dialect", "keras", "--src-momentum", "0.99", "--force", code=0)
    assert spec_beside(here / "theirs.pt")["decay"] == pytest.approx(0.99)
    done = port("keras.npz", *words, "--src-dialect", "keras", "--force", code=0)
    assert "ASSUMED" in done.output


def test_epsilon_carried_or_shifted(here: Path) -> None:
    words = ["mine.pt", "theirs.pt", "--template", f"{MODULE}:theirs_other_epsilon"]
    port(*words, code=0)
    carried = load_into(model("theirs_other_epsilon"), "theirs.pt")
    assert carried.net[1].eps == 1e-5
    assert torch.equal(carried.net[1].running_var, model("mine").stem_bn.running_var)
    torch.testing.assert_close(evaluated(carried), evaluated(model("mine")))
    done = port(*words, "--epsilon", "shift", "--force", code=1)
    assert "LOSSY" in done.output
    shifted = load_into(model("theirs_other_epsilon"), "theirs.pt")
    assert shifted.net[1].eps == 1e-3
    torch.testing.assert_close(evaluated(shifted), evaluated(model("mine")))


def test_copies_in_the_same_dialect_need_no_template(here: Path) -> None:
    pytest.importorskip("safetensors")
    port("mine.pt", "copy.safetensors", code=0)
    port("copy.safetensors", "copy.npz", code=0)
    port("copy.npz", "copy", "--to", "safetensors", code=0)
    own = model("mine").state_dict()
    for name in ("copy.safetensors", "copy.npz", "copy"):
        copy = checkpoint.open(here / name)
        assert set(copy) == set(own)
        for key, tensor in own.items():
            np.testing.assert_array_equal(copy[key], tensor.numpy())


def test_another_dialect_needs_a_template(here: Path) -> None:
    assert "--template" in port("mine.pt", "mine.weights.h5", code=2).output
    assert written(here) == set()


@pytest.mark.parametrize("factory", ["no_such_module:build", f"{MODULE}:no_such_function"])
def test_unknown_factories_are_usage_errors(here: Path, factory: str) -> None:
    port("mine.pt", "theirs.pt", "--template", factory, code=2)
    assert written(here) == set()


def test_damaged_and_absent_sources(here: Path) -> None:
    whole = (here / "mine.pt").read_bytes()
    (here / "damaged.pt").write_bytes(whole[: len(whole) // 2])
    for source in ("damaged.pt", "absent.pt"):
        done = port(source, "theirs.pt", "--template", f"{MODULE}:theirs", code=3)
        assert source in done.output
        assert "Traceback" not in done.output
    assert written(here) == {"damaged.pt"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"bnlayer": 2, "batch_norms": {}}', '{"bnlayer": 1, "batch_norms": {"net.1": 3}}',
             '{"bnlayer": 1, "batch_norms": {"net.1": {"epsilon": -1}}}'],
)  # fmt: skip
def test_a_damaged_sidecar_is_refused(here: Path, text: str) -> None:
    from bnlayer.errors import FileError

    port("mine.pt", "theirs.pt", "--template", f"{MODULE}:theirs", code=0)
    (here / "theirs.pt.bnlayer.json").write_text(text)
    before = model("theirs")
    held: Callable[[Any], list[torch.Tensor]] = lambda one: [t.clone() for t in one.state_dict().values()]  # noqa: E731
    was = held(before)
    with pytest.raises(FileError, match=r"theirs\.pt\.bnlayer\.json"):
        load_into(before, "theirs.pt")
    assert all(torch.equal(a, b) for a, b in zip(was, held(before), strict=True))
