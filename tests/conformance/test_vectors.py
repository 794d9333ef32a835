"""The vectors as data: what the tool would write, what the issue of truth promises, and that order does not matter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import bnlayer
from bnlayer_conformance import runner, vector
from bnlayer_conformance.authoring import __main__ as tool

GROUPS = tool.names()


@pytest.mark.parametrize("group", GROUPS)
def test_files_are_what_the_tool_writes(group: str) -> None:
    """Byte for byte: nobody edits a vector by hand, and regenerating changes nothing."""
    document = tool.document(group)
    assert (tool.FOLDER / f"{group}.json").read_text("utf-8") == tool.render(document)
    assert tool.lint(document, group) == []


def test_lint_finds_what_is_wrong() -> None:
    document = json.loads((tool.FOLDER / "gradients.json").read_text("utf-8"))
    document["vectors"][0]["spec"]["momentum"] = 0.1
    document["vectors"][1]["id"] = document["vectors"][2]["id"]
    del document["vectors"][3]["steps"][0]["calls"][0]["x"]
    problems = "\n".join(tool.lint(document, "gradients"))
    assert "momentum" in problems
    assert "not unique" in problems
    assert "'x' is a required property" in problems or "vectors[3]" in problems


def test_a_case_does_not_depend_on_its_neighbours() -> None:
    """Reordering or removing one case changes no other: data is drawn by the case's own id."""
    from bnlayer_conformance.authoring.case import vector as make
    from bnlayer_conformance.authoring.cases import modes

    alone = {case.name: make("modes", case) for case in reversed(modes.CASES[::3])}
    whole = {entry["id"]: entry for entry in tool.document("modes")["vectors"]}
    for name, entry in alone.items():
        assert tool.render(entry) == tool.render(whole[f"modes/{name}"])


def test_coverage() -> None:
    vectors = vector.load()
    assert len({v.id for v in vectors}) == len(vectors) >= 200
    valid = [v for v in vectors if v.result == "valid"]
    assert {v.spec["decay"] for v in valid} >= {0, 0.5, 0.9, 1, "cumulative"}
    assert {v.spec["epsilon"] for v in valid} >= {1e-8, 1e-5, 1e-3, 0.1}
    calls = [call for v in valid for step in v.steps for call in step.calls]
    assert {call.x.ndim for call in calls} == {2, 3, 4, 5}
    assert {call.x.dtype.name for call in calls} == {"float16", "bfloat16", "float32", "float64"}
    assert max(call.x.size // call.x.shape[-1] for call in calls) <= 4096
    assert any(not call.x.flags["C_CONTIGUOUS"] for call in calls)


def test_views_keep_values_and_differ_in_memory() -> None:
    values = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    strides = set()
    for view in ("contiguous", "transposed", "strided", "offset", "channels_last"):
        laid = vector.laid_out(values, view)
        np.testing.assert_array_equal(laid, values)
        strides.add(laid.strides)
    assert len(strides) == 5


def test_parser_refuses_what_is_not_a_vector() -> None:
    with pytest.raises(vector.VectorError, match="schema"):
        list(vector.parse({"schema": "other/1"}, "x"))
    with pytest.raises(vector.VectorError, match="'broken'"):
        list(vector.parse({"schema": vector.SCHEMA, "vectors": [{"id": "broken"}]}, "x"))


def test_worked_example_of_a_tensorflow_user() -> None:
    """A Dense unit without bias, weight 1.4059724, on [[0], [1]]: figures printed by a TensorFlow run, to 7 digits."""
    (found,) = vector.load("scenarios/dense-unit-in-tensorflow")
    train, _, evaluate = found.steps
    np.testing.assert_allclose(train.expect["moving_mean"].values, [0.3514931], atol=5e-8)
    np.testing.assert_allclose(train.expect["moving_variance"].values, [0.7470948], atol=5e-8)
    np.testing.assert_allclose(evaluate.calls[0].expect["y"].values.ravel(), [-0.4069794, 1.215785], rtol=0, atol=5e-7)


def test_numpy_passes_every_vector_but_those_of_replicas_and_of_the_second_order() -> None:
    target = runner.find("numpy", bnlayer.backend)
    results = list(runner.run(vector.load(), target))
    assert [r for r in results if r.status not in ("pass", "unsupported")] == []
    lacking = {r.vector: r.reason.split(":")[0] for r in results if r.status == "unsupported"}
    assert set(lacking.values()) == {"shards", "direction"}
    assert {name.split("/")[0] for name in lacking} == {"synchronized", "second_order", "unbiased"}


def test_vectors_are_in_the_package() -> None:
    import bnlayer_conformance

    folder = Path(bnlayer_conformance.__file__).parent
    assert {path.stem for path in (folder / "vectors").glob("*.json")} == set(GROUPS)
