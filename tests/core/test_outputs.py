"""Which array of what a model returned is compared."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnlayer.outputs import first_array, widened

A, B = np.zeros(1), np.ones(2)
Named = namedtuple("Named", ["hidden", "logits"])


def first(output: Any, skipped: Any = ()) -> Any:
    return first_array(output, lambda one: isinstance(one, np.ndarray), skipped)


@pytest.mark.parametrize(
    "output",
    [A, (A, B), [None, A, B], {"x": [(), A], "y": B}, {"hidden": B, "logits": A}, Named(B, A),
     SimpleNamespace(hidden=B, logits=A), SimpleNamespace(loss=None, logits=(A, B))],
)  # fmt: skip
def test_it_is_the_logits_or_else_the_first(output: Any) -> None:
    assert first(output) is A


def test_what_is_no_output_is_skipped() -> None:
    assert first((SimpleNamespace(held=B), A), SimpleNamespace) is A
    assert first({"state": SimpleNamespace(held=B)}, SimpleNamespace) is None
    assert first(["text", 3, None]) is None


@pytest.mark.parametrize(
    ("given", "wide"),
    [("float16", "float32"), (ml_dtypes.bfloat16, "float32"), ("float32", "float32"), ("float64", "float64"),
     ("int8", "float64"), ("bool", "float64")],
)  # fmt: skip
def test_no_less_than_float32(given: Any, wide: str) -> None:
    array = np.array([1, 0], given)
    found = widened(array)
    assert found.dtype == wide
    assert not np.shares_memory(found, array)
    np.testing.assert_array_equal(found, [1, 0])
