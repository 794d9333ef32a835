"""plan_call and trains: the rules of one call, against brute-force statements of the design's own words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlayer import BatchNormSpec, InputError
from bnlayer.call import plan_call, trains

DTYPES = ["float16", "bfloat16", "float32", "float64"]


def accepted_weights(shape: tuple[int, ...], axis: int) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Every weights' shape that the design accepts for x, by listing them, with the shape it has against x.

    Exactly (N,); x's shape without the channel axis, any length 1; x's shape with 1 on the channel axis, likewise.
    (N,) always means the batch axis, so it is entered last.
    """
    listed = {}
    for ones in itertools.product([False, True], repeat=len(shape)):
        kept = tuple(1 if one or i == axis else length for i, (one, length) in enumerate(zip(ones, shape, strict=True)))
        listed[kept] = kept
        listed[tuple(length for i, length in enumerate(kept) if i != axis)] = kept
    listed[shape[:1]] = (shape[0],) + (1,) * (len(shape) - 1)
    return listed


def weights_plan(
    shape: Sequence[int | None], axis: int, weights: Sequence[int | None], channels: int
) -> tuple[int | None, ...] | None:
    spec = BatchNormSpec(channels, axis=axis, single_value="allow")
    return plan_call(spec, shape, "float32", training=True, weights_shape=weights).weights_shape


@pytest.mark.parametrize(
    "shape", [(4, 3), (1, 3), (4, 1), (0, 3), (4, 3, 5), (4, 4, 4), (3, 5, 3), (2, 3, 4, 5)], ids=str
)
def test_weights_are_accepted_exactly_as_the_design_says(shape: tuple[int, ...]) -> None:
    lengths = sorted({0, 1, 2, *shape, max(shape) + 1})
    for axis in range(1, len(shape)):
        listed = accepted_weights(shape, axis)
        for rank in range(len(shape) + 2):
            for weights in itertools.product(lengths, repeat=rank):
                if weights in listed:
                    assert weights_plan(shape, axis, weights, shape[axis]) == listed[weights]
                else:
                    with pytest.raises(InputError, match=r"^weights must have shape"):
                        weights_plan(shape, axis, weights, shape[axis])


def test_a_vector_always_means_the_batch_axis() -> None:
    assert weights_plan((4, 4, 4), 2, (4,), 4) == (4, 1, 1)
    assert weights_plan((4, 3, 4), 1, (4,), 3) == (4, 1, 1)
    with pytest.raises(InputError, match=r"weights must have shape \(4,\), \(4, 5\) \(1s allowed\) or \(4, 1, 5\)"):
        weights_plan((4, 3, 5), 1, (5,), 3)


@given(st.data())
def test_unknown_lengths_are_refused_only_where_no_lengths_would_fit(data: st.DataObject) -> None:
    """A length that is not known yet fits whatever could fit; what is known is still checked."""
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3)))
    axis = data.draw(st.integers(1, len(shape) - 1))
    weights = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=len(shape))))
    hidden_x = tuple(data.draw(st.sampled_from([length, None])) for length in shape)
    hidden_w = tuple(data.draw(st.sampled_from([length, None])) for length in weights)
    if weights in accepted_weights(shape, axis):
        plan = weights_plan(hidden_x, axis, hidden_w, shape[axis])
        assert plan is not None
        expected = accepted_weights(shape, axis)[weights]
        assert all(got in (None, want) for got, want in zip(plan, expected, strict=True))


@pytest.mark.parametrize(
    ("x", "weights", "plan"),
    [
        ((None, 3), (None,), (None, 1)),
        ((None, 3), (4,), (4, 1)),
        ((4, 3), (None,), (None, 1)),
        ((None, None, 3), (None,), (None, 1, 1)),
        ((None, 5, 3), (None, 5), (None, 5, 1)),
        ((None, None, 3), (4, None, 1), (4, None, 1)),
    ],
)
def test_weights_of_unknown_length(x: Any, weights: Any, plan: Any) -> None:
    assert weights_plan(x, -1, weights, 3) == plan


@pytest.mark.parametrize(
    ("x", "weights"),
    [((None, 5, 3), (None, 4)), ((None, 5, 3), (4, 5, 3)), ((None, 3), (None, None, None)), ((4, 3), ())],
)
def test_weights_that_no_length_would_save(x: Any, weights: Any) -> None:
    with pytest.raises(InputError, match=r"^weights must have shape"):
        weights_plan(x, -1, weights, 3)


@given(
    shape=st.lists(st.integers(0, 4) | st.none(), max_size=5).map(tuple),
    axis=st.integers(-6, 6).filter(bool),
    channels=st.integers(1, 4),
)
def test_axes_and_channels(shape: tuple[int | None, ...], axis: int, channels: int) -> None:
    rank = len(shape)
    spec = BatchNormSpec(channels, axis=axis, single_value="allow")
    front = [i for i in range(1, rank) if axis in (i, i - rank)]
    if rank < 2 or not front or shape[front[0]] not in (None, channels):
        with pytest.raises(InputError, match=r"shape \("):
            plan_call(spec, shape, "float32", training=True)
        return
    plan = plan_call(spec, shape, "float32", training=True)
    others = [i for i in range(rank) if i != front[0]]
    assert plan.axis == front[0]
    assert plan.reduced == tuple(others)
    assert plan.channel_shape == tuple(channels if i == front[0] else 1 for i in range(rank))
    lengths = [shape[i] for i in others]
    assert plan.count == (None if None in lengths else math.prod(length for length in lengths if length is not None))
    assert plan.weights_shape is None


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        ((), 1, r"x must have a batch axis and a channel axis; got shape \(\)"),
        ((3,), 1, r"x must have a batch axis and a channel axis; got shape \(3,\)"),
        ((4, 3), 2, r"axis 2 is not an axis of x with shape \(4, 3\)"),
        ((4, 3), -3, r"axis -3 is not an axis of x with shape \(4, 3\)"),
        ((3, 4), -2, r"axis -2 is the batch axis of x with shape \(3, 4\)"),
        ((None, 4), 1, r"x must have 3 channels on axis 1; got shape \(\?, 4\)"),
    ],
)
def test_refusals_say_what_was_expected_and_what_came(shape: Any, axis: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_call(BatchNormSpec(3, axis=axis), shape, "float32", training=False)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "float8_e5m2", "float128", "object", ""])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match="x must be one of float16, bfloat16, float32, float64"):
        plan_call(BatchNormSpec(3), (4, 3), dtype, training=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_is_float32_at_least(dtype: str) -> None:
    plan = plan_call(BatchNormSpec(3), (4, 3), dtype, training=True)
    assert plan.arithmetic == ("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("update_stats", [False, True])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("length", [0, 4, None])
def test_which_statistics_normalize_and_whether_they_move(
    training: bool, update_stats: bool, track: bool, length: int | None
) -> None:
    spec = BatchNormSpec(3, track_moving_stats=track)
    plan = plan_call(spec, (length, 3), "float32", training=training, update_stats=update_stats)
    assert plan.batch_statistics == (training or not track)
    assert plan.update == (training and update_stats and track and length != 0)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("single_value", ["raise", "allow"])
def test_one_value_per_channel(shape: tuple[int, ...], training: bool, track: bool, single_value: Any) -> None:
    spec = BatchNormSpec(3, axis=1, track_moving_stats=track, single_value=single_value)
    if single_value == "raise" and (training or not track):
        with pytest.raises(InputError, match=r"more than one value per channel.*single_value='allow'"):
            plan_call(spec, shape, "float32", training=training)
    else:
        assert plan_call(spec, shape, "float32", training=training).count == 1


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (None, 3), (1, 3, 2), (1, 3, None)])
def test_no_other_count_is_refused(shape: Any) -> None:
    plan_call(BatchNormSpec(3, axis=1), shape, "float32", training=True)


@pytest.mark.parametrize("training", [False, True])
def test_frozen_statistics_do_not_train(training: bool) -> None:
    tracked = BatchNormSpec(3)
    assert trains(tracked, training, frozen_statistics=False) is training
    assert trains(tracked, training, frozen_statistics=True) is False
    untracked = BatchNormSpec(3, track_moving_stats=False)
    assert trains(untracked, training, frozen_statistics=False) is training
    with pytest.raises(InputError, match="frozen_statistics needs moving statistics"):
        trains(untracked, training, frozen_statistics=True)
