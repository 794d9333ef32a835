"""Large files take little memory: what is not asked for is not read, and writing goes tensor by tensor."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bnlayer.checkpoint import torch_file

MB = 2**20
LARGE = 500 * MB
MOST = 150 * MB  # what inspecting a file may take, all of Python and NumPy included
PEAK = """
import resource, sys
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def shapes(largest: int) -> dict[str, list[int]]:
    """Kernels of `largest` bytes, together 500 MB, and a batch norm."""
    kernels = {f"conv{i}.weight": [largest // 4] for i in range(LARGE // largest)}
    return {**kernels, **{f"bn.{name}": [64] for name in ("weight", "bias", "running_mean", "running_var")}}


def safetensors(path: Path, largest: int) -> None:
    """Zeros, which a file system does not store."""
    header, end = {}, 0
    for name, shape in shapes(largest).items():
        begin, end = end, end + 4 * shape[0]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def torch(path: Path, largest: int) -> None:
    """The pickle that the writer makes, and storages that are all the same zeros."""
    zeros = bytes(MB)
    pickle = b"\x80\x02}("
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, (name, shape) in enumerate(shapes(largest).items()):
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
    MAKERS[suffix](path, LARGE)
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
def test_writing_500_mb_holds_a_tensor_at_a_time(source: str, target: str, tmp_path: Path) -> None:
    largest = LARGE // 2
    MAKERS[source](tmp_path / f"large.{source}", largest)
    program = "import sys\nfrom bnlayer import checkpoint\ncheckpoint.open(sys.argv[1]).save(sys.argv[2])"
    paths = [str(tmp_path / f"large.{suffix}") for suffix in (source, target)]
    assert peak(program, *paths) < largest + MOST
    assert (tmp_path / f"large.{target}").stat().st_size > LARGE
