"""Synchronized statistics over three real processes, and the pool of processes behind a step with shards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnlayer import BatchNormSpec, InputError
from bnlayer.contract import Call, Request
from bnlayer_torch.backend import BACKEND

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this build of torch has no torch.distributed with gloo", allow_module_level=True)

from bnlayer_torch import BatchNorm1d, batch_norm, replicas  # noqa: E402

WORLD = 3
SCRIPT = Path(__file__).with_name("distributed_cases.py")
CASES = re.findall(r"^@case\ndef (\w+)", SCRIPT.read_text("utf-8"), re.MULTILINE)
SPEC = BatchNormSpec(3, synchronized=True, moving_variance_estimator="unbiased")


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """What each process found in each case: nothing wrong, or a traceback. One start of the processes for all."""
    folder = tmp_path_factory.mktemp("replicas")
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    said = []
    for process in running:
        try:
            said.append(process.communicate(timeout=240)[1])
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(process.communicate()[1])
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    return [
        (json.loads(file.read_text("utf-8")) if file.exists() else {}, text)
        for file, text in zip(files, said, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_three_processes(findings, case):
    for rank, (found, said) in enumerate(findings):
        assert case in found, f"replica {rank} did not come that far:\n{said}"
        assert not found[case], f"replica {rank}:\n{found[case]}"


def step(*rows: int, count: int | None = None, **options):
    x = np.random.default_rng(0).normal(size=(sum(rows) if count is None else count, 3)).astype(np.float32)
    return Request((Call(x, dy=np.ones_like(x) + x),), training=True, shards=rows, **options)


def test_a_step_on_replicas_is_that_of_the_whole():
    one = BACKEND.build(SPEC)
    _, whole = BACKEND.step(one, Request(step(8).calls, training=True))
    for rows in ((2, 6, 0), (5, 3), (8,)):
        layer = BACKEND.build(SPEC)
        same, outcome = BACKEND.step(layer, step(*rows))
        assert same is layer
        np.testing.assert_allclose(outcome.calls[0].y, whole.calls[0].y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outcome.calls[0].dx, whole.calls[0].dx, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(outcome.dgamma, whole.dgamma, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.running_var.numpy(), one.running_var.numpy(), rtol=1e-6)
        assert int(layer.num_batches_tracked) == 1


def test_the_pool_is_started_once_and_survives_a_refusal():
    BACKEND.step(BACKEND.build(SPEC), step(2, 6, 0))
    pool = replicas._pool
    with pytest.raises(InputError, match="more than one value") as refusal:
        BACKEND.step(BACKEND.build(SPEC), step(0, 1, 0))
    assert "In replica 0" in refusal.value.__notes__[0]
    BACKEND.step(BACKEND.build(SPEC), step(2, 6, 0))
    assert replicas._pool is pool


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match="add up"):
        BACKEND.step(BACKEND.build(SPEC), step(2, 2, count=5))
    with pytest.raises(InputError, match="synchronized=True"):
        BACKEND.step(BACKEND.build(SPEC.replace(synchronized=False)), step(2, 2))


def test_a_pool_that_lost_a_process_or_is_late_is_replaced():
    layer = BACKEND.build(SPEC)
    BACKEND.step(layer, step(2, 6, 0))
    lost = replicas._pool
    lost._workers[1]._process.kill()
    with pytest.raises(replicas.ReplicaError, match="replica 1 ended with exit code"):
        BACKEND.step(layer, step(2, 6, 0))
    assert all(worker._process.poll() is not None for worker in lost._workers)
    assert int(layer.num_batches_tracked) == 1
    with pytest.raises(replicas.ReplicaError, match="did not answer in 0 seconds"):
        replicas.run(SPEC, BACKEND.extract(layer)[1], [step(4)] * 2, timeout=0.0)
    assert replicas._pool is None


def test_a_script_without_a_main_guard_can_use_it():
    code = (
        "import numpy, bnlayer\n"
        "from bnlayer.contract import Call, Request\n"
        "backend = bnlayer.backend('torch')\n"
        "layer = backend.build(bnlayer.BatchNormSpec(1, synchronized=True, decay=0.0))\n"
        "x = numpy.array([[1.0], [2.0], [6.0]], 'f4')\n"
        "backend.step(layer, Request((Call(x),), training=True, shards=(1, 2)))\n"
        "print(float(layer.running_mean))\n"
    )
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3.0\n"


def test_without_processes_a_synchronized_layer_is_one_replica():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    ours, plain = BatchNorm1d(3, synchronized=True), BatchNorm1d(3)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    assert ours.spec == plain.spec.replace(synchronized=True)
    assert "synchronized=True" in repr(ours)
    with pytest.raises(InputError, match="more than one value"):
        ours(x[:1])


def test_a_group_without_processes_is_refused():
    state = BACKEND.extract(BACKEND.build(SPEC))[1]
    tensors = state.replace(**{name: torch.from_numpy(array) for name, array in state.arrays().items()})
    with pytest.raises(InputError, match="init_process_group"):
        batch_norm(torch.zeros(4, 3), tensors, SPEC, training=True, process_group=object())
    batch_norm(torch.zeros(4, 3), tensors, SPEC, training=False, process_group=object())
