"""Synchronized statistics of Keras layers, on the engines of the frameworks that Keras runs on."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install 'bnlayer[keras]'", allow_module_level=True)

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}


def start(script, *arguments, runtime):
    if find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed: pip install 'bnlayer[keras,{runtime}]'")
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        env={**os.environ, **QUIET, "KERAS_BACKEND": runtime},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes):
    """All of them, also where one fails and leaves the others waiting."""
    try:
        texts = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 0, text


def test_replicas_of_tf_distribute():
    finish([start("synchronized_on_tensorflow.py", runtime="tensorflow")])


def test_processes_of_torch_distributed(tmp_path):
    finish([start("synchronized_on_torch.py", str(rank), str(tmp_path / "met"), runtime="torch") for rank in range(3)])
