"""The `tensorflow` backend: the contract of `bnlayer.contract.Backend` over this package's layer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from bnlayer.contract import CallOutcome, NDArray, Outcome, Request, require
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
        arrays = {name: np.array(variable.numpy()) for name, variable in layer.state.arrays().items()}
        return layer.spec, BatchNormState(**arrays, num_updates=int(layer.num_updates.numpy()))

    def load(self, layer: BatchNorm, state: BatchNormState[NDArray]) -> BatchNorm:
        layer.load(state)
        return layer

    def step(self, layer: BatchNorm, request: Request) -> tuple[BatchNorm, Outcome]:
        MISSING.refuse(self.name, layer.spec, request)
        tf = _tensorflow()
        layer.frozen_statistics = request.frozen_statistics
        with tf.device(layer.num_updates.device):
            xs = [tf.constant(call.x) for call in request.calls]
            ws = [None if call.weights is None else tf.constant(call.weights) for call in request.calls]
            real = {i: w for i, w in enumerate(ws) if w is not None and w.dtype.is_floating}
            with tf.GradientTape() as tape:
                tape.watch([[x for x in xs if x.dtype.is_floating], list(real.values())])
                ys = [
                    layer(
                        x,
                        training=request.training,
                        weights=w,
                        update_stats=request.update_stats,
                        adjustment=call.adjustment,
                        renorm_clips=request.renorm_clips,
                    )
                    for call, x, w in zip(request.calls, xs, ws, strict=True)
                ]
            asked = [i for i, call in enumerate(request.calls) if call.dy is not None]
            dxs: Any = {}
            dws: Any = {}
            parameters: Any = {}
            if asked:
                sources = {
                    "xs": {i: xs[i] for i in asked},
                    "ws": {i: w for i, w in real.items() if i in asked},
                    "parameters": {n: getattr(layer, n) for n in ("gamma", "beta") if getattr(layer, n) is not None},
                }
                got = tape.gradient(
                    [ys[i] for i in asked],
                    sources,
                    output_gradients=[tf.constant(request.calls[i].dy) for i in asked],
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )
                dxs, dws, parameters = got["xs"], got["ws"], got["parameters"]
        calls = tuple(
            CallOutcome(y.numpy(), dx=_numpy(dxs.get(i)), dweights=_numpy(dws.get(i))) for i, y in enumerate(ys)
        )
        _, state = self.extract(layer)
        return layer, Outcome(
            calls, state=state, dgamma=_numpy(parameters.get("gamma")), dbeta=_numpy(parameters.get("beta"))
        )


def _tensorflow() -> Any:
    return require("tensorflow", "tensorflow")


def _numpy(tensor: Any) -> NDArray | None:
    return None if tensor is None else np.asarray(tensor.numpy())


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
