"""The core: how fast it starts, reads, rewrites and matches, each against what people know the time of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import Any, Final

import numpy as np

from .cases import Job

_READ: Final = 100_000_000  # bytes of the file that is inspected
_REWRITTEN: Final = 500_000_000
_REWRITE: Final = "import sys; from bnlayer import checkpoint as c; c.save(c.open(sys.argv[1]), sys.argv[2], force=True)"
_LAYERS: Final = 1000
_FEWER: Final = 250


def cases() -> Iterator[Job]:
    """Starting, inspecting, rewriting, matching, and the whole of NumPy's conformance."""
    numpy = partial(_run, "-c", "import numpy")
    yield Job("import bnlayer", "import numpy", partial(_run, "-c", "import bnlayer"), numpy, 1.5)
    yield Job("bnlayer --help", "import numpy", partial(_bnlayer, "--help"), numpy, 2.0)
    if find_spec("torch") is not None:
        for suffix in (".safetensors", ".pt"):
            yield Job(
                f"bnlayer inspect, 100 MB {suffix}", "import torch", lambda s=suffix: _inspect(_file(_READ, s)),
                partial(_run, "-c", "import torch"), 0.2, rounds=11,
            )  # fmt: skip
    for suffix in (".safetensors", ".pt"):
        yield Job(
            f"rewrite 500 MB {suffix}", "copy of the file", lambda s=suffix: _rewrite(s), lambda s=suffix: _copy(s), 3.0,
            rounds=11, memory=lambda s=suffix: _rewrite(s), memory_bar=200_000_000,
        )  # fmt: skip
    yield Job(f"match {_LAYERS} layers", "one second", partial(_match, _LAYERS), None, 1.0)
    yield Job(
        f"match {_LAYERS} layers", f"match {_FEWER}", partial(_match, _LAYERS), partial(_match, _FEWER),
        _LAYERS * log(_LAYERS) / (_FEWER * log(_FEWER)),
    )  # fmt: skip
    yield Job("bnlayer conform --backend numpy", "one second", partial(_bnlayer, "conform", "--backend", "numpy"), None,
              15.0, rounds=7)  # fmt: skip


def _run(*arguments: str) -> int:
    """Run Python; the peak of its memory, in bytes."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with exit code {process.returncode}.")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bnlayer(*arguments: str) -> int:
    return _run("-c", "from bnlayer.cli import main; main()", *arguments)


def _inspect(path: Path) -> None:
    _bnlayer("inspect", str(path))


def _rewrite(suffix: str) -> int:
    source = _file(_REWRITTEN, suffix)
    return _run("-c", _REWRITE, str(source), str(source.with_name(f"rewritten{suffix}")))


def _copy(suffix: str) -> None:
    """A copy by a Python of its own, whose start is no part of what is compared, and which reads and writes bytes.

    `shutil.copyfile` has the kernel copy, or share, the file; a program that rewrites a file cannot.
    """
    source = _file(_REWRITTEN, suffix)
    target = source.with_name(f"copied{suffix}")
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())  # as a rewritten one is, before it takes its place


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bnlayer-benchmarks-")


@cache
def _file(size: int, suffix: str) -> Path:
    """A checkpoint of about this many bytes, of blocks of a convolution and a batch norm."""
    from bnlayer.checkpoint import Checkpoint, Tensor

    path = Path(_folder().name, f"{size}{suffix}")
    weight = np.random.default_rng(0).standard_normal((256, 256, 3, 3), dtype=np.float32)
    blocks = size // weight.nbytes
    tensors = _tensors(f"blocks.{i}." for i in range(blocks))
    tensors |= {f"blocks.{i}.conv.weight": Tensor.of(weight) for i in range(blocks)}
    Checkpoint("torch", tensors, order_is_meaningful=True).save(path)
    return path


def _tensors(prefixes: Iterable[str]) -> dict[str, Any]:
    """Convolutions and batch norms of these names, of 256 channels, that a model has that never trained."""
    from bnlayer.checkpoint import Tensor

    def full(shape: tuple[int, ...], value: float, dtype: str = "float32") -> Tensor:
        return Tensor(np.dtype(dtype), shape, lambda: np.full(shape, value, dtype))

    found = {}
    for prefix in prefixes:
        found[f"{prefix}conv.weight"] = full((256, 256, 3, 3), 0)
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            found[f"{prefix}bn.{name}"] = full((256,), value)
        found[f"{prefix}bn.num_batches_tracked"] = full((), 1, "int64")
    return found


def _match(layers: int) -> None:
    from bnlayer.porting.matching import match
    from bnlayer.porting.units import units_of

    one, other = _nets(layers)
    found = match(units_of(one), units_of(other)).matches
    if len(found) < layers:
        raise RuntimeError(f"{len(found)} of {layers} layers were matched.")


@cache
def _nets(layers: int) -> tuple[Any, Any]:
    """Two models of the same blocks, under other names: nested by stages of 20, and counted through."""
    from bnlayer.checkpoint import Checkpoint

    nested = [f"stages.{i // 20}.blocks.{i % 20}." for i in range(layers)]
    counted = [f"layer{i}." for i in range(layers)]
    one, other = (Checkpoint("torch", _tensors(names), order_is_meaningful=True) for names in (nested, counted))
    return one, other
