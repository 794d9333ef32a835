"""What a small call of NumPy's is made of, each step timed alone: `python -m benchmarks.steps`.

On 32,768 numbers what surrounds the operations on x counts as much as these; a share of the textbook's time is what the
bars are in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, Final

import click
import numpy as np

from .cases import NDArray, data, parameters
from .on_numpy import textbook
from .timing import grow_up

_SHAPE: Final = (256, 128)
_EPSILON: Final = 1e-5


@click.command()
@click.option("--rounds", default=3000, show_default=True, type=click.IntRange(min=1), help="How often each step runs.")
def main(rounds: int) -> None:
    """Time the steps of eval, training and the backward pass at (256, 128), in microseconds and as ratios to the
    textbook's eval, training, and training with gradient."""
    grow_up()
    for mode, steps in _steps().items():
        reference = _microseconds(textbook(mode, _SHAPE, -1, "float32", 0.5, False).peer, rounds)
        click.echo(f"\n{mode}: the textbook takes {reference:.1f} us")
        for name, step in steps:
            taken = _microseconds(step, rounds)
            click.echo(f"  {name:52} {taken:6.1f} us {taken / reference:6.2f}")


def _steps() -> dict[Any, list[tuple[str, Callable[[], object]]]]:
    import bnlayer
    from bnlayer_numpy import at_once, averages, batch_norm_backward, batch_norm_forward, blocked
    from bnlayer_numpy.statistics import completed

    (x, dy), values = data(_SHAPE), parameters(_SHAPE[1])
    spec = bnlayer.BatchNormSpec(_SHAPE[1], epsilon=_EPSILON)
    state = bnlayer.BatchNormState(**values).checked(spec)
    forward = partial(batch_norm_forward, x, state, spec)
    _, _, cache = forward(training=True)
    (part,), plan, layout = cache.parts, cache.plan, cache.layout
    assert layout is not None and part.scaling is not None
    view, scaling, channels = layout.view(x), part.scaling, _SHAPE[1]
    found = at_once.rows_of(x.dtype, view, np.empty_like(view), layout.view(dy))
    assert found is not None
    rows, room, along = found
    mean, variance = (np.asarray(each, np.float64) for each in (state.moving_mean, state.moving_variance))
    standardized_by = partial(blocked.standardized_by, mean, variance, _EPSILON, "float32")

    def sums(first: NDArray, second: NDArray) -> None:
        at_once.total(first, channels)
        at_once.total(np.multiply(first, second, out=room), channels)

    def apply() -> None:
        np.multiply(rows, at_once.spread(scaling.rstd, rows), out=room)
        np.add(room, at_once.spread(scaling.rest, rows), out=room)

    def project() -> None:
        apply()
        np.subtract(along, room, out=room)
        np.multiply(room, at_once.spread(scaling.rstd, rows), out=room)

    batch = completed(part.mean, part.variance, None, len(x))
    return {
        "eval": [
            ("the whole call", partial(forward, training=False)),
            ("x scale + offset", apply),
            ("1/sd, and whether float32 holds it, of a new state", standardized_by),
        ],
        "train": [
            ("the whole call", partial(forward, training=True)),
            ("sum(x), sum(x^2)", partial(sums, rows, rows)),
            ("x scale + offset", apply),
            ("the averages, and the new state", partial(averages.updated, state, batch, spec, plan)),
            ("1/sd, and whether it may be trusted", standardized_by),
        ],
        "grad": [
            ("forward and backward", lambda: batch_norm_backward(dy, forward(training=True)[2])),
            ("backward alone", partial(batch_norm_backward, dy, cache)),
            ("sum(dy), sum(dy x)", partial(sums, along, rows)),
            ("scale (dy - constant - x slope)", project),
        ],
    }


def _microseconds(call: Callable[[], object], rounds: int) -> float:
    def runs() -> Iterator[int]:
        for _ in range(rounds):
            begun = time.perf_counter_ns()
            call()
            yield time.perf_counter_ns() - begun

    for _ in range(rounds // 10):
        call()
    return median(runs()) / 1e3


if __name__ == "__main__":
    main()
