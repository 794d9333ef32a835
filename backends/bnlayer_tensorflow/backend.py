"""The `tensorflow` backend: the contract of `bnlayer.contract.Backend` over this package's layer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bnlayer.contract import NDArray, Outcome, Request, require
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .support import MISSING

if TYPE_CHECKING:
    from .layer import BatchNorm


class TensorFlowBackend:
    """bnlayer's batch norm in TensorFlow, on its own or under Keras."""

    name = "tensorflow"

    def version(self) -> str:
        return str(_tensorflow().__version__)

    def owns(self, layer: Any) -> bool:
        # Who has a layer has imported its module; nobody else needs to.
        module = sys.modules.get(f"{__package__}.layer")
        return module is not None and isinstance(layer, module.BatchNorm)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        return MISSING.reason(spec, request)

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> BatchNorm:
        tf = _tensorflow()
        from .devices import existing
        from .layer import BatchNorm

        with tf.device(None if device is None else existing(device, self.name)):
            return BatchNorm(spec, state)

    def extract(self, layer: BatchNorm) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        from .step import read_state

        return layer.spec, read_state(layer)

    def load(self, layer: BatchNorm, state: BatchNormState[NDArray]) -> BatchNorm:
        layer.load(state)
        return layer

    def step(self, layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
        MISSING.refuse(self.name, layer.spec, request)
        if request.shards is not None:
            from .replicas import step_on_replicas

            _, state = self.extract(layer)
            outcome = step_on_replicas(layer, state, request)
            return self.load(layer, outcome.state), outcome
        tf = _tensorflow()
        from .step import run_layer

        with tf.device(layer.num_updates.device):
            return layer, run_layer(layer, request)


def _tensorflow() -> Any:
    return require("tensorflow", "tensorflow")


BACKEND = TensorFlowBackend()
