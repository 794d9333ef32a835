"""The benchmarks themselves: they compare before they time, say what they cannot do, and judge as they say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks import document, steps  # noqa: E402
from benchmarks.backends import SUITES  # noqa: E402
from benchmarks.cases import Case, Job, Pair  # noqa: E402
from benchmarks.timing import ratio  # noqa: E402
from benchmarks.worker import Differs, rows  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def case(y: Any, *, bar: float | None = None, ours: Callable[[], object] = lambda: None) -> Case:
    good = np.linspace(-1, 1, 6).reshape(2, 3)
    pair = Pair(ours, lambda: sum(range(2000)), lambda: ((np.asarray(y),), (good,)))
    return Case("numpy", "textbook", "eval", "float32", "NC", (2, 3), bar, lambda: pair)


def test_a_run_has_a_table_figures_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "run.json", tmp_path / "run.png"
    done = run("--only", "numpy", "--match", "*/NC/8x64/*/eval", "--rounds", "5", "--json", str(figures),
               "--plot", str(picture))  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads(figures.read_text("utf-8"))
    (row,) = written["rows"]
    assert row["name"] == "numpy/textbook/NC/8x64/float32/eval"
    assert row["name"] in done.stdout
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert row["memory"] is None or row["memory"] > 0
    assert written["machine"]["numpy"] == np.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--match", "nothing*"), "no case of numpy matches 'nothing*'; --list"), (("--rounds", "0"), "x>=1")],
)
def test_what_cannot_be_timed_is_no_success(arguments: tuple[str, ...], said: str) -> None:
    done = run("--only", "numpy", *arguments)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


def test_the_page_counts_what_is_reached(tmp_path: Path) -> None:
    page, files = tmp_path / "page.md", [tmp_path / "1.json", tmp_path / "2.json"]
    page.write_text(f"before\n{document._BEGIN}\nold\n{document._END}\nafter\n", "utf-8")
    common = {"suite": "numpy", "backend": "numpy", "peer": "textbook", "layout": "NC", "dtype": "float32", "bar": 0.5}
    for file, reached in zip(files, ((True, True, False), (True, False, False)), strict=True):
        found = [
            {**common, "name": mode, "mode": mode, "shape": [8, 64], "ratio": 0.4, "reached": yes, "copies": 2.0}
            for mode, yes in zip(("eval", "train", "grad"), reached, strict=True)
        ]
        file.write_text(json.dumps({"machine": {"python": "3"}, "rows": found}), "utf-8")
    done = CliRunner().invoke(document.main, [*map(str, files), "--write", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text("utf-8")
    assert "1 of 3 cells with a bar reach it in all 2 runs; in each run alone 2, 1 do." in text
    assert "by the number of runs: 1 in 1, 1 in 0." in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text


def test_the_steps_of_a_small_call_are_shown() -> None:
    shown = CliRunner().invoke(steps.main, ["--rounds", "20"])
    assert shown.exit_code == 0, shown.output
    for mode in ("eval", "train", "grad"):
        assert f"{mode}: the textbook takes" in shown.output


def test_results_that_differ_are_never_timed() -> None:
    right = np.linspace(-1, 1, 6).reshape(2, 3)
    assert next(rows("time", iter([case(right)]), 5))["ratio"] > 0
    for wrong in (right + 1e-3, right * np.nan):
        with pytest.raises(Differs, match="differ by"):
            next(rows("time", iter([case(wrong)]), 5))


def test_a_bar_is_reached_where_the_lower_end_of_the_interval_is() -> None:
    right = np.linspace(-1, 1, 6).reshape(2, 3)
    assert next(rows("time", iter([case(right, bar=1.0)]), 9))["reached"] is True  # nothing against a sum
    slow = case(right, bar=1.0, ours=lambda: sum(range(20000)))
    assert next(rows("time", iter([slow]), 9))["reached"] is False
    assert next(rows("time", iter([case(right)]), 5))["reached"] is None


def test_the_interval_of_the_median_holds_it_as_often_as_it_says() -> None:
    chance, held, times = random.Random(0), 0, 2000
    for _ in range(times):
        pairs = [chance.lognormvariate(0, 0.5) for _ in range(21)]  # the true median is 1
        found = ratio(pairs, [1.0] * 21)
        held += found.low <= 1 <= found.high
    assert 0.95 <= held / times <= 0.99  # order statistics come in steps: 97.3 % for 21 pairs


def test_a_job_without_a_peer_is_measured_in_seconds() -> None:
    job = Job("nothing", "one second", lambda: None, None, 1.0, rounds=5)
    row = next(rows("time", iter([job]), 5))
    assert row["reached"] is True
    assert row["ratio"] < 0.1


@pytest.mark.parametrize("suite", ["torch", "jax", "keras-jax", "keras-torch"])
def test_an_absent_device_is_said_and_nothing_is_timed(suite: str) -> None:
    framework = suite.removeprefix("keras-")
    pytest.importorskip(framework)
    if has_cuda(framework):
        pytest.skip("there is a CUDA device")
    done = run("--only", suite, "--device", "cuda")
    assert done.returncode == 3
    assert "finds no CUDA device" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_conformance_says_once_that_a_device_is_absent(backend: str) -> None:
    pytest.importorskip(backend)
    if has_cuda(backend):
        pytest.skip("there is a CUDA device")
    command = ["-c", "from bnlayer.cli import main; main()", "conform", "--backend", backend, "--device", "cuda"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{backend} is absent: " in done.stdout
    assert "no device 'cuda'" in done.stdout
    assert "0 pass, 0 fail, 0 error" in done.stdout


def test_every_suite_lists_its_cases() -> None:
    done = run("--list")
    names = done.stdout.splitlines()
    assert len(names) == len(set(names))
    for suite, needed in SUITES.items():
        there = all(find_spec(name) for name in needed.needs)
        assert any(name.startswith(f"{suite}: ") for name in names) == there, suite


def has_cuda(framework: str) -> bool:
    from benchmarks.devices import absence

    return absence(framework, "cuda") is None
