"""What docs/conformance.md and docs/writing-a-backend.md say of the suite is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import bnlayer_conformance
from bnlayer_conformance import metamorphic, vector

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "conformance.md").read_text("utf-8")
GUIDE = (DOCS / "writing-a-backend.md").read_text("utf-8")
VECTORS = Path(bnlayer_conformance.__file__).parent / "vectors"


def test_the_vector_shown_is_the_real_one() -> None:
    shown = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)]
    (found,) = [document for document in shown if "id" in document]
    assert f"`{found['id']}`" in PAGE
    real = json.loads((VECTORS / f"{found['id'].split('/')[0]}.json").read_text("utf-8"))["vectors"]
    assert found in real


def test_the_json_shown_is_a_document_of_this_suite() -> None:
    shown = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)]
    (found,) = [document for document in shown if "suite" in document]
    assert found["suite"] == bnlayer_conformance.SUITE
    assert all(vector.load(result["vector"]) for result in found["results"])


def test_every_group_is_listed_with_its_purpose() -> None:
    for group in vector.groups():
        purpose = json.loads((VECTORS / f"{group}.json").read_text("utf-8"))["purpose"]
        assert f"| `{group}` | {purpose} |\n" in PAGE


def test_every_metamorphic_check_is_listed() -> None:
    assert re.findall(r"^\| `(metamorphic/[a-z-]+)` \|", PAGE, re.MULTILINE) == metamorphic.names()


@pytest.mark.parametrize("text", [PAGE, GUIDE], ids=["conformance.md", "writing-a-backend.md"])
def test_vectors_that_are_named_exist(text: str) -> None:
    groups = "|".join([*vector.groups(), metamorphic.GROUP])
    named = set(re.findall(rf"\b(?:{groups})/[A-Za-z0-9._*-]*[A-Za-z0-9*]", text))
    assert len(named) >= 3
    assert [name for name in sorted(named) if not vector.load(name) and not metamorphic.names(name)] == []


@pytest.mark.parametrize("text", [PAGE, GUIDE], ids=["conformance.md", "writing-a-backend.md"])
def test_links_lead_somewhere(text: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []
