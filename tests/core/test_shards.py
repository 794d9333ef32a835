"""`bnlayer.shards`: a step cut into replicas' steps, and their outcomes joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnlayer import shards
from bnlayer.contract import Call, CallOutcome, Outcome, Request
from bnlayer.errors import InputError
from bnlayer.state import BatchNormState

RANDOM = np.random.default_rng(7)
SHAPE = (6, 3, 2)


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


def request(counts: tuple[int, ...] | None = (2, 4, 0), **call: Any) -> Request:
    return Request((Call(normal(*SHAPE), **call),), training=True, update_stats=False, shards=counts)


def outcome(asked: Request, like: BatchNormState[Any], **grads: Any) -> Outcome:
    """An outcome that hands each input back: y is x, dx is dy, dweights the weights, hvp the direction."""
    calls = tuple(CallOutcome(c.x, dx=c.dy, dweights=c.weights, hvp=c.direction) for c in asked.calls)
    return Outcome(calls, state=like, **grads)


STATE = BatchNormState(
    moving_mean=np.ones(3, np.float32), moving_variance=np.full(3, np.nan, np.float32), num_updates=4
)


@pytest.mark.parametrize("counts", [(2, 4, 0), (6,), (0, 0, 6), (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("weights", [None, normal(6), normal(6, 2), normal(6, 1, 2), normal(6, 1)], ids=str)
def test_cut_and_join_invert_each_other(counts: tuple[int, ...], weights: Any) -> None:
    asked = request(counts, dy=normal(*SHAPE), direction=normal(*SHAPE), weights=weights)
    parts = shards.cut(asked)
    assert [part.calls[0].x.shape[0] for part in parts] == list(counts)
    assert all(part.shards is None and part.training and not part.update_stats for part in parts)
    joined = shards.join(asked, [outcome(part, STATE) for part in parts])
    (call,), (given,) = joined.calls, asked.calls
    for got, want in ((call.y, given.x), (call.dx, given.dy), (call.hvp, given.direction)):
        np.testing.assert_array_equal(got, want)
    if weights is None:
        assert call.dweights is None
    else:
        np.testing.assert_array_equal(call.dweights, weights)
    assert joined.state is STATE


@pytest.mark.parametrize("shape", [(1, 2), (1, 3, 1)], ids=str)
def test_weights_that_all_rows_share_are_on_each_replica_and_their_gradients_add_up(shape: tuple[int, ...]) -> None:
    weights = normal(*shape)
    asked = request(weights=weights, dy=normal(*SHAPE))
    parts = shards.cut(asked)
    for part in parts:
        np.testing.assert_array_equal(part.calls[0].weights, weights)
    (call,) = shards.join(asked, [outcome(part, STATE) for part in parts]).calls
    np.testing.assert_allclose(call.dweights, 3 * weights, rtol=1e-6)


def test_what_is_not_asked_for_does_not_come_out() -> None:
    asked = request()
    (call,) = shards.join(asked, [outcome(part, STATE) for part in shards.cut(asked)]).calls
    assert call.dx is None and call.dweights is None and call.hvp is None


@pytest.mark.parametrize(
    ("shape", "cut"), [(SHAPE, True), ((6, 1, 1), True), ((1, 3, 1), False), ((3, 1), False), ((), False)], ids=str
)
def test_an_adjustment_is_cut_where_it_has_rows(shape: tuple[int, ...], cut: bool) -> None:
    scale, bias = normal(*shape), normal(1, 3, 1)
    first, second, _ = shards.cut(request(adjustment=(scale, bias)))
    for part, rows in ((first, slice(0, 2)), (second, slice(2, 6))):
        given = part.calls[0].adjustment
        assert given is not None
        np.testing.assert_array_equal(given[0], scale[rows] if cut else scale)
        np.testing.assert_array_equal(given[1], bias)


def test_several_calls_are_cut_alike() -> None:
    asked = Request((Call(normal(*SHAPE)), Call(normal(6, 5))), training=True, shards=(1, 5))
    first, second = shards.cut(asked)
    assert [call.x.shape for call in first.calls] == [(1, 3, 2), (1, 5)]
    joined = shards.join(asked, [outcome(first, STATE), outcome(second, STATE)])
    assert [call.y.shape for call in joined.calls] == [SHAPE, (6, 5)]


@pytest.mark.parametrize("counts", [(2, 3), (7,), (-1, 7), ()])
def test_shards_that_are_not_the_rows_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shards must be counts that add up to x's 6 rows"):
        shards.cut(request(counts))


def test_parameter_gradients_add_up_in_float32() -> None:
    asked = request((3, 3))
    small = np.full(3, 0.00390625, ml_dtypes.bfloat16)  # below half a step of bfloat16 at 1
    large = np.ones(3, ml_dtypes.bfloat16)
    parts = [
        outcome(part, STATE, dgamma=grad, dbeta=None)
        for part, grad in zip(shards.cut(asked), (large, small), strict=True)
    ]
    joined = shards.join(asked, parts)
    assert joined.dbeta is None
    assert joined.dgamma is not None and joined.dgamma.dtype == ml_dtypes.bfloat16
    twice = request((2, 2, 2))
    three = [outcome(part, STATE, dgamma=g) for part, g in zip(shards.cut(twice), (large, small, small), strict=True)]
    # 1 + 1/256 + 1/256: in bfloat16 each half a step is lost, in float32 they are one step.
    np.testing.assert_array_equal(
        np.asarray(shards.join(twice, three).dgamma, np.float32), np.full(3, 1.0078125, np.float32)
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (STATE.replace(moving_mean=np.array([1, 1, 2], np.float32)), "moving_mean must be the same on every replica"),
        (STATE.replace(num_updates=5), "num_updates must be the same on every replica; replica 0 has 4, replica 1 5"),
    ],
)
def test_replicas_that_were_not_synchronized_are_refused(other: BatchNormState[Any], said: str) -> None:
    asked = request((3, 3))
    first, second = shards.cut(asked)
    with pytest.raises(InputError, match=said):
        shards.join(asked, [outcome(first, STATE), outcome(second, other)])


def test_the_request_is_left_alone() -> None:
    asked = request(dy=normal(*SHAPE))
    before = replace(asked)
    shards.cut(asked)
    assert asked.shards == before.shards and asked.calls is before.calls
