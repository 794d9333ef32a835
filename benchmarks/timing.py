"""Timing as ratios: interleaved in one process, in random order, so that both see the same machine."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

_SHORTEST: Final = 4e-3  # seconds of one measurement; shorter calls are repeated in it


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and the 95 % interval of that median.

    The interval is that of order statistics: the number of pairs below the true median is binomial(n, 1/2), whatever
    the distribution of times is.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def grow_up() -> None:
    """Bring the C library's heap to where it is in a program that has run for a while.

    glibc takes large memory fresh from the system, page by page, and gives it back at once; how large that is grows
    with what a program frees, up to 32 MiB. Without this a case's ratio depends on which cases ran before it: NumPy's
    textbook formulas at (256, 128) take 130 or 460 us.
    """
    np.empty(31 << 20, np.uint8)


def measured(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, settle: Callable[[], object] | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds per call, one for each round.

    Args:
        calls: what to time; each ends when its result is there.
        rounds: every round times every call once, in a random order.
        settle: runs before each measurement, untimed, so that no call pays for what another left.
        seed: of the order.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, math.ceil(_SHORTEST / max(time.perf_counter() - start, 1e-7)))
    order, chance = list(calls), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            call, count = calls[name], repeats[name]
            if settle is not None:
                settle()
            start = time.perf_counter()
            for _ in range(count):
                call()
            seconds[name].append((time.perf_counter() - start) / count)
    return seconds


def ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Of the seconds of the same rounds."""
    pairs = sorted(a / b for a, b in zip(ours, peer, strict=True))
    below = _rank(len(pairs))
    return Ratio(statistics.median(pairs), pairs[below], pairs[-1 - below])


def _rank(n: int) -> int:
    """The largest k such that fewer than k + 1 of n fair coins show heads with a probability of 2.5 % at the most."""
    total, k = 0.0, 0
    while True:
        total += math.comb(n, k) / 2**n
        if total > 0.025:
            return max(k - 1, 0)
        k += 1
