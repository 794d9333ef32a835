"""Every example runs as a user would run it, shows what it says it shows, and prints what docs/examples.md prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
HELPERS = {"digits"}
# What each example needs beyond bnlayer and NumPy, and where it comes from.
NEEDS = {
    "one_layer_everywhere": (),
    "digits_torch": ("sklearn", "torch"),
    "digits_keras": ("sklearn", "keras", "tensorflow"),
    "digits_jax": ("sklearn", "jax"),
    "digits_tf1": ("sklearn", "tensorflow"),
    "tf1_update_ops": ("sklearn", "tensorflow"),
    "tf_by_hand": ("sklearn", "tensorflow"),
    "moving_averages": ("sklearn", "matplotlib"),
    "conv_bias": ("sklearn", "torch"),
    "population_statistics": ("sklearn", "torch"),
}
DIGITS = ("digits_torch", "digits_keras", "digits_jax", "digits_tf1")


def output(name: str, *arguments: str) -> str:
    """What an example prints; skipped where what it needs is not installed."""
    for module in NEEDS[name]:
        if find_spec(module) is None:
            pytest.skip(f"{name} needs {module}; run: pip install --group frameworks --group examples")
    return _output(name, *arguments)


@cache
def _output(name: str, *arguments: str) -> str:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(name: str, pattern: str) -> dict[str, list[float]]:
    """The lines that match: their first group, and their other groups as numbers."""
    found = re.findall(pattern, output(name), re.MULTILINE)
    return {label: [float(number) for number in numbers] for label, *numbers in found}


def test_every_example_is_tested_and_described() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NEEDS, *HELPERS}
    described = (ROOT / "docs" / "examples.md").read_text("utf-8")
    assert [name for name in NEEDS if f"`examples/{name}.py`" not in described] == []


@pytest.mark.parametrize("name", NEEDS)
def test_the_docs_show_what_is_printed_but_for_the_digits(name: str) -> None:
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "examples.md").read_text("utf-8"), re.DOTALL)
    assert without_numbers(output(name)) in [without_numbers(block) for block in blocks]


def without_numbers(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"-?\d+(\.\d+)?(e[-+]\d+)?", "#", text)).strip()


def test_one_layer_goes_through_every_framework() -> None:
    assert output("one_layer_everywhere").strip().endswith("the same numbers.")


def learned(name: str) -> dict[str, list[float]]:
    """By network: first loss, last loss, train accuracy, eval accuracy."""
    number = r"(\d\.\d+)"
    return rows(name, rf"^(\w+) +loss {number} -> {number}  train accuracy {number}  eval accuracy {number}$")


@pytest.mark.parametrize("name", DIGITS)
def test_the_networks_learn_the_digits(name: str) -> None:
    networks = learned(name)
    assert set(networks) == {"dense", "convolutional"}
    for first, last, train, held_out in networks.values():
        assert last < 0.1 * first
        assert train > 0.98 and held_out > 0.96


@pytest.mark.parametrize("network", ["dense", "convolutional"])
def test_from_one_start_every_framework_comes_to_the_same_numbers(network: str) -> None:
    results = [learned(name)[network] for name in DIGITS]
    for first, last, train, held_out in results:
        assert first == pytest.approx(results[0][0], rel=1e-3)  # over 22 steps rounding has hardly grown
        assert last == pytest.approx(results[0][1], rel=0.05)
        assert (train, held_out) == pytest.approx(results[0][2:], abs=0.01)


def test_without_update_ops_training_mode_is_good_and_eval_is_not() -> None:
    said = " ".join(output("tf1_update_ops").split())
    broken, mended = said.split("mended:")
    numbers = re.findall(r"accuracy in training mode (\d\.\d+), in eval mode (\d\.\d+)", said)
    (training, in_eval), (mended_training, mended_eval) = [map(float, pair) for pair in numbers]
    assert training == mended_training > 0.95  # the moving statistics have no part in training
    assert mended_eval > 0.95
    assert in_eval < mended_eval - 0.3
    assert "4 of 4 update operations are not run" in broken and "are still 0 and 1" in broken
    assert mended.count("finds nothing") == 2


def test_the_layer_by_hand_and_bnlayer_s_are_equal() -> None:
    steps = rows("tf_by_hand", r"^ +(\d+) +(\S+e-\d+) +(\S+e-\d+) +(\d\.\d+) +(\d\.\d+)$")
    assert list(steps) == ["1", "22", "220"]
    for statistics, logits, by_hand, ours in steps.values():
        assert statistics < 1e-12 and logits < 1e-10
        assert by_hand == ours
    assert steps["220"][2] > 0.96


def test_a_slow_average_is_late_unless_debiased_and_a_cumulative_one_never_forgets() -> None:
    columns = r" +(\d\.\d+)" * 6
    seen = rows("moving_averages", rf"^(\S.*?){columns}$")
    accuracy = {name: values[:3] for name, values in seen.items()}  # after 10, 50 and 220 steps
    distance = {name: values[3:] for name, values in seen.items()}
    slow, debiased = "decay 0.99", "decay 0.99, zero-debiased"
    assert accuracy[slow][0] < accuracy[debiased][0] - 0.15
    assert distance[slow][0] > 4 * distance[debiased][0]
    assert min(values[2] for values in accuracy.values()) > 0.94  # at the end all are in time
    assert distance["cumulative"][2] > 4 * distance["decay 0.9"][2]  # it still holds the first weights' means
    assert distance["decay 0.5"][2] > 1.5 * distance["decay 0.9"][2]  # it holds two batches, and their noise


def test_the_moving_averages_are_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "drawn.png"
    assert f"The picture is {picture}." in output("moving_averages", str(picture))
    content = picture.read_bytes()
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert content.startswith(b"\x89PNG") and (width, height) == (960, 1140)


def test_a_bias_before_batch_norm_changes_nothing_else_and_has_no_gradient() -> None:
    apart = rows("conv_bias", r"^(\S.*?) +(\d\.\de[-+]\d+) +(\d\.\de[-+]\d+)$")
    nothing = ("logits in training", "gradients of all other parameters", "gradient of the bias", "moving variance")
    for name in (*nothing, "moving mean, less bias (1 - decay^t)"):
        assert max(apart[name]) < 1e-11, name
    assert apart["moving mean"][1] > 1.0  # about the bias itself
    first, last = apart["logits in eval"]
    assert last < 1e-3 * first  # what is left of the average's start
    reached = re.findall(r"eval accuracy (\d\.\d+)", output("conv_bias"))
    assert len(reached) == 2 and reached[0] == reached[1] and float(reached[0]) > 0.96


def test_population_statistics_do_without_a_well_chosen_decay() -> None:
    moving = rows("population_statistics", r"^(moving, decay \S+) +(\d\.\d+) +(\d\.\d+) +(\d\.\d+)$")
    (population,) = rows("population_statistics", r"^(population) +(\d\.\d+)$")["population"]
    assert population > 0.96
    assert abs(moving["moving, decay 0.9"][0] - population) < 0.015
    assert moving["moving, decay 0.999"][0] < population - 0.03  # 220 steps are too few for it
    means, variances = ([values[i] for values in moving.values()] for i in (1, 2))
    assert means == sorted(means) and variances == sorted(variances)  # the slower, the further off
    error = re.search(r"the paper's formulas to (\S+)\.$", output("population_statistics"), re.MULTILINE)
    assert error is not None and float(error[1]) < 1e-4


def test_readme_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
