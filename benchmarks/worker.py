"""One process of a benchmark: checks and times the cases of one suite, and prints a JSON line for each.

    python -m benchmarks.worker TASK NAME DEVICE GLOB ROUNDS WHICH

TASK is list, time or memory; WHICH is all, or bars for the cases that have one.

Each suite has a process of its own, so that no framework's threads wait beside another's; and memory is measured in
a second one, whose allocator gives back what is freed, which would slow what is timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from .backends import SUITES
from .cases import PASSES, Case, Job, Pair
from .memory import peak_bytes
from .timing import grow_up, measured, ratio


class Differs(Exception):
    """Ours and the peer do not compute the same."""


def rows(task: str, cases: Iterator[Case | Job], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each case: what it is, and its figures."""
    for case in cases:
        if task == "list":
            yield {"name": case.name}
        elif isinstance(case, Job):
            yield _memory_of_job(case) if task == "memory" else _time_of_job(case, rounds)
        else:
            pair = case.make()
            yield _memory(case, pair) if task == "memory" else _time(case, pair, rounds)


def _time(case: Case, pair: Pair, rounds: int) -> dict[str, Any]:
    _compare(case, *pair.results(), pair.tolerance)
    dtype = np.dtype("uint16" if case.dtype == "bfloat16" else case.dtype)
    source, target = np.ones(case.shape, dtype), np.zeros(case.shape, dtype)
    copies = PASSES[case.mode] // 2

    def copy() -> None:
        for _ in range(copies):
            np.copyto(target, source)

    seconds = measured({"ours": pair.ours, "peer": pair.peer, "copy": copy}, rounds)
    found = ratio(seconds["ours"], seconds["peer"])
    # A copy moves the bytes twice: it reads them and writes them.
    limit = ratio(seconds["ours"], seconds["copy"]).median * 2 * copies / PASSES[case.mode]
    return {
        "name": case.name, "backend": case.backend, "peer": case.peer, "mode": case.mode, "layout": case.layout,
        "shape": list(case.shape), "dtype": case.dtype, "ratio": found.median, "low": found.low, "high": found.high,
        "bar": case.bar, "reached": None if case.bar is None else found.low <= case.bar, "copies": limit,
    }  # fmt: skip


def _compare(case: Case, ours: tuple[Any, ...], peer: tuple[Any, ...], tolerance: float) -> None:
    for mine, theirs in zip(ours, peer, strict=True):
        exact = np.asarray(theirs, np.float64)
        error = np.abs(np.asarray(mine, np.float64) - exact).max() / np.abs(exact).max()
        if not error <= tolerance:
            raise Differs(f"results differ by {error:.2g} of the largest, not timed")


def _memory(case: Case, pair: Pair) -> dict[str, Any]:
    results = sum(np.asarray(part).nbytes for part in pair.results()[0])
    found = peak_bytes(pair.ours) if pair.memory is None else pair.memory()
    return {"name": case.name, "memory": None if found is None else found / results}


def _time_of_job(job: Job, rounds: int) -> dict[str, Any]:
    calls = {"ours": job.ours} if job.against is None else {"ours": job.ours, "peer": job.against}
    seconds = measured(calls, min(rounds, job.rounds), settle=job.settle)
    found = ratio(seconds["ours"], seconds.get("peer", [1.0] * len(seconds["ours"])))
    return {
        "name": job.name, "backend": "core", "peer": job.peer, "mode": None, "layout": job.what, "shape": [],
        "dtype": None, "ratio": found.median, "low": found.low, "high": found.high, "bar": job.bar,
        "reached": found.low <= job.bar, "copies": None,
    }  # fmt: skip


def _memory_of_job(job: Job) -> dict[str, Any]:
    found = None if job.memory is None else job.memory()
    row = {"name": job.name, "megabytes": None if found is None else found / 1e6}
    if found is not None and job.memory_bar is not None:
        row |= {"memory_bar": job.memory_bar / 1e6, "fits": found <= job.memory_bar}
    return row


def main(task: str, name: str, device: str, glob: str, rounds: str, which: str) -> None:
    """Print the rows; the last line of a case that failed says why."""
    if task == "time":
        grow_up()
    for case in SUITES[name].cases(device):
        if not fnmatchcase(case.name, glob) or (which == "bars" and case.bar is None):
            continue
        try:
            for row in rows(task, iter([case]), int(rounds)):
                print(json.dumps(row), flush=True)
        except Differs as error:
            print(json.dumps({"name": case.name, "failed": str(error)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
