"""ONNX's own tests of BatchNormalization, on our layers and on ONNX Runtime's. Nothing is deselected.

Each backend runs in a process of its own: the frameworks disturb each other, and numpy's threads, in one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="pip install 'bnlayer[onnx]'")

NODES = ("test_batchnorm_example", "test_batchnorm_epsilon", "test_batchnorm_example_training_mode",
         "test_batchnorm_epsilon_training_mode")  # fmt: skip
MODELS = ("test_BatchNorm1d_3d_input_eval", "test_BatchNorm2d_eval", "test_BatchNorm2d_momentum_eval",
          "test_BatchNorm3d_eval", "test_BatchNorm3d_momentum_eval")  # fmt: skip


def script(*arguments: str) -> str:
    command = [sys.executable, str(Path(__file__).with_name("node_cases.py")), *arguments]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("node_cases")
    script("write", str(place))
    return place


@cache
def results(folder: Path, backend: str) -> dict[str, str]:
    """What is wrong with each case, by its name; "absent" with the reason where the framework is not there."""
    found: dict[str, str] = json.loads(script("run", str(folder), backend).splitlines()[-1])
    return found


@pytest.mark.parametrize("case", [*NODES, *MODELS])
@pytest.mark.parametrize("backend", ["numpy", "torch", "tensorflow", "jax", "onnxruntime"])
def test_onnx_s_own_case(folder: Path, backend: str, case: str) -> None:
    found = results(folder, backend)
    if "absent" in found:
        pytest.skip(found["absent"])
    assert found[case] == ""


def test_no_case_is_left_out(folder: Path) -> None:
    assert set(results(folder, "numpy")) == {*NODES, *MODELS}
