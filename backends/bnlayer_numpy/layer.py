"""`BatchNorm`: a small mutable layer over `batch_norm`, for NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnlayer.call import trains
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .cache import Cache, Gradients
from .function import batch_norm_backward, batch_norm_forward

NDArray = np.ndarray[Any, np.dtype[Any]]


class BatchNorm:
    """Batch normalization that keeps its own state.

        layer = BatchNorm(BatchNormSpec(3))
        y = layer(x, training=True)
        gradients = layer.backward(dy)

    Attributes:
        spec: what the layer is.
        state: parameters and moving statistics; assign a new one to change them.
        frozen_statistics: True: the moving statistics normalize and stay as they are, in training too.
        cache: of the last call, for `backward`.
    """

    def __init__(self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None) -> None:
        self.spec = spec
        self.state = BatchNormState.initial(spec) if state is None else state.checked(spec)
        self.frozen_statistics = False
        self.cache: Cache | None = None

    def __call__(
        self,
        x: NDArray,
        *,
        training: bool,
        weights: NDArray | None = None,
        update_stats: bool = True,
        adjustment: tuple[NDArray, NDArray] | None = None,
        renorm_clips: Mapping[str, float | None] | None = None,
    ) -> NDArray:
        """Normalize x; see `bnlayer_numpy.batch_norm`."""
        y, self.state, self.cache = batch_norm_forward(
            x,
            self.state,
            self.spec,
            training=trains(self.spec, training, self.frozen_statistics),
            weights=weights,
            update_stats=update_stats,
            adjustment=adjustment,
            renorm_clips=renorm_clips,
        )
        return y

    def backward(self, dy: NDArray, cache: Cache | None = None) -> Gradients:
        """Gradients of the last call, or of the one that left `cache`; see `bnlayer_numpy.batch_norm_backward`.

        Raises:
            InputError: the layer was not called yet, or dy is not of y's shape.
        """
        cache = self.cache if cache is None else cache
        if cache is None:
            raise InputError("backward needs a forward call first; call the layer, then backward.")
        return batch_norm_backward(dy, cache)
