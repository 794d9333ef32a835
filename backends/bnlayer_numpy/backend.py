"""The `numpy` backend: the contract of `bnlayer.contract.Backend` over this package's layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnlayer.contract import CallOutcome, NDArray, Outcome, Request
from bnlayer.errors import UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .layer import BatchNorm
from .support import MISSING


class NumpyBackend:
    """bnlayer's batch norm in NumPy; also the reference that needs no framework."""

    name = "numpy"

    def version(self) -> str:
        return np.__version__

    def owns(self, layer: Any) -> bool:
        return isinstance(layer, BatchNorm)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        return MISSING.reason(spec, request)

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> BatchNorm:
        if device not in (None, "cpu"):
            raise UnsupportedError(f"backend 'numpy' runs on the CPU; got device {device!r}.")
        return BatchNorm(spec, state)

    def extract(self, layer: BatchNorm) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        return layer.spec, layer.state.copy()

    def load(self, layer: BatchNorm, state: BatchNormState[NDArray]) -> BatchNorm:
        layer.state = state.checked(layer.spec)
        return layer

    def step(self, layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
        MISSING.refuse(self.name, layer.spec, request)
        layer.frozen_statistics = request.frozen_statistics
        passes = []
        for call in request.calls:
            y = layer(
                call.x,
                training=request.training,
                weights=call.weights,
                update_stats=request.update_stats,
                adjustment=call.adjustment,
                renorm_clips=request.renorm_clips,
            )
            passes.append((call, y, layer.cache))
        calls, dgamma, dbeta = [], None, None
        for call, y, cache in passes:
            if call.dy is None:
                calls.append(CallOutcome(y))
                continue
            got = layer.backward(call.dy, cache)
            calls.append(CallOutcome(y, dx=got.dx, dweights=got.dweights))
            dgamma = got.dgamma if dgamma is None else dgamma + got.dgamma
            dbeta = got.dbeta if dbeta is None else dbeta + got.dbeta
        return layer, Outcome(tuple(calls), state=layer.state, dgamma=dgamma, dbeta=dbeta)


BACKEND = NumpyBackend()
