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
_REWRITE: Final = (
    "import sys; from bnlayer import checkpoint as c; c.save(c.open(sys.argv[1]), sys.argv[2], force=True)"
)
_CHANNELS: Final = 256  # of every layer
_LAYERS: Final = 1000
_FEWER: Final = 250


def cases(device: str = "cpu") -> Iterator[Job]:
    """Starting, inspecting, rewriting, matching, and the whole of NumPy's conformance."""
    numpy = partial(_run, "-c", "import numpy")
    yield Job("import bnlayer", "import numpy", partial(_run, "-c", "import bnlayer"), numpy, 1.5)
    yield Job("bnlayer --help", "import numpy", partial(_bnlayer, "--help"), numpy, 2.0)
    if find_spec("torch") is not None:
        for suffix in (".safetensors", ".pt"):
            yield Job(f"bnlayer inspect, 100 MB {suffix}", "import torch", partial(_inspect, suffix),
                      partial(_run, "-c", "import torch"), 0.2, rounds=11)  # fmt: skip
    for suffix in (".safetensors", ".pt"):
        # What a copy has not yet written to the disk, a flush of another file would have to wait for.
        yield Job(
            f"rewrite 500 MB {suffix}", "shutil.copyfile", partial(_rewrite, suffix), partial(_copy, suffix), 3.0,
            settle=os.sync, memory=partial(_memory_of_rewriting, suffix), memory_bar=200_000_000,
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
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with exit code {process.returncode}.")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bnlayer(*arguments: str) -> int:
    return _run("-c", "from bnlayer.cli import main; main()", *arguments)


def _inspect(suffix: str) -> None:
    _bnlayer("inspect", str(_file(_READ, suffix)))


def _rewrite(suffix: str) -> None:
    from bnlayer import checkpoint

    source = _file(_REWRITTEN, suffix)
    checkpoint.save(checkpoint.open(source), source.with_name(f"rewritten{suffix}"), force=True)


def _memory_of_rewriting(suffix: str) -> int:
    """In a process of its own, with Python and all that it imports."""
    source = _file(_REWRITTEN, suffix)
    return _run("-c", _REWRITE, str(source), str(source.with_name(f"rewritten{suffix}")))


def _copy(suffix: str) -> None:
    source = _file(_REWRITTEN, suffix)
    shutil.copyfile(source, source.with_name(f"copied{suffix}"))


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bnlayer-benchmarks-")


@cache
def _file(size: int, suffix: str) -> Path:
    """A checkpoint of about this many bytes."""
    from bnlayer.checkpoint import Checkpoint

    path = Path(_folder().name, f"{size}{suffix}")
    blocks = size // (_CHANNELS * _CHANNELS * 9 * 4)
    tensors = _tensors(f"blocks.{i}." for i in range(blocks))
    Checkpoint("torch", tensors, order_is_meaningful=True).save(path)
    return path


def _tensors(prefixes: Iterable[str]) -> dict[str, Any]:
    """A convolution and a trained batch norm under each of these names."""
    from bnlayer.checkpoint import Tensor

    rng = np.random.default_rng(0)
    weight = Tensor.of(rng.standard_normal((_CHANNELS, _CHANNELS, 3, 3), dtype=np.float32))
    arrays = {name: Tensor.of(rng.uniform(0.5, 1.5, _CHANNELS).astype(np.float32))
              for name in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip
    arrays["num_batches_tracked"] = Tensor.of(np.array(1000))
    found = {}
    for prefix in prefixes:
        found[f"{prefix}conv.weight"] = weight
        found |= {f"{prefix}bn.{name}": array for name, array in arrays.items()}
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
