"""The `bnlayer` command: its help, its exit codes, `explain` and `backends`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import bnlayer
from bnlayer import BackendUnavailable, BatchNormSpec, SpecError, UnknownBackend, cli
from bnlayer.commands import backends, explain
from bnlayer.commands.facts import FACTS
from bnlayer.commands.tables import WIDTH, column_widths
from bnlayer.contract import Missing, Request
from bnlayer.dialects import DIALECTS


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


@click.command()
@click.option("--unknown", is_flag=True)
@click.option("--code", type=int)
def refusing(unknown: bool, code: int | None) -> None:
    """A stranger's command."""
    if code is not None:
        raise click.exceptions.Exit(code)
    raise UnknownBackend("unknown backend 'x'.") if unknown else SpecError("epsilon must be at least 0; got -1.")


not_a_command = 3


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered commands, one that raises, one that cannot be imported and one that is no command."""
    monkeypatch.setitem(sys.modules, "strangers", sys.modules[__name__])
    added = {"refusing": "strangers:refusing", "absent": "strangers_absent:command", "wrong": "strangers:not_a_command"}
    real = importlib.metadata.entry_points

    def with_strangers(*, group: str) -> list[importlib.metadata.EntryPoint]:
        extra = [importlib.metadata.EntryPoint(name, value, group) for name, value in added.items()]
        return [*real(group=group), *extra]

    monkeypatch.setattr(cli, "entry_points", with_strangers)


# --- the group


def test_help_teaches() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for said in (
        "Batch normalization, exactly specified",
        "Exit codes:",
        "bnlayer explain torch keras",
        "bnlayer backends",
    ):
        assert said in result.output
    for code, meaning in [("0", "nothing to report"), ("1", "findings"), ("2", "wrong usage"), ("3", "refused")]:
        assert f"  {code}  {meaning}" in result.output
    assert result.output.index("conform") < result.output.index("explain") < result.output.index("backends")


def test_version() -> None:
    assert run("--version").output == f"bnlayer, version {bnlayer.__version__}\n"


@pytest.mark.usefixtures("strangers")
def test_errors_become_one_line_and_an_exit_code() -> None:
    refused = run("refusing")
    assert (refused.exit_code, refused.stderr) == (3, "Error: epsilon must be at least 0; got -1.\n")
    misused = run("refusing", "--unknown")
    assert misused.exit_code == 2
    assert "Error: unknown backend 'x'." in misused.stderr
    assert run("refusing", "--code", "1").exit_code == 1
    assert run("no-such-command").exit_code == 2


@pytest.mark.usefixtures("strangers")
def test_a_broken_command_is_named_and_harms_no_other() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert "A stranger's command." in shown.output
    assert "bnlayer refusing --help" in shown.output
    words = " ".join(shown.output.split())
    assert "BROKEN: cannot be loaded from strangers_absent:command (ModuleNotFoundError" in words
    assert "BROKEN: cannot be loaded from strangers:not_a_command (it is a int" in words
    started = run("absent", "--with", "anything")
    assert started.exit_code == 3
    assert "the command 'absent' cannot be loaded from strangers_absent:command" in started.stderr
    assert run("explain", "torch").exit_code == 0


def test_help_and_explain_import_no_framework() -> None:
    program = (
        "import sys, bnlayer.cli\n"
        "for arguments in (['--help'], ['explain', 'torch', 'keras']):\n"
        "    try:\n"
        "        bnlayer.cli.main(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    if 'explain' not in arguments:\n"
        "        assert 'rich' not in sys.modules, 'rich'\n"
        "found = {'torch', 'tensorflow', 'jax', 'keras', 'flax'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- explain


def test_facts_and_rows_cover_every_dialect() -> None:
    assert list(FACTS) == list(DIALECTS)
    for dialect in DIALECTS.values():
        described = explain.description(dialect)
        assert list(described) == list(explain.ROWS)
        assert all(described.values())
        behavior = {name for name in vars(FACTS[dialect.name]) if name != "library"}
        assert behavior <= set(explain.ROWS)


def test_compare_shows_what_differs() -> None:
    output = run("explain", "torch", "keras").output
    words = " ".join(output.split())
    for said in ("momentum = 0.1", "momentum = 0.99", "eps = 1e-05", "epsilon = 0.001", "the NEW batch", "unbiased"):
        assert said in words
    assert "ghost batches" not in words
    assert "4 more rows are the same for all; --all shows them." in words
    everything = run("explain", "torch", "keras", "--all").output
    assert "ghost batches" in everything
    assert "more rows" not in everything


@pytest.mark.parametrize(
    "names", [(), ("haiku",), ("torch", "keras"), ("torch", "flax", "onnx"), tuple(DIALECTS)], ids="-".join
)
def test_tables_fit_and_lose_nothing(names: tuple[str, ...]) -> None:
    result = run("explain", *names, "--all")
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(line == line.rstrip() for line in lines)
    for name in names:
        for cell in explain.description(DIALECTS[name]).values():
            # Wrapped cells stand interleaved with their neighbors, but every word is there; only long ones are folded.
            for word in cell.split():
                assert word[:20] in result.output, word


def test_many_dialects_are_grouped_by_what_they_share() -> None:
    words = " ".join(run("explain", "torch", "keras", "flax", "haiku").output.split())
    assert "keras, flax, haiku normalizes to 0; variance 0 enters the average" in words


def test_explain_json() -> None:
    told = json.loads(run("explain", "torch", "keras", "--json").output)
    assert told["dialects"]["torch"]["decay"] == "momentum = 0.1"
    assert "estimator" in told["differ"]
    assert "virtual_batch_size" not in told["differ"]
    every = json.loads(run("explain", "--json").output)
    assert list(every["dialects"]) == list(DIALECTS)
    assert json.loads(run("explain", "onnx", "--json").output)["differ"] == []


def test_explain_one_and_none() -> None:
    one = run("explain", "haiku").output
    assert one.startswith("haiku: batch normalization in Haiku")
    assert "decay_rate, required" in one
    assert "Its arguments: create_scale" in one
    none = run("explain").output
    assert all(name in none for name in DIALECTS)


def test_explain_an_unknown_dialect_is_wrong_usage() -> None:
    result = run("explain", "pytorch")
    assert result.exit_code == 2
    assert "'pytorch' is not one of 'torch', 'keras'" in result.stderr


def test_the_same_dialect_twice_is_one() -> None:
    assert run("explain", "torch", "torch").output == run("explain", "torch").output


# --- tables


def test_widths_fit_and_take_from_the_widest() -> None:
    assert column_widths([["name", "x" * 200, "y" * 30]], 100) == [4, 60, 30]
    assert column_widths([["name", "short"]], 100) == [4, 5]
    assert sum(column_widths([["x" * 50, "y" * 50, "z" * 50]], 80)) + 6 == 80


# --- backends


class Narrow:
    """A backend that leaves no choice: axis 1, unbiased, no weights; and no float64 but with float64 parameters."""

    name = "narrow"
    missing = Missing(fields={"renorm": "not here"})

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        if spec.axis != 1:
            return "axis: always 1"
        if spec.moving_variance_estimator != "unbiased":
            return "moving_variance_estimator: always unbiased"
        if request is not None and any(call.weights is not None for call in request.calls):
            return "weights: no such argument"
        if request is not None and request.calls[0].x.dtype.name == "float64" != spec.param_dtype:
            return "float64: needs float64 parameters"
        return self.missing.reason(spec.replace(axis=-1, moving_variance_estimator="biased"), request)


def test_missing_tells_features_apart_from_their_surrounding() -> None:
    narrow: Any = Narrow()
    assert backends.missing(narrow) == {
        "axis=-1": "axis: always 1",
        "biased moving variance": "moving_variance_estimator: always unbiased",
        "renorm": "moving_variance_estimator: always unbiased",  # no spec has renorm and is unbiased
        "weights": "weights: no such argument",
        "masks": "weights: no such argument",
    }


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy, a backend whose framework is absent, and a stranger's."""
    real = backends.registry.backend

    def backend(name: str) -> Any:
        if name == "absent":
            raise BackendUnavailable("frame is not installed. Run: pip install 'bnlayer[frame]'")
        return real("numpy" if name == "stranger" else name)

    monkeypatch.setattr(backends.registry, "backend", backend)
    monkeypatch.setattr(
        backends, "registered", lambda: {"numpy": "ours", "absent": "native", "stranger": "third party"}
    )


@pytest.mark.usefixtures("three")
def test_backends_lists_what_is_there_and_what_is_not() -> None:
    result = run("backends")
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    assert "absent native ABSENT frame is not installed. Run: pip install 'bnlayer[frame]'" in words
    assert "third party" in words
    assert "second order" in words
    assert max(map(len, result.output.splitlines())) <= WIDTH


@pytest.mark.usefixtures("three")
def test_backends_json() -> None:
    told = json.loads(run("backends", "--json").output)["backends"]
    numpy, absent, stranger = told
    assert (numpy["name"], numpy["kind"], numpy["status"]) == ("numpy", "ours", "ready")
    assert numpy["missing"].keys() <= backends.FEATURES.keys()
    assert all(numpy["missing"].values())
    assert (absent["status"], absent["version"], absent["missing"]) == ("absent", None, {})
    assert "pip install" in absent["reason"]
    assert stranger["kind"] == "third party"


def test_backends_by_name_give_reasons() -> None:
    result = run("backends", "bnlayer_numpy.backend:BACKEND")
    assert result.exit_code == 0
    assert result.output.startswith("bnlayer_numpy.backend:BACKEND (not registered), ")
    assert "NumPy has no engine that runs a layer on several replicas" in result.output
    unknown = run("backends", "nunpy")
    assert unknown.exit_code == 2
    assert "unknown backend 'nunpy'" in unknown.stderr


@pytest.mark.usefixtures("three")
def test_an_absent_backend_by_name_says_what_to_install() -> None:
    assert "absent (native), ABSENT: frame is not installed. Run:" in run("backends", "absent").output


def test_registered_kinds() -> None:
    kinds = backends.registered()
    assert {kinds[name] for name in ("numpy", "torch", "tensorflow", "jax", "keras")} == {"ours"}
    assert kinds["torch.nn"] == "native"


def test_a_narrow_stdout_encoding_does_not_break_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from bnlayer.cli import main; main(['explain', 'torch', 'keras'])"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"weighs" in done.stdout
