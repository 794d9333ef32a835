"""The suite is judged by the mistakes it catches, and the judge by mutants that must not count."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnlayer_conformance import runner, vector
from bnlayer_conformance.mutants import __main__ as pages
from bnlayer_conformance.mutants.base import BACKEND
from bnlayer_conformance.mutants.build import Mutant, MutantError, build, source
from bnlayer_conformance.mutants.catalogue import MUTANTS
from bnlayer_conformance.mutants.judge import judge, unique

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mutants divide by zero
ROOT = Path(__file__).parents[2]


def test_the_base_is_correct() -> None:
    results = [runner.run_vector(v, BACKEND) for v in vector.load()]
    assert [(r.vector, r.reason) for r in results if r.status != "pass"] == []


@pytest.fixture(scope="module")
def verdicts() -> list[pages.Verdict]:
    return list(judge())


def test_every_mutant_is_caught(verdicts: list[pages.Verdict]) -> None:
    assert [v.mutant.name for v in verdicts if not v.caught] == []


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) == len({m.name for m in MUTANTS})
    assert sum(not m.only for m in MUTANTS) >= 45


def test_every_group_alone_catches_something(verdicts: list[pages.Verdict]) -> None:
    assert [group for group in vector.groups() if group not in unique(verdicts)] == []


def test_the_page_is_up_to_date(verdicts: list[pages.Verdict]) -> None:
    """Names and groups; the ratios may differ in their last digit from machine to machine."""
    page = (ROOT / "docs" / "mutants.md").read_text("utf-8")
    for v in verdicts:
        assert f"| {v.mutant.name} | {v.mutant.seen or '-'} |" in page
    assert page.split("## What each group")[1] == pages.page(verdicts).split("## What each group")[1]


def test_a_harmless_change_is_not_caught() -> None:
    line = "W = np.sum(w)"
    (verdict,) = judge([Mutant("harmless", line, "W = np.sum(w) + 0.0")])
    assert verdict.caught == ()


def test_a_mutant_is_one_line_of_the_base() -> None:
    for line in ("no such line", source().splitlines()[0]):
        with pytest.raises(MutantError):
            build(Mutant("broken", line, line))
