"""Large files take little memory: what is not asked for is not read, and writing goes tensor by tensor."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bnlayer import checkpoint
from bnlayer.checkpoint import Checkpoint, Tensor, torch_file

MB = 2**20
LARGE = 500 * MB
WRITTEN = 320 * MB  # enough to tell whether a tensor or all of them are held
MOST = 150 * MB  # what inspecting a file may take, all of Python and NumPy included
# Linux's ru_maxrss begins at the peak of the process that this one was forked from; VmHWM is its own.
PEAK = """
import pathlib, re, resource, sys
status = pathlib.Path("/proc/self/status")
if status.exists():
    print(int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def shapes(largest: int, count: int) -> dict[str, list[int]]:
    """`count` kernels of `largest` bytes, and a batch norm."""
    kernels = {f"conv{i}.weight": [largest // 4] for i in range(count)}
    return {**kernels, **{f"bn.{name}": [64] for name in ("weight", "bias", "running_mean", "running_var")}}


def safetensors(path: Path, largest: int, count: int) -> None:
    """Zeros, which a file system does not store."""
    header, end = {}, 0
    for name, shape in shapes(largest, count).items():
        begin, end = end, end + 4 * shape[0]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def torch(path: Path, largest: int, count: int) -> None:
    """The pickle that the writer makes, and storages that are all the same zeros."""
    zeros = bytes(MB)
    pickle = b"\x80\x02}("
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, (name, shape) in enumerate(shapes(largest, count).items()):
            pickle += torch_file._text(name) + (
                b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
                + torch_file._text(str(key)) + b"X\x03\0\0\0cpu" + torch_file._int(shape[0]) + b"tQK\0"
                + torch_file._ints(shape) + torch_file._ints([1]) + b"\x89ccollections\nOrderedDict\n)RtR"
            )  # fmt: skip
            with archive.open(f"m/data/{key}", "w") as member:
                left = 4 * shape[0]
                while left:
                    left -= member.write(zeros[: min(left, MB)])
        archive.writestr("m/data.pkl", pickle + b"u.")


MAKERS = {"safetensors": safetensors, "pt": torch}


def peak(program: str, *arguments: str) -> int:
    """The most bytes that a process which runs this has in memory at a time."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{PEAK}", *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("suffix", MAKERS)
def test_inspecting_500_mb(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"large.{suffix}"
    MAKERS[suffix](path, LARGE, 1)
    assert path.stat().st_size > LARGE
    program = """
import sys
from bnlayer.commands.inspect import command
try:
    command([sys.argv[1], "--json"])
except SystemExit as end:
    assert end.code in (0, 1), end.code
"""
    assert peak(program, str(path)) < MOST


@pytest.mark.parametrize(("source", "target"), [("safetensors", "pt"), ("pt", "safetensors")])
def test_writing_holds_a_tensor_at_a_time(source: str, target: str, tmp_path: Path) -> None:
    largest = WRITTEN // 5
    MAKERS[source](tmp_path / f"large.{source}", largest, 5)
    program = "import sys\nfrom bnlayer import checkpoint\ncheckpoint.open(sys.argv[1]).save(sys.argv[2])"
    paths = [str(tmp_path / f"large.{suffix}") for suffix in (source, target)]
    assert peak(program, *paths) < largest + MOST
    assert (tmp_path / f"large.{target}").stat().st_size > WRITTEN


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not tell how much was read")
def test_inspecting_a_keras_file_reads_its_batch_norms_and_not_its_kernels_again(tmp_path: Path) -> None:
    """HDF5 jumps to and fro, and what zipfile opens reads everything anew to go back."""
    layers, kernel = 30, np.zeros(2**22, np.float32)
    arrays = {"layers/conv2d/vars/0": kernel}
    for i in range(layers):
        for j in range(4):
            arrays[f"layers/batch_normalization{f'_{i}' if i else ''}/vars/{j}"] = np.full(8, 1.0 + j, np.float32)
    made = Checkpoint("made", {n: Tensor.of(a) for n, a in arrays.items()}, order_is_meaningful=False)
    made.save(tmp_path / "x.weights.h5")
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.write(tmp_path / "x.weights.h5", "model.weights.h5")
    before = bytes_read()
    states = [one.state() for one in checkpoint.open(tmp_path / "x.keras").batch_norms()]
    assert len(states) == layers
    assert bytes_read() - before < kernel.nbytes


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])
