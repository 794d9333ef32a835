"""A step on several replicas: `tf.distribute.MirroredStrategy` over logical devices.

A process has as many logical CPU devices as it was told to before TensorFlow started, which is one. So where there are
too few, a second process runs the step (`python -m bnlayer_tensorflow.replicas`), started once and used again.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from threading import Lock, Timer
from typing import IO, Any

import tensorflow as tf

from bnlayer.contract import NDArray, Outcome, Request
from bnlayer.errors import BatchNormError, UnsupportedError
from bnlayer.shards import cut, join
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .layer import BatchNorm
from .step import run_layer

TIMEOUT = 240.0  # seconds for one step, starting TensorFlow included
_LEAST = 4  # devices of the second process: enough for most requests, so that it is started once


class ReplicasError(BatchNormError, RuntimeError):
    """The process that runs the replicas ended or did not answer."""


@dataclass(frozen=True)
class _Job:
    spec: BatchNormSpec
    state: BatchNormState[NDArray]
    request: Request


def step_on_replicas(layer: BatchNorm, state: BatchNormState[NDArray], request: Request) -> Outcome:
    """The step of a layer on as many replicas as the request has shards; the layer itself stays as it is.

    Args:
        layer: says the spec, and the kind of device.
        state: where the replicas start.
        request: with shards.

    Raises:
        BatchNormError: what the replicas raise.
        ReplicasError: the second process ended, or took longer than `TIMEOUT`.
        UnsupportedError: the layer is on another kind of device than the CPU, of which there are too few.
    """
    assert request.shards is not None
    job = _Job(layer.spec, state, request)
    kind, wanted = tf.DeviceSpec.from_string(layer.num_updates.device).device_type or "CPU", len(request.shards)
    present = len(tf.config.list_logical_devices(kind))
    if present >= wanted:
        return _run(job, kind)
    if kind != "CPU":
        raise UnsupportedError(
            f"backend 'tensorflow' needs a {kind} for each of {wanted} shards and has {present}; build the layer on"
            " CPU, of which there are as many as are asked for."
        )
    return _other_process(job, wanted)


def _run(job: _Job, kind: str) -> Outcome:
    """The step on this process's devices."""
    requests = cut(job.request)
    strategy = _strategy(kind, len(requests))
    with strategy.scope():
        layer = BatchNorm(job.spec, job.state)
    outcomes: dict[int, Outcome] = {}

    def replica() -> None:  # each in a thread of its own
        place = int(tf.distribute.get_replica_context().replica_id_in_sync_group)
        outcomes[place] = run_layer(layer, requests[place])

    strategy.run(replica)
    return join(job.request, [outcomes[place] for place in range(len(requests))])


@cache
def _strategy(kind: str, number: int) -> tf.distribute.Strategy:
    # Devices of one machine without NCCL: adding up on one of them is a deterministic all-reduce.
    devices = [f"{kind}:{i}" for i in range(number)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=tf.distribute.ReductionToOneDevice())


class _Process:
    """The second process; jobs and answers are pickled through its standard streams."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        # It finds what this process finds, whatever put it on the path.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(devices)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, job: _Job) -> Outcome:
        assert self._process.stdin is not None and self._process.stdout is not None
        watchdog = Timer(TIMEOUT, self._process.kill)
        watchdog.start()
        try:
            _send(self._process.stdin, job)
            answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.close()
            raise ReplicasError(
                f"the process that runs the replicas ended or did not answer within {TIMEOUT:g} s; what it wrote to"
                " stderr says why. The next step starts a new one."
            ) from error
        finally:
            watchdog.cancel()
        if isinstance(answer, BatchNormError):
            raise answer
        assert isinstance(answer, Outcome)
        return answer

    def close(self) -> None:
        atexit.unregister(self.close)
        self._process.kill()
        self._process.communicate()


_held: list[_Process] = []
_lock = Lock()


def _other_process(job: _Job, devices: int) -> Outcome:
    with _lock:
        if not _held or not _held[0].alive or _held[0].devices < devices:
            while _held:
                _held.pop().close()
            _held.append(_Process(max(devices, _LEAST)))
        return _held[0].ask(job)


def _send(stream: IO[bytes], message: object) -> None:
    pickle.dump(message, stream)
    stream.flush()


def _serve(devices: int) -> None:
    """Answer jobs until the other end closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints must not be taken for an answer
    tf.get_logger().setLevel("ERROR")  # it would warn that eager replicas are slow
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_visible_devices([cpu])  # and no GPU, whose memory this process would take
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Any
        try:
            answer = _run(job, "CPU")
        except BatchNormError as error:
            answer = error
        _send(answers, answer)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
