"""Where the channels are."""

from typing import Any

from ..case import Case, evaluate, train, valid

PURPOSE = "the channel axis: last, first after the batch, in the middle, with equal lengths on the other axes"


def _case(
    name: str,
    shape: tuple[int, ...],
    axis: int,
    comment: str = "Equal lengths elsewhere, so that a wrong axis still fits.",
) -> Case:
    scales = [0.5, 1.0, 2.0, 4.0, 8.0][: shape[axis]]
    means = [3.0, -2.0, 1.0, 0.0, -1.0][: shape[axis]]
    data: dict[str, Any] = {"shape": shape, "mean": means, "std": scales}
    return valid(name, comment, {"axis": axis, "num_features": shape[axis]}, train(**data), evaluate(**data))


CASES = [
    _case("rank-2-axis-1", (5, 4), 1, "Rank 2, axis counted from the front."),
    _case("rank-2-axis-last", (4, 4), -1),
    _case("rank-3-axis-1", (4, 3, 3), 1),
    _case("rank-3-axis-last", (4, 3, 3), -1),
    _case("rank-3-axis-2", (3, 4, 3), 2),
    _case("rank-4-axis-1", (4, 3, 2, 3), 1),
    _case("rank-4-axis-1-all-equal", (3, 3, 3, 3), 1),
    _case("rank-4-axis-last-all-equal", (3, 3, 3, 3), -1),
    _case("rank-4-axis-2", (2, 3, 3, 3), 2),
    _case("rank-4-axis-minus-2", (2, 3, 3, 3), -2),
    _case("rank-4-axis-minus-3", (2, 3, 2, 3), -3),
    _case("rank-5-axis-1", (2, 3, 2, 3, 2), 1),
    _case("rank-5-axis-last", (2, 3, 2, 3, 3), -1),
    _case("rank-5-axis-4", (2, 2, 3, 2, 3), 4),
    _case("rank-5-axis-3", (2, 2, 3, 3, 3), 3),
    _case("batch-equals-channels", (3, 3), -1, "As many rows as channels: reducing over the wrong one still fits."),
]
