"""How each framework stores a layer's kernel, against one canonical layout.

Canonical is torch's: convolution (out, in / groups, *spatial), transposed convolution (in, out / groups, *spatial),
dense (out, in), embedding (number, features). The rules are the frameworks' documented kernel layouts; the tests build
each layer in each framework and compare what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A kernel's layout in a file.

    Attributes:
        name: for people and for reports, such as "HWIO".
        first: canonical axes 0 and 1 as axes of the stored kernel, counted from the end where negative: (-1, -2) is
            (*spatial, in, out) for a convolution.
        flipped: the stored kernel is the canonical one with every spatial axis reversed.
        depthwise: stored as (*spatial, channels, multiplier), which is (channels * multiplier, 1, *spatial).
    """

    name: str
    first: tuple[int, int] = (0, 1)
    flipped: bool = False
    depthwise: bool = False

    def canonical_shape(self, shape: Shape) -> Shape:
        """The canonical kernel's shape, of a stored one's."""
        if self.depthwise:
            return (shape[-2] * shape[-1], 1, *shape[:-2])
        return tuple(shape[axis] for axis in self._axes(len(shape)))

    def canonical(self, stored: NDArray) -> NDArray:
        """The canonical kernel, a view where that can be."""
        if self.depthwise:
            return np.moveaxis(stored, (-2, -1), (0, 1)).reshape(self.canonical_shape(stored.shape))
        kernel = stored.transpose(self._axes(stored.ndim))
        return self._flip(kernel) if self.flipped else kernel

    def stored(self, canonical: NDArray, shape: Shape) -> NDArray:
        """The kernel as it is stored, of this shape, contiguous."""
        if self.depthwise:
            split = canonical.reshape((*shape[-2:], *canonical.shape[2:]))
            return np.ascontiguousarray(np.moveaxis(split, (0, 1), (-2, -1)))
        kernel = self._flip(canonical) if self.flipped else canonical
        return np.ascontiguousarray(kernel.transpose(np.argsort(self._axes(kernel.ndim))))

    def _axes(self, ndim: int) -> list[int]:
        first = [axis % ndim for axis in self.first]
        return first + [axis for axis in range(ndim) if axis not in first]

    @staticmethod
    def _flip(kernel: NDArray) -> NDArray:
        return np.flip(kernel, tuple(range(2, kernel.ndim)))


CHANNELS_FIRST: Final = Layout("OI...")
CHANNELS_LAST: Final = Layout("...IO", (-1, -2))
DEPTHWISE: Final = Layout("...CM", depthwise=True)
AS_IT_IS: Final = Layout("canonical")

# By what the names or the model say of the layer: dialect, then kind.
LAYOUTS: Final[Mapping[str, Mapping[str, Layout]]] = {
    "torch": {"conv": CHANNELS_FIRST, "depthwise": CHANNELS_FIRST, "conv transpose": Layout("IO..."),
              "dense": Layout("OI"), "embedding": AS_IT_IS},
    "equinox": {"conv": CHANNELS_FIRST, "depthwise": CHANNELS_FIRST,
                "conv transpose": Layout("OI... unflipped", (1, 0), flipped=True),
                "dense": Layout("OI"), "embedding": AS_IT_IS},
    "keras": {"conv": CHANNELS_LAST, "depthwise": DEPTHWISE, "conv transpose": Layout("...OI", (-1, -2)),
              "dense": Layout("IO", (-1, -2)), "embedding": AS_IT_IS},
    "flax": {"conv": CHANNELS_LAST, "depthwise": CHANNELS_LAST,
             "conv transpose": Layout("...IO unflipped", (-2, -1), flipped=True),
             "conv transpose, transpose_kernel": Layout("...OI", (-1, -2)),
             "dense": Layout("IO", (-1, -2)), "embedding": AS_IT_IS},
    "haiku": {"conv": CHANNELS_LAST, "depthwise": CHANNELS_LAST,
              "conv transpose": Layout("...OI unflipped", (-1, -2), flipped=True),
              "dense": Layout("IO", (-1, -2)), "embedding": AS_IT_IS},
}  # fmt: skip
