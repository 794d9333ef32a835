"""The suite as pytest tests: `pytest -p bnlayer_conformance.plugin --pyargs bnlayer_conformance`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnlayer import registry
from bnlayer_conformance import metamorphic, vector

# Backends that nobody registered: one whose framework is absent, one that is wrong, one that lacks something.
STRANGERS = """
from pathlib import Path

from bnlayer.contract import Missing, require
from bnlayer_numpy.backend import NumpyBackend


class Absent(NumpyBackend):
    name = "absent"

    def version(self):
        return require("no_such_framework", "no-such-extra").__version__


class Wrong(NumpyBackend):
    name = "wrong"

    def build(self, spec, state=None, *, device=None):
        return super().build(spec.replace(epsilon=2 * spec.epsilon), state, device=device)

    def extract(self, layer):
        spec, state = super().extract(layer)
        return spec.replace(epsilon=spec.epsilon / 2), state


class Small(NumpyBackend):
    name = "small"

    def unsupported(self, spec, request=None):
        return Missing(dtypes={"float64": "this framework has none"}).reason(spec, request)


class Placed(NumpyBackend):
    name = "placed"

    def build(self, spec, state=None, *, device=None):
        assert device == "cpu"
        return super().build(spec, state, device=device)


class Odd(Wrong):
    name = "odd.nn"
    deviations = Path(__file__).with_name("odd.nn.txt")
    lacks = {}


ABSENT, WRONG, SMALL, PLACED, ODD = Absent(), Wrong(), Small(), Placed(), Odd()
"""
INSTALL = "no_such_framework is not installed. Run: pip install 'bnlayer[no-such-extra]'"


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "strangers.py").write_text(STRANGERS, "utf-8")
    return Suite(tmp_path)


class Suite:
    """Runs the suite in a process of its own, in a folder that has the module `strangers`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "bnlayer_conformance.plugin"]
        return subprocess.run(
            [*command, "--pyargs", "bnlayer_conformance", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.mark.parametrize("name", ["nope", "strangers:NOPE", "nope:BACKEND"])
def test_an_unknown_backend_is_one_line_and_code_4(suite: Suite, name: str) -> None:
    done = suite.run("--backend", name)
    assert done.returncode == 4
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ERROR: --backend: ")
    assert repr(name) in line


def test_an_unknown_name_is_answered_with_the_known_ones(suite: Suite) -> None:
    said = suite.run("--backend", "nope").stderr
    assert "unknown backend 'nope'. Known: numpy, torch, tensorflow, jax, keras" in said
    assert "package.module:ATTRIBUTE" in said


def test_passes_and_says_which_backends_are_here(suite: Suite) -> None:
    done = suite.run("--backend", "numpy", "--backend", "strangers:ABSENT", "-k", "rank-2-axis-1 and numpy", "-v")
    assert done.returncode == 0, done.stdout
    header = next(line for line in done.stdout.splitlines() if line.startswith("bnlayer backends: "))
    assert header == f"bnlayer backends: numpy {np.__version__}; strangers:ABSENT ABSENT ({INSTALL})"
    assert "test_vector[numpy-axes/rank-2-axis-1] PASSED" in done.stdout


def test_an_absent_backend_is_skipped_with_its_install_command(suite: Suite) -> None:
    done = suite.run("--backend", "strangers:ABSENT", "-k", "axes or metamorphic", "-rs")
    assert done.returncode == 0
    assert "passed" not in done.stdout
    assert INSTALL in done.stdout
    expected = len(vector.load("axes/*")) + len(metamorphic.names())
    assert f" {expected} skipped" in done.stdout.splitlines()[-1]


def test_a_strict_run_fails_on_an_absent_backend(suite: Suite) -> None:
    done = suite.run("--backend", "strangers:ABSENT", "--strict-backends", "-k", "rank-2-axis-1")
    assert done.returncode == 1
    assert INSTALL in done.stdout


def test_a_strict_run_passes_where_nothing_is_absent(suite: Suite) -> None:
    assert suite.run("--backend", "numpy", "--strict-backends", "-k", "rank-2-axis-1").returncode == 0


def test_a_failure_names_vector_backend_observable_error_and_tolerance(suite: Suite) -> None:
    done = suite.run("--backend", "strangers:WRONG", "-k", "variance-1e-6")
    assert done.returncode == 1
    said = [
        line for line in done.stdout.splitlines() if " on strangers:WRONG: " in line and line.startswith("epsilon/")
    ]
    assert said
    for line in said:
        assert " error " in line and ", tolerance " in line and " was expected, got " in line


def test_what_a_backend_lacks_is_skipped_with_its_reason(suite: Suite) -> None:
    done = suite.run("--backend", "strangers:SMALL", "-k", "real-float64", "-rs")
    assert done.returncode == 0
    assert "float64: this framework has none" in done.stdout


def test_a_deviation_is_an_xfail_where_every_failure_is_explained(suite: Suite) -> None:
    chosen = ("--backend", "strangers:ODD", "-k", "variance-1e-6", "-rx")
    (suite.folder / "odd.nn.txt").write_text("epsilon/* | * | definition | doubles epsilon | -\n", "utf-8")
    done = suite.run(*chosen)
    assert done.returncode == 0, done.stdout
    assert "XFAIL" in done.stdout and "doubles epsilon: " in done.stdout
    (suite.folder / "odd.nn.txt").write_text("epsilon/* | y | definition | doubles epsilon | -\n", "utf-8")
    done = suite.run(*chosen)
    assert done.returncode == 1
    assert " on strangers:ODD: d" in done.stdout  # dx or dgamma, which no line explains


def test_the_device_reaches_build(suite: Suite) -> None:
    chosen = ("--backend", "strangers:PLACED", "-k", "rank-2-axis-1 or gradient-sums-to-zero")
    assert suite.run(*chosen, "--device", "cpu").returncode == 0
    assert suite.run(*chosen).returncode == 1


def test_without_a_backend_all_of_ours_run(suite: Suite) -> None:
    done = suite.run("--collect-only", "-q", "-k", "rank-2-axis-1")
    ours = [name for name, entry in registry.known().items() if registry.is_ours(entry)]
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert collected == [f"test_vectors.py::test_vector[{name}-axes/rank-2-axis-1]" for name in ours]


def test_every_vector_and_check_is_a_test_of_each_backend(suite: Suite) -> None:
    done = suite.run("--collect-only", "-q", "--backend", "numpy", "--backend", "strangers:SMALL", "--backend", "numpy")
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    for name in ("numpy", "strangers:SMALL"):
        assert sum(f"::test_vector[{name}-" in line for line in collected) >= 200
        assert sum(f"::test_metamorphic[{name}-metamorphic/" in line for line in collected) >= 8
    assert len(collected) == len(set(collected))
