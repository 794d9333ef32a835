"""TensorFlow's fused kernel as a conformance target: what it does with the same vectors. Imports no TensorFlow.

TensorFlow's other batch norms are Keras's layer, a target of `bnlayer_keras`, and Keras 2's, which TensorFlow no longer
brings along.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnlayer.call import trains
from bnlayer.contract import Call, Missing, NDArray, Outcome, Request, require
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

if TYPE_CHECKING:
    import tensorflow as tf

    from .native_layer import FusedBatchNorm

_NO_OPTION = "the function has no such argument"
_MISSING = Missing(
    fields={
        "renorm": _NO_OPTION,
        "virtual_batch_size": _NO_OPTION,
        "zero_debias": _NO_OPTION,
        "synchronized": _NO_OPTION,
        "nonfinite": "the kernel always propagates",
    },
    dtypes={"float64": "the kernel computes in float32"},
    adjustment=_NO_OPTION,
    shards=_NO_OPTION,
)


class FusedBatchNormTarget:
    """`tf.compat.v1.nn.fused_batch_norm`, the kernel under Keras 2, tf.layers and tf.contrib."""

    name = "tf.compat.v1.nn.fused_batch_norm"

    @property
    def deviations(self) -> Path:
        """The file of the function's known deviations."""
        return Path(__file__).with_name("deviations") / f"{self.name}.txt"

    @property
    def lacks(self) -> Mapping[str, str]:
        return {"num_updates": "it does not count its updates"}

    def version(self) -> str:
        return str(require("tensorflow", "tensorflow").__version__)

    def owns(self, layer: Any) -> bool:
        module = sys.modules.get(f"{__package__}.native_layer")
        return module is not None and isinstance(layer, module.FusedBatchNorm)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        reason = _MISSING.reason(spec, request)
        if reason is not None:
            return reason
        if spec.moving_variance_estimator != "unbiased" and spec.track_moving_stats:
            return "moving_variance_estimator: the kernel's is unbiased"
        if spec.decay == "cumulative":
            return "decay: the function does not count its updates"
        if spec.param_dtype != "float32" or spec.stats_dtype != "float32":
            return "param_dtype, stats_dtype: the kernel's parameters and statistics are float32"
        return None if request is None else _unsupported_request(spec, request)

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> FusedBatchNorm:
        require("tensorflow", "tensorflow")
        self._refuse(spec)
        from .devices import existing
        from .native_layer import FusedBatchNorm

        start = BatchNormState.initial(spec) if state is None else state.checked(spec)
        return FusedBatchNorm(spec, start, None if device is None else existing(device, self.name))

    def extract(self, layer: FusedBatchNorm) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        return layer.spec, layer.state

    def load(self, layer: FusedBatchNorm, state: BatchNormState[NDArray]) -> FusedBatchNorm:
        layer.load(state.checked(layer.spec))
        return layer

    def step(self, layer: FusedBatchNorm, request: Request) -> tuple[FusedBatchNorm, Outcome]:
        self._refuse(layer.spec, request)
        framework = require("tensorflow", "tensorflow")
        from .step import run_calls

        # What the function is told where there are no moving statistics, or where they are frozen.
        training = trains(layer.spec, request.training, request.frozen_statistics) or not layer.spec.track_moving_stats

        def forward(x: tf.Tensor, weights: tf.Tensor | None, call: Call) -> tf.Tensor:
            try:
                return layer(x, training=training, update_stats=request.update_stats)
            except (ValueError, framework.errors.OpError) as error:  # how TensorFlow refuses an input
                raise InputError(f"{self.name} refuses x with shape {tuple(x.shape)}: {error}") from error

        with framework.device(layer.device):
            calls, gradients = run_calls(request.calls, forward, layer.parameters)
        return layer, Outcome(calls, state=layer.state, dgamma=gradients.get("gamma"), dbeta=gradients.get("beta"))

    def _refuse(self, spec: BatchNormSpec, request: Request | None = None) -> None:
        reason = self.unsupported(spec, request)
        if reason is not None:
            raise UnsupportedError(f"backend {self.name!r} does not support {reason}.")


def _unsupported_request(spec: BatchNormSpec, request: Request) -> str | None:
    for call in request.calls:
        if call.weights is not None:
            return f"weights: {_NO_OPTION}"
        rank = call.x.ndim
        if rank not in (4, 5):
            return f"x of rank {rank}: the kernel takes 4 and 5"
        if spec.axis not in (1, -1, rank - 1):
            return f"axis {spec.axis} of rank {rank}: the kernel's channels are first or last after the batch"
    return None


BACKEND = FusedBatchNormTarget()
