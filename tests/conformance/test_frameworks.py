"""docs/frameworks.md: what the generator makes of a run, and that the page says what the deviations files say."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bnlayer import registry
from bnlayer_conformance import SUITE, frameworks, metamorphic, vector
from bnlayer_conformance.deviations import KINDS, read

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
EVERY = [v.id for v in vector.load()] + metamorphic.names()
LINES = [
    {"vectors": "gradients/*", "observables": "dx", "kind": "gradient", "reason": "rounds a*b twice",
     "reference": "example/layer#7"},
    {"vectors": "degenerate/*", "observables": "*", "kind": "edge", "reason": "0/0", "reference": "-"},
    {"vectors": "modes/*", "observables": "error", "kind": "refusal", "reason": "takes no such mode", "reference": "-"},
]  # fmt: skip


def _failure(observable: str, line: int | None, ratio: float | None, short: str = "") -> dict[str, Any]:
    error = None if ratio is None else ratio / 1000
    return {"observable": observable, "error": error, "ratio": ratio, "short": short, "reason": "r", "line": line}


def _run(failures: dict[str, list[dict[str, Any]]], name: str = "odd.nn", version: str = "1.0") -> dict[str, Any]:
    """The document of a run in which these vectors deviate, and those of three groups are unsupported."""

    def result(vector_id: str) -> dict[str, Any]:
        status = "deviation" if vector_id in failures else "pass"
        unsupported = vector_id.split("/")[0] in ("weights", "second_order", "dtypes")
        return {
            "vector": vector_id, "group": vector_id.split("/")[0], "target": name,
            "status": "unsupported" if unsupported else status,
            "reason": "weights: it takes none" if unsupported else "", "failures": failures.get(vector_id, []),
        }  # fmt: skip

    target = {"version": version, "status": "ready", "native": True, "lacks": {"hvp": "once only"}, "deviations": LINES}
    ours = {"version": "1", "status": "ready", "native": False, "lacks": {}, "deviations": []}
    return {"suite": SUITE, "targets": {"numpy": ours, name: target}, "results": [result(v) for v in EVERY]}


FAILURES = {
    "gradients/random": [_failure("dx", 0, 40.0), _failure("y", 1, 2.0)],
    "gradients/one-hot": [_failure("dx", 0, 1.5e8)],
    "degenerate/one-row-eval": [_failure("y", 1, None, "NaN")],
    "modes/no-update": [_failure("error", 2, None, "refuses")],
}


def _made(tmp_path: Path, *documents: dict[str, Any]) -> tuple[int, str, str]:
    files = []
    for number, document in enumerate(documents):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(document), "utf-8")
    page = tmp_path / "page.md"
    done = CliRunner().invoke(frameworks.main, [*map(str, files), "--write", str(page)])
    return done.exit_code, page.read_text("utf-8") if page.exists() else "", done.output


def test_the_page_of_a_run(tmp_path: Path) -> None:
    failures = {name: found for name, found in FAILURES.items() if name in EVERY}
    code, page, _ = _made(tmp_path, _run(failures))
    assert code == 0
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert rows["masks and weights"].split(" | ")[1].startswith("✓")  # of numerics/weighted-*: it can say these
    assert rows["second-order gradients"] == "| second-order gradients | – |"
    about = ("gradients/*", "unbiased/one-hot-*", "unbiased/large-dy-*")
    count = sum(len(fnmatch.filter(EVERY, glob)) for glob in about)
    assert rows["gradients"] == f"| gradients | **2/{count} G** |"
    assert rows["moving averages"] == "| moving averages | ✓ |"
    assert "* **gradient** (G): a wrong derivative of a right result" in page
    assert (
        "| gradient | rounds a\\*b twice | `dx` | 1.5e+05, 2e+08× the tolerance in `dx` (`gradients/one-hot`) | 2 |"
        " [example/layer#7](https://github.com/example/layer/issues/7) |" in page
    )
    assert "| edge | 0/0 | `y` | NaN in `y` (`degenerate/one-row-eval`) | 2 |  |" in page
    assert "* `hvp`: once only" in page
    assert "* `weights`: it takes none (" in page


def test_the_same_layer_on_several_engines(tmp_path: Path) -> None:
    code, page, _ = _made(tmp_path, _run({}, version="3.1 (jax)"), _run({}, version="3.1 (torch 2.13)"))
    assert code == 0
    assert "|  | odd.nn<br>on jax | odd.nn<br>on torch 2.13 |" in page
    assert "## odd.nn on jax\n" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("suite"), "not what bnlayer conform --json writes"),
        (lambda d: d.update(suite="0.0"), "not a run of all of suite"),
        (lambda d: d["results"].pop(), "not a run of all of suite"),
        (lambda d: d["results"][0].update(status="fail"), "failures that its deviations do not explain"),
        (lambda d: d["targets"].pop("odd.nn"), "no native layer ran"),
    ],
)
def test_what_is_no_whole_explained_run_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    document = _run({})
    change(document)
    code, page, output = _made(tmp_path, document)
    assert (code, page) == (3, "")
    assert said in output


def test_one_layer_twice_is_refused(tmp_path: Path) -> None:
    code, page, output = _made(tmp_path, _run({}), _run({}))
    assert (code, page) == (3, "")
    assert "odd.nn 1.0 is in another file too" in output


def test_each_topic_is_about_vectors_that_exist() -> None:
    for topic in frameworks.TOPICS:
        for glob in topic.vectors.split():
            assert fnmatch.filter(EVERY, glob), f"{topic.name}: {glob}"
    assert len(set(frameworks._LETTERS.values())) == len(KINDS)


def test_the_page_says_what_every_deviations_file_says() -> None:
    """So that it is written anew when one changes. Sizes depend on the machine and are not compared."""
    page = PAGE.read_text("utf-8")
    natives = [name for name, entry in registry.known(registry.NATIVE).items() if registry.is_ours(entry)]
    assert natives
    missing = [f"{name}: no section" for name in natives if f"\n## {name}" not in page]
    folders = {Path(registry.backend(name).deviations).parent for name in natives}  # type: ignore[attr-defined]
    for file in sorted(path for folder in folders for path in folder.glob("*.txt")):
        for line in read(file):
            told = [frameworks.linked(line.reason), "" if line.reference == "-" else frameworks.linked(line.reference)]
            missing += [f"{file.name}: {text}" for text in told if text not in page]
    assert missing == []
