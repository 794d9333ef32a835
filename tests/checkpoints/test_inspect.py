"""`bnlayer inspect`: the table, the JSON, the exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bnlayer.checkpoint import Checkpoint, Tensor
from bnlayer.cli import main

from .test_diagnostics import healthy, new


def written(path: Path, **layers: dict[str, np.ndarray]) -> Path:
    tensors = {f"{layer}.{n}": Tensor.of(a) for layer, arrays in layers.items() for n, a in arrays.items()}
    Checkpoint("torch", tensors, order_is_meaningful=True).save(path)
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_a_healthy_file(tmp_path: Path) -> None:
    done = run(written(tmp_path / "x.pt", bn1=healthy(), bn2=healthy(1)))
    assert done.exit_code == 0
    assert "torch: " in done.output
    assert "2 batch norms, 32 channels" in done.output
    assert "Nothing to report." in done.output


def test_json_has_the_documented_keys(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt", bn1=healthy(), bn2=new())
    done = run(path, "--json")
    document = json.loads(done.output)
    assert list(document) == [
        "format",
        "size",
        "tensors",
        "order_is_meaningful",
        "batch_norms",
        "ambiguous",
        "diagnoses",
    ]
    assert (document["format"], document["size"], document["tensors"]) == ("torch", path.stat().st_size, 10)
    first = document["batch_norms"][0]
    assert {"name", "num_features", "present", "missing", "spec", "sources"} <= set(first)
    assert (first["name"], first["num_features"], first["missing"]) == ("bn1", 16, [])
    assert first["present"] == ["gamma", "beta", "moving_mean", "moving_variance", "num_updates"]
    assert first["sources"]["epsilon"] == "assumed"
    (diagnosis,) = document["diagnoses"]
    assert list(diagnosis) == ["layer", "code", "severity", "message", "remedy"]
    assert (diagnosis["layer"], diagnosis["code"], done.exit_code) == ("bn2", "statistics-at-start", 1)


def test_only_errors_make_exit_code_1(tmp_path: Path) -> None:
    behind = healthy(1, num_batches_tracked=np.array(3))
    done = run(written(tmp_path / "x.pt", a=healthy(), b=behind))
    assert "WARNING b (statistics-behind)" in done.output
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"hello", "begins with"), (b"PK\x03\x04 and no more", "damaged or cut off")],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_3(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    done = run(path)
    assert done.exit_code == 3
    assert says in done.output
    assert str(path) in done.output
    assert "Traceback" not in done.output


def test_hand_written_names(tmp_path: Path) -> None:
    arrays = {"l1/scale": 1.5, "l1/offset": 0.5, "l1/pop_mean": 0.25, "l1/pop_var": 2.0}
    tensors = {name: Tensor.of(np.full(4, value, np.float32)) for name, value in arrays.items()}
    path = tmp_path / "x.npz"
    Checkpoint("npz", tensors, order_is_meaningful=True).save(path)
    assert "No batch norm was found" in run(path).output
    done = run(path, "--names", "gamma=scale,beta=offset,moving_mean=pop_mean,moving_variance=pop_var", "--json")
    (one,) = json.loads(done.output)["batch_norms"]
    assert one["name"] == "l1"
    assert run(path, "--names", "gamma").exit_code == 2
    assert run(path, "--names", "gamma=scale").exit_code == 3


def test_many_layers_are_cut_in_the_table_and_not_in_the_json(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt", **{f"layer{i}": healthy(i) for i in range(100)})
    assert "60 more" in run(path).output
    assert len(json.loads(run(path, "--json").output)["batch_norms"]) == 100


def test_an_equinox_file_takes_its_names_from_a_template(tmp_path: Path) -> None:
    names = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    arrays = [np.full(3, float(i + 1), np.float32) for i in range(4)]
    with (tmp_path / "x.eqx").open("wb") as file:
        for array in arrays:
            np.save(file, array)
    tensors = {name: Tensor.of(array) for name, array in zip(names, arrays, strict=True)}
    Checkpoint("npz", tensors, order_is_meaningful=True).save(tmp_path / "like.npz")
    assert "No batch norm was found" in run(tmp_path / "x.eqx").output
    done = run(tmp_path / "x.eqx", "--template", tmp_path / "like.npz", "--json")
    assert [one["name"] for one in json.loads(done.output)["batch_norms"]] == ["bn"]
    Checkpoint("npz", dict(list(tensors.items())[:3]), order_is_meaningful=True).save(tmp_path / "short.npz")
    done = run(tmp_path / "x.eqx", "--template", tmp_path / "short.npz")
    assert (done.exit_code, "4 arrays" in done.output) == (3, True)


def test_help_teaches() -> None:
    done = run("--help")
    assert done.exit_code == 0
    for word in (".weights.h5", "Orbax", "--names", "Exit codes", "bnlayer inspect training.pt --key model_ema"):
        assert word in done.output
