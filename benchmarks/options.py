"""What a call of ours can have beside x: timed against our own call without it, and judged by the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np

from .cases import MODES, Mode, NDArray, Shape
from .reference import reference

_GHOSTS: Final = 4
_WEIGHTED: Final[Mapping[Mode, float]] = {"eval": 1.1, "train": 2.0, "grad": 2.0}
_OTHER: Final[Mapping[Mode, float]] = {"train": 1.5, "grad": 1.5}
_STRICT: Final = 1.5  # of masks and weights forward, where no layout makes them hard


@dataclass(frozen=True)
class Option:
    """One of them.

    Attributes:
        name: for the case's name.
        bars: by mode; modes that it does not matter to are absent.
        kind: "mask" or "weights" of every position.
        fields: of the spec, by the number of rows.
        groups: which ghost batch each row is in, by the number of rows.
    """

    name: str
    bars: Mapping[Mode, float]
    kind: str | None = None
    fields: Callable[[int], dict[str, Any]] = field(default=lambda _: {})
    groups: Callable[[int], NDArray] | None = None

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Those in which it matters."""
        return tuple(mode for mode in MODES if mode in self.bars)

    def bar(self, mode: Mode, *, strict: bool = False) -> float:
        """The ratio to reach."""
        return _STRICT if strict and self.kind is not None and mode == "train" else self.bars[mode]

    def weights(self, shape: Shape, axis: int) -> NDArray | None:
        """What to give the call, of x's shape without the channel axis."""
        if self.kind is None:
            return None
        positions = tuple(length for i, length in enumerate(shape) if i != axis % len(shape))
        drawn = np.random.default_rng(2).uniform(0, 1, positions).astype(np.float32)
        return drawn > 0.2 if self.kind == "mask" else drawn

    def right(
        self, mode: Mode, arrays: tuple[NDArray, NDArray], values: Mapping[str, NDArray], epsilon: float, axis: int
    ) -> tuple[NDArray, ...]:
        """What the call has to compute: y, and in mode "grad" dx."""
        x, dy = arrays
        groups = None if self.groups is None else self.groups(len(x))
        weights = self.weights(x.shape, axis)
        return reference(mode, x, dy, values, epsilon, axis=axis, weights=weights, groups=groups)


def _renorm(_: int) -> dict[str, Any]:
    from bnlayer import Renorm

    # With these clips, which cost what others do, the result is that of the plain call.
    return {"renorm": Renorm(r_max=1.0, r_min=1.0, d_max=0.0)}


def _ghosts(layout: str, rows: int) -> dict[str, Any]:
    return {"virtual_batch_size": rows // _GHOSTS, "virtual_batch_layout": layout}


OPTIONS: Final = (
    Option("mask", _WEIGHTED, "mask"),
    Option("weights", _WEIGHTED, "weights"),
    Option("renorm", _OTHER, fields=_renorm),
    Option("strided ghosts", _OTHER, None, partial(_ghosts, "strided"), lambda n: np.arange(n) % _GHOSTS),
    Option(
        "consecutive ghosts", _OTHER, None, partial(_ghosts, "consecutive"), lambda n: np.arange(n) // (n // _GHOSTS)
    ),
)
