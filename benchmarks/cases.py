"""What is timed: a backend's layer against its peer, or one of the core's jobs; and the bar, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]
Mode = Literal["eval", "train", "grad"]
Shape = tuple[int, ...]

# Batch first and channels last; a backend that has channels first moves them.
IMAGES: Final[tuple[Shape, ...]] = ((32, 56, 56, 64), (64, 14, 14, 256), (128, 7, 7, 512), (8, 112, 112, 64))
ROWS: Final[tuple[Shape, ...]] = ((256, 128), (65536, 64), (8, 64))
MODES: Final[tuple[Mode, ...]] = ("eval", "train", "grad")
# How often a batch norm moves the bytes of its input at the least: read x, write y; read x twice, write y; and for the
# gradient as well, read x and dy twice and write dx.
PASSES: Final[dict[Mode, int]] = {"eval": 2, "train": 3, "grad": 8}


@dataclass(frozen=True)
class Pair:
    """One case, made.

    Attributes:
        ours, peer: run it once, to the end.
        results: what both compute, y first, as numpy; compared before anything is timed.
        tolerance: by which they may differ, relative to the largest value.
        memory: the bytes that one call of ours has at most at a time, its results among them, where the package that
            allocates can tell; else the process is watched.
    """

    ours: Callable[[], object]
    peer: Callable[[], object]
    results: Callable[[], tuple[tuple[NDArray, ...], tuple[NDArray, ...]]]
    tolerance: float = 1e-4
    memory: Callable[[], int] | None = None


@dataclass(frozen=True)
class Case:
    """A layer's call, and what it is compared with.

    Attributes:
        backend: whose layer.
        peer: what it is compared with; "ours, ..." for another call of our own.
        mode: eval, train (forward) or grad (forward and backward in training mode).
        layout: such as "NHWC", and what is special about the call after a comma: "NHWC, mask".
        shape: of the input as this backend has it.
        bar: the ratio to reach; None: it is only told.
        make: makes the pair; frameworks are imported there.
    """

    backend: str
    peer: str
    mode: Mode
    dtype: str
    layout: str
    shape: Shape
    bar: float | None
    make: Callable[[], Pair]

    @property
    def name(self) -> str:
        """For tables and for `--match`."""
        return f"{self.backend}/{self.peer}/{self.layout}/{length(self.shape)}/{self.dtype}/{self.mode}"


@dataclass(frozen=True)
class Job:
    """A job of the core, such as reading a file.

    Attributes:
        what, peer: in words.
        ours, against: run each once; against None the figure is in seconds.
        bar: the ratio, or the seconds, to reach.
        rounds: how often it is timed at the most.
        settle: runs before each measurement, untimed.
        memory: the bytes that ours takes at the most, measured apart.
        memory_bar: what that may be.
    """

    what: str
    peer: str
    ours: Callable[[], object]
    against: Callable[[], object] | None
    bar: float
    rounds: int = 15
    settle: Callable[[], object] | None = None
    memory: Callable[[], int] | None = None
    memory_bar: int | None = None

    @property
    def name(self) -> str:
        """For tables and for `--match`."""
        return f"core/{self.what}/{self.peer}"


def length(shape: Shape) -> str:
    """A shape as it is written in names: 32x56x56x64."""
    return "x".join(map(str, shape))


def data(shape: Shape, dtype: str = "float32", *, mean: float = 0.5, seed: int = 0) -> tuple[NDArray, NDArray]:
    """x and dy."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, dtype=np.float32) + np.float32(mean)
    return x.astype(dtype), rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def parameters(channels: int, seed: int = 1) -> dict[str, NDArray]:
    """gamma, beta, moving_mean, moving_variance."""
    rng = np.random.default_rng(seed)
    return {
        "gamma": rng.uniform(0.5, 1.5, channels).astype(np.float32),
        "beta": rng.normal(0, 0.1, channels).astype(np.float32),
        "moving_mean": rng.normal(0.5, 0.1, channels).astype(np.float32),
        "moving_variance": rng.uniform(0.5, 1.5, channels).astype(np.float32),
    }
