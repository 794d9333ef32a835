"""Every vector and metamorphic check on every chosen backend. Needs `-p bnlayer_conformance.plugin`."""

from __future__ import annotations

import pytest

from . import deviations, metamorphic, vector
from .runner import Result, Target, run


@pytest.mark.parametrize("vector_", vector.load(), ids=lambda v: v.id)
def test_vector(vector_: vector.Vector, target: Target, device: str | None) -> None:
    (result,) = run([vector_], target, device)
    _judge(result, target)


@pytest.mark.parametrize("check", metamorphic.names())
def test_metamorphic(check: str, target: Target, device: str | None) -> None:
    (result,) = metamorphic.run([check], target, device)
    _judge(result, target)


def _judge(result: Result, target: Target) -> None:
    if result.status == "unsupported":
        pytest.skip(result.reason)
    result = deviations.mark(result, deviations.of(target))
    if result.status == "deviation":
        pytest.xfail(result.reason)
    if result.status != "pass":
        size = "" if result.error is None else f" error {result.error:.3g}, tolerance {result.tolerance:.3g};"
        pytest.fail(f"{result.vector} on {result.target}: {result.observable}:{size} {result.reason}", pytrace=False)
