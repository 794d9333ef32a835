"""Writing is whole or not at all: killed at any moment, what was there or what was written is there, and readable."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bnlayer import checkpoint
from bnlayer.checkpoint import Checkpoint, CheckpointError, Tensor

KILLS = 200
# One process has imported everything; for each line that it gets, a fork of it writes until it is killed.
WRITER = """
import os, sys
import numpy as np
from bnlayer.checkpoint import Checkpoint, Tensor, save
path, format = sys.argv[1:]
def write(value):
    tensors = {n: Tensor.of(np.full(10_000, value, np.float32)) for n in "abcd"}
    save(Checkpoint("x", tensors, order_is_meaningful=True), path, format, force=True)
write(0)
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        for i in range(10**9):
            write(i % 2)
    print(pid, flush=True)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""


def one(value: float) -> Checkpoint:
    return Checkpoint("x", {"a": Tensor.of(np.full(3, value))}, order_is_meaningful=True)


@pytest.mark.parametrize("format", ["torch", "safetensors", "npz", "tensorflow"])
def test_killed_at_random_moments(format: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    chosen = random.Random(format)
    arguments = [sys.executable, "-c", WRITER, str(path), format]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for _ in range(KILLS // 4):
            server.stdin.write("go\n")
            server.stdin.flush()
            writer = int(server.stdout.readline())
            time.sleep(chosen.uniform(0.0, 0.03))
            os.kill(writer, signal.SIGKILL)
            assert int(server.stdout.readline()) == signal.SIGKILL
            whole(path)
        server.stdin.close()


def whole(path: Path) -> None:
    found = checkpoint.open(path)
    values = {float(v) for name in found for v in np.unique(found[name])}
    assert sorted(found) == ["a", "b", "c", "d"]
    assert values in ({0.0}, {1.0})


def test_what_is_there_is_not_replaced_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    one(1.0).save(path)
    with pytest.raises(CheckpointError, match="--force"):
        one(2.0).save(path)
    assert checkpoint.open(path)["a"][0] == 1.0
    one(2.0).save(path, force=True)
    assert checkpoint.open(path)["a"][0] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("format", ["torch", "safetensors", "npz", "tensorflow", "flax", "keras.h5"])
def test_a_failure_leaves_what_was_there(format: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    one(1.0).save(path, format)
    broken = Checkpoint("x", {"a": Tensor(np.dtype(np.float64), (3,), _fails)}, order_is_meaningful=True)
    with pytest.raises(OSError, match="disk"):
        broken.save(path, format, force=True)
    assert checkpoint.open(path)["a"][0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def _fails() -> np.ndarray:
    raise OSError("the disk is gone")


def test_a_checkpoint_can_be_saved_over_the_file_it_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    Checkpoint("x", {n: Tensor.of(np.full(3, 1.0)) for n in "ab"}, order_is_meaningful=True).save(path)
    found = checkpoint.open(path)
    found.replace({"a": np.full(3, 2.0)}).save(path, force=True)
    again = checkpoint.open(path)
    assert (again["a"][0], again["b"][0]) == (2.0, 1.0)
    with pytest.raises(CheckpointError, match="changed or replaced"):
        found["b"]


def test_mode_and_links_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "x.npz", tmp_path / "link.npz"
    one(1.0).save(path)
    path.chmod(0o640)
    link.symlink_to(path)
    one(2.0).save(link, force=True)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert checkpoint.open(path)["a"][0] == 2.0


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(CheckpointError, match="folder is there"):
        one(1.0).save(tmp_path / "x.npz", force=True)
    assert (tmp_path / "x.npz").is_dir()
