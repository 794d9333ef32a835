"""The `tensorflow` backend: the contract of `bnlayer.contract.Backend` over this package's layer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bnlayer.contract import NDArray, Outcome, Request, require
from bnlayer.errors import UnsupportedError
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
        from .layer import BatchNorm

        with tf.device(None if device is None else _existing(device)):
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
        from .step import run_step

        with tf.device(layer.num_updates.device):
            return layer, run_step(layer, request)


def _tensorflow() -> Any:
    return require("tensorflow", "tensorflow")


def _existing(device: Any) -> str:
    """TensorFlow's full name of a device.

    Its soft placement would put variables elsewhere without a word, so what is not there is refused here.
    """
    tf = _tensorflow()
    present = [d.name for d in tf.config.list_logical_devices()]
    absent = f"backend 'tensorflow' has no device {device!r}; it has {', '.join(present)}."
    try:
        wanted = tf.DeviceSpec.from_string(str(device))
    except ValueError as error:
        raise UnsupportedError(absent) from error
    for name in present:
        found = tf.DeviceSpec.from_string(name)
        if wanted.device_type == found.device_type and wanted.device_index in (None, found.device_index):
            return str(name)
    raise UnsupportedError(absent)


BACKEND = TensorFlowBackend()
