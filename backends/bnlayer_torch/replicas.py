"""One step on several replicas: a pool of processes, each with one replica, joined by torch.distributed (gloo).

The processes are started when replicas are asked for first, serve every later step, and end with this process. Each is
an interpreter of its own that imports this module and nothing of the program that uses it, so that scripts without a
main guard, notebooks and `python -c` can use it as well.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from bnlayer.contract import NDArray, Outcome, Request
from bnlayer.errors import BatchNormError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

if TYPE_CHECKING:
    import torch.distributed as dist

_Job = tuple[BatchNormSpec, BatchNormState[NDArray], Request, str]
_Answer = tuple[int, Outcome | Exception | None]  # of which replica; None where its process ended

_LEAST: Final = 3  # processes of a pool: torch takes seconds to import, and a step on fewer uses some of them
_TIMEOUT: Final = 300.0  # seconds for a step, the start of the processes included
_GRACE: Final = 5.0  # seconds that the others have to answer after one has failed, and that a process has to end

_CHILD: Final = """
import json, sys
_, path, rank, size, folder = sys.argv
sys.path[:] = json.loads(path)
from bnlayer_torch.replicas import serve
serve(int(rank), int(size), folder)
"""


class ReplicaError(BatchNormError, RuntimeError):
    """A replica's process ended, or did not answer in time."""


def run(
    spec: BatchNormSpec,
    state: BatchNormState[NDArray],
    requests: Sequence[Request],
    device: str = "cpu",
    timeout: float = _TIMEOUT,
) -> list[Outcome]:
    """Each request on a replica of its own, all at once; their outcomes in order.

    Args:
        spec, state: of the layer, the same on every replica.
        requests: one for each replica.
        device: of the replicas' tensors.
        timeout: seconds for all of it.

    Raises:
        ReplicaError: a process ended, or did not answer in time.
        Exception: what a replica raised, of its type, with the replica's traceback as a note.
    """
    global _pool
    with _one_step_at_a_time:
        if _pool is not None and _pool.size < len(requests):
            _pool.close()
            _pool = None
        if _pool is None:
            _pool = _Pool(max(_LEAST, len(requests)))
        try:
            return _pool.run([(spec, state, request, device) for request in requests], timeout)
        finally:
            if _pool.broken:
                _pool.close()
                _pool = None


_pool: _Pool | None = None
_one_step_at_a_time: Final = threading.Lock()


@atexit.register
def _end() -> None:
    if _pool is not None:
        _pool.close()


class _Pool:
    """Processes that wait for steps.

    Attributes:
        size: how many.
        broken: whether one may still be waiting for another that has failed, so that none can serve a next step.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.broken = False
        self._folder = tempfile.mkdtemp(prefix="bnlayer-replicas-")
        self._answers: queue.Queue[_Answer] = queue.Queue()
        self._workers = [_Worker(rank, size, self._folder, self._answers) for rank in range(size)]

    def run(self, jobs: Sequence[_Job], timeout: float) -> list[Outcome]:
        """What each job gave; a process without one has none to answer."""
        self.broken = True
        until = time.monotonic() + timeout
        for rank, worker in enumerate(self._workers):
            worker.send((len(jobs), jobs[rank] if rank < len(jobs) else None))
        outcomes: dict[int, Outcome] = {}
        raised: dict[int, Exception] = {}
        ended: list[int] = []
        while len(outcomes) + len(raised) < len(jobs):
            try:
                rank, answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if isinstance(answer, Outcome):
                outcomes[rank] = answer
                continue
            if answer is None:
                ended.append(rank)
            else:
                raised[rank] = answer
            until = min(until, time.monotonic() + _GRACE)
        # What went wrong first says more than what followed: the others lose or miss the one that ended or raised.
        if ended:
            codes = ", ".join(f"{rank} ended with exit code {self._workers[rank].exit_code()}" for rank in ended)
            raise ReplicaError(f"the process of replica {codes}; what it wrote says why.")
        if raised:
            complete = len(outcomes) + len(raised) == len(jobs)
            self.broken = not (complete and all(isinstance(error, BatchNormError) for error in raised.values()))
            raise raised[min(raised)]
        if len(outcomes) < len(jobs):
            late = sorted(set(range(len(jobs))) - set(outcomes))
            raise ReplicaError(
                f"the processes of replicas {late} did not answer in {timeout:g} seconds; they are ended."
            )
        self.broken = False
        return [outcomes[rank] for rank in range(len(jobs))]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close(kill=self.broken)
        shutil.rmtree(self._folder, ignore_errors=True)


class _Worker:
    """One process, seen from here."""

    def __init__(self, rank: int, size: int, folder: str, answers: queue.Queue[_Answer]) -> None:
        self._rank = rank
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(rank), str(size), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input: IO[bytes] = self._process.stdin
        # A pipe cannot be read with a timeout on every system; a queue can.
        threading.Thread(target=self._listen, args=(self._process.stdout, answers), daemon=True).start()

    def send(self, job: tuple[int, _Job | None]) -> None:
        """Give the process something to do."""
        try:
            pickle.dump(job, self._input, pickle.HIGHEST_PROTOCOL)
            self._input.flush()
        except OSError:
            return  # it has ended, which `_listen` finds as well

    def exit_code(self) -> int:
        """Of the process, which has closed its output."""
        return self._process.wait()

    def close(self, *, kill: bool) -> None:
        """End the process: it does so by itself at the end of its input, unless it waits for another."""
        if kill:
            self._process.kill()
        with suppress(OSError):  # what was not sent yet has nowhere to go
            self._input.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self, output: IO[bytes], answers: queue.Queue[_Answer]) -> None:
        with output:
            while True:
                try:
                    answers.put((self._rank, pickle.load(output)))
                except (EOFError, pickle.UnpicklingError, OSError):
                    answers.put((self._rank, None))
                    return


def serve(rank: int, size: int, folder: str) -> None:
    """What a process of the pool does: run the steps on its input until that ends, and answer each on its output.

    Args:
        rank: of this process among the pool's.
        size: of the pool.
        folder: where the processes find each other.
    """
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # there are as many processes as replicas
    _stay_local()
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_TIMEOUT),
    )
    groups: dict[int, dist.ProcessGroup] = {}
    while True:
        try:
            replicas, job = pickle.load(jobs)
        except EOFError:
            break
        if replicas not in groups:  # every process of the pool has to make every group
            group: Any = dist.new_group(list(range(replicas)))
            groups[replicas] = group
        if job is None:
            continue
        answer: Outcome | Exception
        try:
            answer = _step(job, groups[replicas])
        except Exception as error:  # whatever it is, it belongs to the caller
            answer = _portable(error, rank)
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
    dist.destroy_process_group()


def _step(job: _Job, group: dist.ProcessGroup) -> Outcome:
    from .backend import BACKEND

    spec, state, request, device = job
    layer = BACKEND.build(spec, state, device=device)
    layer.process_group = group
    return BACKEND.step(layer, request)[1]


def _portable(error: Exception, rank: int) -> Exception:
    """The error, with where it was raised; by its text alone where it cannot be pickled."""
    note = f"In replica {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error's constructor may take what its pickle does not have
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _stay_local() -> None:
    """Let gloo connect over the loopback device, where it is known: a machine may not know an address of its own."""
    names = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    for loopback in ("lo", "lo0"):
        if loopback in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
