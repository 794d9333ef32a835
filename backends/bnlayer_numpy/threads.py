"""Blocks shared out among the processor's cores: NumPy lets go of Python's lock while it computes on one.

On two cores that takes .6 to .8 of the time of one, since both wait for the same memory (13 to 26 MB of float32).
Results do not depend on it, but for the last bit of a sum in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import cache
from itertools import pairwise
from typing import Final, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST: Final = 4  # few cores keep the memory busy
FEWEST_BLOCKS: Final = 4  # a thread's; handing work over takes as long as one block or less

_sharing: Final = ContextVar("sharing", default=False)  # this thread does its share of several items


def shared(blocks: Sequence[Item], work: Callable[[Sequence[Item]], Result]) -> list[Result]:
    """What `work` gives for parts of the blocks, in their order: one part, or one for each core where they are many.

    The parts must not depend on each other. What one raises is raised here, when all have ended.
    """
    return _on_threads(1 if _sharing.get() else min(cores(), len(blocks) // FEWEST_BLOCKS), blocks, work)


def each(items: Sequence[Item], work: Callable[[Item], Result], *, large: bool) -> list[Result]:
    """What `work` gives for each item. Large ones that can be shared out evenly are, and then none of them is again."""
    number = cores() if large and len(items) % cores() == 0 else 1
    if number < 2 or _sharing.get():
        return [work(item) for item in items]
    token = _sharing.set(True)
    try:
        found = _on_threads(number, items, lambda part: [work(item) for item in part])
    finally:
        _sharing.reset(token)
    return [result for part in found for result in part]


def _on_threads(number: int, blocks: Sequence[Item], work: Callable[[Sequence[Item]], Result]) -> list[Result]:
    if number < 2:
        return [work(blocks)]
    ends = [len(blocks) * i // number for i in range(number + 1)]
    parts = [blocks[begin:end] for begin, end in pairwise(ends)]
    others = [_started(work, part) for part in parts[1:]]
    try:
        first = work(parts[0])
    finally:
        for other in others:
            if other is not None:
                other.exception()  # waits, so that nobody writes to an array whose call has ended
    return [first, *(work(p) if o is None else o.result() for p, o in zip(parts[1:], others, strict=True))]


def _started(work: Callable[[Sequence[Item]], Result], part: Sequence[Item]) -> Future[Result] | None:
    """The work on another thread; None where there can be none, as while Python ends."""
    try:
        return _pool().submit(copy_context().run, work, part)  # the context has numpy's error state
    except RuntimeError:
        return None


@cache
def cores() -> int:
    """How many to use: those that this process may, and no more than OMP_NUM_THREADS, by which people say so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, _MOST, int(asked) if asked.isdecimal() else cores))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores() - 1), "bnlayer_numpy")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads
