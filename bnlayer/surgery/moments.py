"""The count, mean and sum of squared deviations of each channel, which add up exactly over batches and shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a channel's values, float64. `+` gives what is known of both sets together.

    Attributes:
        count: of values in each channel.
        mean: (channels,).
        m2: (channels,), the sum of squared deviations from the mean.
    """

    count: int
    mean: NDArray
    m2: NDArray

    @classmethod
    def none(cls, channels: int) -> Moments:
        """Of no values."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, x: NDArray, axis: int = -1) -> Moments:
        """Of an array with the channels on this axis."""
        wide = np.moveaxis(np.asarray(x), axis, -1).astype(np.float64)
        rows = wide.reshape(-1, wide.shape[-1])
        if not len(rows):
            return cls.none(rows.shape[1])
        mean = rows.mean(0)
        off = rows - mean
        # The second term takes off what rounding left in the mean.
        return cls(len(rows), mean, (off * off).sum(0) - off.sum(0) ** 2 / len(rows))

    def __add__(self, other: Moments) -> Moments:
        """Both together, by Chan's formula: the spread between the two means is in it."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * (other.count / count))
        return Moments(count, mean, m2)

    def variance(self, estimator: Literal["biased", "unbiased"] = "biased") -> NDArray:
        """m2 / count, or m2 / (count - 1), which of a single value is 0 as it is in training."""
        return self.m2 / max(self.count - (estimator == "unbiased"), 1)
