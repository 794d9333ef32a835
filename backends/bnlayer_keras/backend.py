"""The `keras` backend: the contract of `bnlayer.contract.Backend` over this package's layer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from bnlayer.contract import NDArray, Outcome, Request
from bnlayer.errors import StateError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype, array_names

from . import runtime
from .bridge import dtypes, numpy, on, shape_of
from .support import MISSING

if TYPE_CHECKING:
    from .layer import BatchNormalization


class KerasBackend:
    """bnlayer's batch norm in Keras 3, on whatever Keras runs on."""

    name = "keras"

    def version(self) -> str:
        return f"{runtime.load_keras().__version__} ({runtime.name()})"

    def owns(self, layer: Any) -> bool:
        # Who has a layer has imported its module; nobody else needs to.
        module = sys.modules.get(f"{__package__}.layer")
        return module is not None and isinstance(layer, module.BatchNormalization)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        return MISSING.reason(spec, request)

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> BatchNormalization:
        MISSING.refuse(self.name, spec)
        runtime.load_keras()
        from .layer import CLIPS, BatchNormalization

        start = BatchNormState.initial(spec) if state is None else state.checked(spec)
        clips = {} if spec.renorm is None else {key: getattr(spec.renorm, name) for key, name in CLIPS.items()}
        layer = BatchNormalization(
            axis=spec.axis,
            momentum=0.99 if spec.decay == "cumulative" else spec.decay,
            cumulative=spec.decay == "cumulative",
            epsilon=spec.epsilon,
            center=spec.center,
            scale=spec.scale,
            renorm=spec.renorm is not None,
            renorm_clipping={key: clip for key, clip in clips.items() if clip is not None} or None,
            renorm_momentum=0.99 if spec.renorm is None else spec.renorm.decay,
            virtual_batch_size=spec.virtual_batch_size,
            virtual_batch_layout=spec.virtual_batch_layout,
            zero_debias=spec.zero_debias,
            moving_variance_estimator=spec.moving_variance_estimator,
            single_value=spec.single_value,
            nonfinite=spec.nonfinite,
            track_moving_stats=spec.track_moving_stats,
            synchronized=spec.synchronized,
            param_dtype=spec.param_dtype,
            stats_dtype=spec.stats_dtype,
            dtype=spec.param_dtype,
            autocast=False,
        )
        with runtime.current().precision(dtypes(spec)), on(device):
            layer.build(shape_of(spec))
            _assign(layer, spec, start)
        return layer

    def extract(self, layer: BatchNormalization) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        spec = layer.spec
        arrays = {name: numpy(getattr(layer, name)).astype(array_dtype(spec, name)) for name in array_names(spec)}
        return spec, BatchNormState(**arrays, num_updates=int(numpy(layer.num_updates)))

    def load(self, layer: BatchNormalization, state: BatchNormState[NDArray]) -> BatchNormalization:
        spec = layer.spec
        with runtime.current().precision(dtypes(spec)):
            _assign(layer, spec, state.checked(spec))
        return layer

    def step(self, layer: BatchNormalization, request: Request) -> tuple[BatchNormalization, Outcome]:
        spec = layer.spec
        MISSING.refuse(self.name, spec, request)
        layer.frozen_statistics = request.frozen_statistics

        def forward(x: Any, weights: Any, adjustment: Any) -> Any:
            return layer(
                x,
                training=request.training,
                weights=weights,
                update_stats=request.update_stats,
                adjustment=adjustment,
                renorm_clips=request.renorm_clips,
            )

        given = {
            a.dtype.name for c in request.calls for a in (c.x, c.dy, c.weights, *(c.adjustment or ())) if a is not None
        }
        with runtime.current().precision(given | dtypes(spec)):
            calls, dgamma, dbeta = runtime.current().step(layer, layer.num_updates, request, forward)
            _, state = self.extract(layer)
        return layer, Outcome(calls, state=state, dgamma=dgamma, dbeta=dbeta)


def _assign(layer: BatchNormalization, spec: BatchNormSpec, state: BatchNormState[NDArray]) -> None:
    largest = np.iinfo(layer.num_updates.dtype).max
    if state.num_updates > largest:
        raise StateError(
            f"num_updates must be at most {largest} here, where JAX runs without x64; got {state.num_updates}."
        )
    for name in array_names(spec):
        getattr(layer, name).assign(getattr(state, name))
    layer.num_updates.assign(state.num_updates)


BACKEND = KerasBackend()
