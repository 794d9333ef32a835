"""A stranger's backend, tests/third_party: judged unregistered, as a distribution, and as its docs show it."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "third_party"
GUIDE = ROOT / "docs" / "writing-a-backend.md"
# What it may lack, by the name its reason begins with.
LATER = {"renorm", "virtual_batch_size", "zero_debias", "synchronized", "adjustment", "direction"}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the distribution is installed, with its entry point."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", folder, SOURCE], check=True)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a module, or a line of code, away from the checkout, with one folder more to import from."""

    def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return command


CONFORM = ("-c", "from bnlayer.cli import main; main()", "conform")
BACKENDS = ("-c", "from bnlayer.cli import main; main()", "backends")
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-p", "bnlayer_conformance.plugin")


# --- unregistered


def test_passes_everything_unregistered(run: Run, tmp_path: Path) -> None:
    done = run(SOURCE, *CONFORM, "--backend", "bnlayer_plain:BACKEND", "--json", "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert list(document["targets"]) == ["bnlayer_plain:BACKEND"]
    assert {r["group"] for r in document["results"]} >= {"weights", "numerics", "refusals", "metamorphic"}
    assert len(document["results"]) >= 300
    lacks = [r for r in document["results"] if r["status"] != "pass"]
    assert {r["status"] for r in lacks} <= {"unsupported"}
    assert {r["reason"].split(":")[0] for r in lacks} <= LATER


def test_lacks_only_what_it_names(run: Run) -> None:
    done = run(SOURCE, *BACKENDS, "bnlayer_plain:BACKEND", "--json")
    (described,) = json.loads(done.stdout)["backends"]
    assert described["kind"] == "not registered"
    assert {reason.split(":")[0] for reason in described["missing"].values()} == LATER


# --- installed


def test_is_listed_when_installed(run: Run, distribution: Path) -> None:
    done = run(distribution, *BACKENDS, "plain", "--json")
    (described,) = json.loads(done.stdout)["backends"]
    assert described["name"] == "plain"
    assert described["kind"] == "third party"
    assert described["status"] == "ready"


def test_is_listed_among_all(run: Run, distribution: Path) -> None:
    code = "from bnlayer.commands.backends import registered; print(registered()['plain'])"
    assert run(distribution, "-c", code).stdout == "third party\n"


def test_passes_by_its_name(run: Run, distribution: Path) -> None:
    done = run(distribution, *CONFORM, "--backend", "plain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 targets ready" in done.stdout
    assert " 0 fail, 0 error, 0 deviation" in done.stdout


def test_is_not_run_unasked(run: Run, distribution: Path) -> None:
    code = "from bnlayer import registry; print([n for n, e in registry.known().items() if not registry.is_ours(e)])"
    assert run(distribution, "-c", code).stdout == "['plain']\n"


def test_extract_and_load_find_its_layers(run: Run, distribution: Path) -> None:
    code = """
import sys
import numpy as np
import bnlayer

spec = bnlayer.BatchNormSpec(3, axis=1, decay=0.5)
layer = bnlayer.build(spec, "plain")
layer(np.arange(12, dtype=np.float32).reshape(4, 3), training=True)
held, state = bnlayer.extract(layer)
assert held == spec and state.num_updates == 1
assert state.moving_mean.tolist() == [2.25, 2.75, 3.25]
assert bnlayer.load(layer, state.replace(num_updates=7)) is layer
assert bnlayer.extract(layer)[1].num_updates == 7
assert type(layer).__module__ == "bnlayer_plain"
assert not {"torch", "tensorflow", "jax", "keras"} & set(sys.modules)
print("done")
"""
    done = run(distribution, "-c", code)
    assert done.stdout == "done\n", done.stderr


def test_passes_as_pytest_tests(run: Run, distribution: Path) -> None:
    suite = ("--pyargs", "bnlayer_conformance", "--backend", "plain", "--strict-backends")
    done = run(distribution, *PYTEST, *suite, "-k", "weights or axes or metamorphic")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bnlayer backends: plain " in done.stdout
    counted = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counted["passed"] >= 80 and counted["skipped"] == 3  # of LATER: synchronized, adjustment, direction
    assert counted.keys() <= {"passed", "skipped", "deselected"}


# --- small, and what the docs show


def test_stays_small() -> None:
    assert len(code_lines((SOURCE / "bnlayer_plain.py").read_text("utf-8"))) < 100


def test_counting_leaves_out_comments_docstrings_and_blanks() -> None:
    module = '"""A\n\nmodule."""\n\n# a comment\nx = """\nno docstring\n"""\n\n\n'
    function = 'def f():\n    """Do."""\n    return (\n        1\n    )\n'
    assert code_lines(module + function) == {6, 7, 8, 11, 13, 14, 15}


def test_imports_no_backend() -> None:
    tree = ast.parse((SOURCE / "bnlayer_plain.py").read_text("utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in imported if name} == {"__future__", "typing", "numpy", "bnlayer"}


@pytest.mark.parametrize(("language", "name"), [("python", "bnlayer_plain.py"), ("toml", "pyproject.toml")])
def test_the_guide_shows_the_file(language: str, name: str) -> None:
    """The guide shows the file in pieces; joined, they are the file, line by line but for blank ones in between."""
    pieces = blocks(GUIDE.read_text("utf-8"), f"{language} {name}")
    assert [line for piece in pieces for line in piece if line] == [
        line for line in (SOURCE / name).read_text("utf-8").splitlines() if line
    ]


def code_lines(text: str) -> set[int]:
    """The numbers of the lines that hold code: no blank ones, comments or docstrings."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            code.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return code


def blocks(markdown: str, info: str) -> list[list[str]]:
    """The lines of each fenced block with this info string."""
    found: list[list[str]] = []
    inside = False
    for line in markdown.splitlines():
        if line.startswith("```"):
            inside = not inside and line == f"```{info}"
            if inside:
                found.append([])
        elif inside:
            found[-1].append(line)
    return found
