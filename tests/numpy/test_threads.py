"""Blocks shared out among threads: the same results, the caller's error state, errors that arrive, forks that work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from bnlayer import BatchNormSpec, BatchNormState
from bnlayer_numpy import batch_norm_backward, batch_norm_forward, layout, threads

LARGE = (4096, 1024)  # 16 MB: cut into larger blocks too, where there are several cores


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    layout.panels.cache_clear()


def use(patch: pytest.MonkeyPatch, number: int) -> None:
    for module in (threads, layout):
        patch.setattr(module, "cores", lambda: number)
    layout.panels.cache_clear()


@pytest.mark.parametrize("mean", [0.5, 1e3])
@pytest.mark.parametrize("axis", [1, -1])
def test_any_number_of_cores_gives_the_same(cores: pytest.MonkeyPatch, axis: int, mean: float) -> None:
    shape = LARGE if axis == -1 else (64, 64, 32, 32)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32) + np.float32(mean)
    dy = rng.standard_normal(shape, np.float32)
    spec = BatchNormSpec(shape[axis], axis=axis)
    found = []
    for number in (1, 2, 4):
        use(cores, number)
        y, after, cache = batch_norm_forward(x, BatchNormState.initial(spec), spec, training=True)
        gradients = batch_norm_backward(dy, cache)
        found.append((y, after.moving_mean, after.moving_variance, gradients.dx, gradients.dgamma, gradients.dbeta))
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5 * float(np.abs(wanted).max()))


def test_work_runs_on_several_threads_in_the_callers_error_state(cores: pytest.MonkeyPatch) -> None:
    use(cores, 2)
    both = threading.Barrier(2)  # passed only if two threads are in it at a time

    def work(part: Sequence[int]) -> int:
        both.wait(10)
        np.float32(1e38) * np.float32(1e38)
        return len(part)

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("error")
        assert threads.shared(range(40), work) == [20, 20]


def test_an_error_on_another_thread_is_raised_here_when_all_have_ended(cores: pytest.MonkeyPatch) -> None:
    use(cores, 2)
    ended = []

    def work(part: Sequence[int]) -> None:
        try:
            if 39 in part:
                raise ValueError("of the last block")
        finally:
            ended.append(len(part))

    with pytest.raises(ValueError, match="of the last block"):
        threads.shared(range(40), work)
    assert ended == [20, 20]


def test_few_blocks_stay_on_one_thread(cores: pytest.MonkeyPatch) -> None:
    use(cores, 4)
    assert len(threads.shared(range(7), len)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    program = """
import os
import numpy as np
from bnlayer import BatchNormSpec, BatchNormState
from bnlayer_numpy import batch_norm, layout, threads
threads.cores = layout.cores = lambda: 2
x = np.ones((4096, 1024), np.float32)
spec = BatchNormSpec(1024)
state = BatchNormState.initial(spec)
batch_norm(x, state, spec, training=True)
child = os.fork()
if child == 0:
    batch_norm(x, state, spec, training=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60,
                          check=True)  # fmt: skip
    assert done.stdout == "0\n"


@pytest.mark.parametrize(("asked", "most"), [("1", 1), ("nonsense", 4), ("0", 1)])
def test_people_say_how_many_by_omp_num_threads(asked: str, most: int) -> None:
    program = "from bnlayer_numpy.threads import cores; print(cores())"
    environment = {**os.environ, "OMP_NUM_THREADS": asked}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert 1 <= int(done.stdout) <= most
