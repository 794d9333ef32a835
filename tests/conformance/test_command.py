"""`bnlayer conform`: what it prints, the JSON it writes, its exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import bnlayer_conformance
from bnlayer import registry
from bnlayer.cli import main
from bnlayer.contract import Missing, NDArray, Outcome, Request, require
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState
from bnlayer_conformance import metamorphic, report, runner, vector
from bnlayer_numpy.backend import NumpyBackend
from bnlayer_numpy.layer import BatchNorm

RESULT_KEYS = ["vector", "group", "target", "status", "observable", "error", "tolerance", "reason", "failures"]
FEW = ("--vectors", "axes/rank-2-*")


class Absent(NumpyBackend):
    name = "absent"

    def version(self) -> str:
        return str(require("no_such_framework", "no-such-extra").__version__)


class Wrong(NumpyBackend):
    """Twice the epsilon, which it denies."""

    name = "wrong"

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> BatchNorm:
        return super().build(spec.replace(epsilon=2 * spec.epsilon), state, device=device)

    def extract(self, layer: BatchNorm) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        spec, state = super().extract(layer)
        return spec.replace(epsilon=spec.epsilon / 2), state


class Broken(NumpyBackend):
    name = "broken"

    def step(self, layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
        raise ZeroDivisionError("the framework said so")


class Small(NumpyBackend):
    name = "small"

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        return Missing(dtypes={"float64": "this framework has none"}).reason(spec, request)


class Placed(NumpyBackend):
    name = "placed"

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> BatchNorm:
        assert device == "cpu", f"device is {device!r}"
        return super().build(spec, state, device=device)


@pytest.fixture(autouse=True)
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `strangers`, importable by name, with an object of each backend above."""
    module = ModuleType("strangers")
    for backend in (Absent(), Wrong(), Broken(), Small(), Placed()):
        setattr(module, backend.name.upper(), backend)
    monkeypatch.setitem(sys.modules, "strangers", module)


def conform(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["conform", *arguments])


def document(folder: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    """The run, and its JSON, read as strictly as JSON is defined."""
    file = folder / "out.json"
    result = conform(*arguments, "--json", str(file))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return result, json.loads(file.read_text("utf-8"), parse_constant=refuse)


# --- exit codes and what is said


def test_numpy_passes() -> None:
    result = conform("--backend", "numpy", "--vectors", "weights/*")
    assert result.exit_code == 0, result.output
    assert " 0 fail, 0 error, 0 deviation, 0 unsupported" in result.output
    assert "1 of 1 targets ready" in result.output


def test_the_table_counts_group_by_target() -> None:
    result = conform("--backend", "numpy", "--backend", "strangers:SMALL", "--vectors", "*dtypes/*")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.output.splitlines() if "│" in line]
    every = len(vector.load("dtypes/*"))
    lacking = sum(r.status == "unsupported" for r in runner.run(vector.load("dtypes/*"), runner.Target("", Small())))
    assert lacking > 0
    row = next(row for row in rows if row[0] == "dtypes")
    assert row == ["dtypes", str(every), f"{every} ✓", f"{every - lacking} ✓ {lacking} unsupp."]
    assert rows[-1][0] == "all"
    assert "strangers:SMALL" in result.output
    assert f"strangers:SMALL: {lacking} unsupported: float64: this framework has none" in result.output


def test_a_wrong_backend_fails_and_is_told_where() -> None:
    result = conform("--backend", "strangers:WRONG", "--vectors", "epsilon/0.1-*")
    assert result.exit_code == 1
    (found, *_) = [line for line in result.output.splitlines() if line.startswith("fail strangers:WRONG  epsilon/0.1-")]
    _, _, observable, numbers = found.split("  ")
    assert observable in {"y", "dx", "dgamma", "moving_mean", "moving_variance"}
    error, tolerance = (float(part.split()[-1]) for part in numbers.split(", "))
    assert error > tolerance > 0
    reason = result.output.splitlines()[result.output.splitlines().index(found) + 1]
    assert "step " in reason and "element [" in reason and " was expected, got " in reason


def test_a_backend_that_raises_is_an_error_and_the_rest_still_runs() -> None:
    result = conform("--backend", "strangers:BROKEN", "--backend", "numpy", *FEW)
    assert result.exit_code == 1
    assert "ZeroDivisionError: the framework said so" in result.output
    assert "2 of 2 targets ready: 2 pass, 0 fail, 2 error" in result.output


def test_asked_for_but_absent_is_a_failure() -> None:
    result = conform("--backend", "strangers:ABSENT", "--backend", "numpy", *FEW)
    assert result.exit_code == 1
    assert "strangers:ABSENT is absent: no_such_framework is not installed. " in result.output
    assert "pip install 'bnlayer[no-such-extra]'" in result.output
    assert "1 of 2 targets ready: 2 pass, 0 fail, 0 error" in result.output


def test_lacking_by_name_is_no_failure() -> None:
    result = conform("--backend", "strangers:SMALL", "--vectors", "weights/real-float64")
    assert result.exit_code == 0
    assert "0 pass, 0 fail, 0 error, 0 deviation, 1 unsupported" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backend", "nope"), "unknown backend 'nope'. Known: numpy, torch, tensorflow, jax, keras"),
        (("--backend", "strangers:NOPE"), "no backend at 'strangers:NOPE'"),
        (("--backend", "math:pi"), "is not a backend; it lacks name, version"),
        (("--backend", "numpy", "--vectors", "nope/*"), "no vector matches 'nope/*'; ids are GROUP/NAME"),
        (("--backend", "numpy", "--json", "/no/such/folder/out.json"), "there is no such folder; create it first"),
        (("--nope",), "No such option"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str) -> None:
    result = conform(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_glob_that_matches_nothing_names_the_groups_before_any_backend_is_looked_up() -> None:
    result = conform("--backend", "nope", "--vectors", "nope/*")
    assert result.exit_code == 2
    assert f"the groups are {', '.join([*vector.groups(), metamorphic.GROUP])}." in result.output


def test_the_device_reaches_build() -> None:
    assert conform("--backend", "strangers:PLACED", "--device", "cpu", *FEW).exit_code == 0
    assert "device is 'cuda'" in conform("--backend", "strangers:PLACED", "--device", "cuda", *FEW).output


def test_only_what_the_glob_matches_runs(tmp_path: Path) -> None:
    _, found = document(tmp_path, "--backend", "numpy", "--vectors", "metamorphic/permute-*")
    assert [r["vector"] for r in found["results"]] == ["metamorphic/permute-batch", "metamorphic/permute-channels"]


# --- which targets


@pytest.fixture
def ours_are_numpy_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two backends of bnlayer's own instead of five, which would take their frameworks to import."""
    real = registry.known(registry.BACKENDS)
    absent = EntryPoint("gone", "strangers:ABSENT", registry.BACKENDS)
    native = EntryPoint("odd.nn", "strangers:ODD", registry.NATIVE)
    foreign = EntryPoint("foreign", "strangers:BROKEN", registry.BACKENDS)
    groups = {
        registry.BACKENDS: {"numpy": real["numpy"], "gone": absent, "foreign": foreign},
        registry.NATIVE: {"odd.nn": native},
    }
    monkeypatch.setattr(registry, "known", lambda group=registry.BACKENDS: groups[group])
    monkeypatch.setattr(registry, "is_ours", lambda entry: entry.name != "foreign")
    registry._load.cache_clear()


@pytest.mark.usefixtures("ours_are_numpy_and_absent")
def test_without_a_backend_ours_run_and_absent_ones_are_only_listed(tmp_path: Path) -> None:
    result, found = document(tmp_path, *FEW)
    assert result.exit_code == 0
    assert list(found["targets"]) == ["numpy", "gone"]
    assert found["targets"]["gone"]["status"] == "absent"
    assert "gone is absent: " in result.output and "pip install" in result.output


@pytest.mark.usefixtures("ours_are_numpy_and_absent")
def test_a_registered_one_that_is_absent_fails_when_it_is_named() -> None:
    assert conform("--backend", "gone", "--backend", "numpy", *FEW).exit_code == 1


class Odd(Wrong):
    """A framework's own layer, wrong, with a file that says so."""

    name = "odd.nn"

    lacks: Mapping[str, str] = {}

    def __init__(self, deviations: Path) -> None:
        self.deviations = deviations


class Uncounted(Odd):
    """It also has no counter, and says so; what it extracts is always 0."""

    lacks: Mapping[str, str] = {"num_updates": "it counts nothing"}

    def step(self, layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
        layer, outcome = super().step(layer, request)
        layer.state = layer.state.replace(num_updates=0)
        return layer, replace(outcome, state=layer.state)


@pytest.fixture
def deviations(tmp_path: Path, ours_are_numpy_and_absent: None) -> Callable[[str], None]:
    """Registers the native layer with these known deviations."""

    def register(lines: str) -> None:
        file = tmp_path / "odd.nn.txt"
        file.write_text(lines, "utf-8")
        sys.modules["strangers"].ODD = Odd(file)  # type: ignore[attr-defined]

    return register


def test_native_adds_the_frameworks_own_layers(deviations: Callable[[str], None], tmp_path: Path) -> None:
    deviations("# known\nepsilon/* | * | definition | doubles epsilon | -\n")
    result, found = document(tmp_path, "--backend", "numpy", "--native", "--vectors", "epsilon/0.1-*")
    assert result.exit_code == 0
    assert list(found["targets"]) == ["numpy", "odd.nn"]
    told = [r for r in found["results"] if r["target"] == "odd.nn"]
    assert {r["status"] for r in told} == {"deviation"}
    assert all(r["reason"].startswith("doubles epsilon: ") and r["error"] > r["tolerance"] for r in told)
    assert {f["line"] for r in told for f in r["failures"]} == {0}
    assert found["targets"]["odd.nn"]["native"] and not found["targets"]["numpy"]["native"]
    (line,) = found["targets"]["odd.nn"]["deviations"]
    assert list(line.values()) == ["epsilon/*", "*", "definition", "doubles epsilon", "-"]
    assert "deviate" in result.output


def test_a_native_layer_is_not_run_unasked(deviations: Callable[[str], None], tmp_path: Path) -> None:
    deviations("")
    _, found = document(tmp_path, "--backend", "numpy", *FEW)
    assert list(found["targets"]) == ["numpy"]


def test_an_unlisted_deviation_is_a_failure(deviations: Callable[[str], None]) -> None:
    deviations("")
    assert conform("--backend", "odd.nn", "--vectors", "epsilon/0.1-*").exit_code == 1


def test_a_deviation_that_no_longer_happens_is_an_error(deviations: Callable[[str], None]) -> None:
    known = "epsilon/* | * | definition | doubles epsilon | -\n"
    unasked = "weights/* | y | definition | says nothing about vectors that do not run | -\n"
    never = "epsilon/* | num_updates | edge | never counted | -\n"
    again = "epsilon/0.1-* | y | accuracy | what the first line says already | -\n"
    deviations(known + unasked + never + again)
    result = conform("--backend", "odd.nn", "--vectors", "epsilon/0.1-*")
    assert result.exit_code == 1
    assert "stale deviation: epsilon/* | num_updates no longer happens; delete the line" in result.output
    assert "stale deviation: epsilon/0.1-* | y says what lines before it say; delete the line" in result.output
    assert " 0 fail, 2 error, " in result.output


def test_every_observable_that_fails_needs_its_line(deviations: Callable[[str], None], tmp_path: Path) -> None:
    deviations("epsilon/* | y | definition | doubles epsilon | -\n")
    result, found = document(tmp_path, "--backend", "odd.nn", "--vectors", "epsilon/0.1-*")
    assert result.exit_code == 1
    for told in found["results"]:
        explained = {f["observable"]: f["line"] for f in told["failures"]}
        assert told["status"] == "fail" and explained["y"] == 0 and explained["dx"] is None
        assert told["observable"] != "y"  # what is not known comes first


def test_what_a_layer_lacks_is_not_compared(deviations: Callable[[str], None], tmp_path: Path) -> None:
    deviations("epsilon/* | * | definition | doubles epsilon | -\n")
    file = sys.modules["strangers"].ODD.deviations  # type: ignore[attr-defined]
    sys.modules["strangers"].ODD = Uncounted(file)  # type: ignore[attr-defined]
    result, found = document(tmp_path, "--backend", "odd.nn", "--vectors", "epsilon/0.1-*")
    assert result.exit_code == 0
    assert found["targets"]["odd.nn"]["lacks"] == {"num_updates": "it counts nothing"}
    assert all(f["observable"] != "num_updates" for told in found["results"] for f in told["failures"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("epsilon/* | y", "line 2: expected GLOB | OBSERVABLES | KIND | REASON | REFERENCE"),
        ("epsilon/* | y | definition | | -", "line 2: expected GLOB | OBSERVABLES | KIND | REASON | REFERENCE"),
        ("epsilon/* | y | wrong | doubles epsilon | -", "line 2: the kind must be one of definition, accuracy, "),
    ],
)
def test_a_damaged_deviations_file_is_refused_before_the_run(
    deviations: Callable[[str], None], line: str, said: str
) -> None:
    deviations(f"# one line\n{line}\n")
    result = conform("--backend", "odd.nn", *FEW)
    assert result.exit_code == 3
    assert f"odd.nn.txt, {said}" in result.output
    assert "vectors and checks" not in result.output


# --- JSON


def test_the_documents_shape(tmp_path: Path) -> None:
    chosen = ("numpy", "strangers:WRONG", "strangers:BROKEN", "strangers:SMALL", "strangers:ABSENT")
    backends = [word for name in chosen for word in ("--backend", name)]
    result, found = document(tmp_path, *backends, "--vectors", "[dn]*/*")  # dtypes, degenerate, numerics, nonfinite
    assert result.exit_code == 1
    assert list(found) == ["suite", "targets", "results"]
    assert found["suite"] == bnlayer_conformance.SUITE
    assert list(found["targets"]) == list(chosen)
    for name, target in found["targets"].items():
        assert list(target) == ["version", "status", "reason", "native", "lacks", "deviations"]
        assert target["native"] is False and target["lacks"] == {} and target["deviations"] == []
        ready = name != "strangers:ABSENT"
        assert target["status"] == ("ready" if ready else "absent")
        assert bool(target["version"]) is ready
        assert bool(target["reason"]) is not ready
    vectors = [v.id for v in vector.load("[dn]*/*")]
    assert [(r["target"], r["vector"]) for r in found["results"]] == [(t, v) for t in chosen[:-1] for v in vectors]
    for r in found["results"]:
        assert list(r) == RESULT_KEYS
        assert r["group"] == r["vector"].split("/")[0]
        assert r["status"] in {"pass", "fail", "unsupported", "error"}
        assert isinstance(r["observable"], str) and isinstance(r["reason"], str)
        assert all(r[key] is None or isinstance(r[key], float) for key in ("error", "tolerance"))
        assert bool(r["reason"]) is (r["status"] != "pass")
        if r["status"] in ("unsupported", "error"):
            assert r["error"] is r["tolerance"] is None
        assert bool(r["failures"]) is (r["status"] in ("fail", "error"))
        for failure in r["failures"]:
            assert list(failure) == ["observable", "error", "ratio", "short", "reason", "line"]
            assert failure["line"] is None and failure["reason"]
    statuses = {name: {r["status"] for r in found["results"] if r["target"] == name} for name in chosen[:-1]}
    assert statuses["numpy"] == {"pass"}
    assert "fail" in statuses["strangers:WRONG"]
    assert statuses["strangers:BROKEN"] == {"error"}
    assert statuses["strangers:SMALL"] == {"pass", "unsupported"}


def test_a_number_that_json_cannot_hold_is_null() -> None:
    result = runner.Result("group/name", "group", "numpy", "fail", "y", float("inf"), float("nan"), "no number")
    (only,) = report.document([], [result])["results"]
    assert only["error"] is None and only["tolerance"] is None
    json.dumps(only, allow_nan=False)


# --- for people


def test_it_does_not_break_when_piped(tmp_path: Path) -> None:
    """No terminal: no escape codes, no bar but a line for each target on stderr, and the same table."""
    command = [sys.executable, "-c", "from bnlayer.cli import main; main()", "conform", "--backend", "numpy", *FEW]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0
    assert done.stderr == "numpy: 2 vectors and checks ...\n"
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    assert done.stdout.splitlines()[-1] == ("1 of 1 targets ready: 2 pass, 0 fail, 0 error, 0 deviation, 0 unsupported")
    assert any(line.split() == ["│", "axes", "│", "2", "│", "2", "✓", "│"] for line in done.stdout.splitlines())


def test_a_piped_table_keeps_every_target_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    names = [f"strangers:{name}" for name in ("WRONG", "BROKEN", "SMALL", "PLACED")] + ["numpy"]
    backends = [word for name in names for word in ("--backend", name)]
    output = conform(*backends, "--vectors", "axes/rank-2-axis-1").output
    assert any(all(name in line for name in names) for line in output.splitlines())
    assert "…" not in output


def test_a_narrow_terminal_loses_nothing() -> None:
    targets = [runner.Target(f"target{i}", NumpyBackend(), version="2.13.0+cpu") for i in range(12)]
    results = [runner.Result("moving_average/v", "moving_average", t.name, "pass") for t in targets]
    console = Console(width=80, record=True, file=io.StringIO())
    report.show(console, targets, results)
    assert "…" not in console.export_text()


def test_many_failures_are_cut_short() -> None:
    failures = [runner.Result(f"g/v{i}", "g", "t", "fail", "y", 1.0, 0.5, "off") for i in range(50)]
    console = Console(width=100, record=True, file=io.StringIO())
    report.show(console, [runner.Target("t", NumpyBackend(), version="1")], failures)
    text = console.export_text()
    assert text.count("error 1, tolerance 0.5") == report.SHOWN_FAILURES
    assert f"... and {50 - report.SHOWN_FAILURES} more; --json FILE has them all" in text


def test_the_help_teaches() -> None:
    result = conform("--help")
    assert result.exit_code == 0
    for said in ("--backend NAME", "--native", "--device", "--vectors GLOB", "--json FILE", "Exit codes: 0 all passed"):
        assert said in result.output
    assert "bnlayer conform\n" in CliRunner().invoke(main, ["--help"]).output


def test_the_command_is_found_without_rich() -> None:
    """`bnlayer --help` imports every command; it must not wait for what only a run needs."""
    code = "import sys, bnlayer_conformance.command; print('rich' in sys.modules, 'pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
