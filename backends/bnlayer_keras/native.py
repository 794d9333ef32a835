"""`keras.layers.BatchNormalization` as a conformance target: what it does with the same vectors, on each runtime."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bnlayer.call import trains
from bnlayer.contract import Missing, NDArray, Outcome, Request
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import BatchNormSpec, Renorm
from bnlayer.state import BatchNormState, array_dtype, array_names

from . import runtime
from .bridge import dtypes, numpy, on, shape_of

if TYPE_CHECKING:
    import keras

_NO_OPTION: Final = "keras.layers has no such option"
_MISSING: Final = Missing(
    fields={
        "virtual_batch_size": _NO_OPTION,
        "zero_debias": _NO_OPTION,
        "moving_variance_estimator": "keras.layers always takes the biased one",
        "nonfinite": "keras.layers always propagates",
        "track_moving_stats": "keras.layers always tracks",
        "synchronized": "keras.layers has it under tf.distribute only, where a step of one replica does not run",
    },
    adjustment="keras.layers has no such argument",
    shards="keras.layers synchronizes under tf.distribute only, where a step of one process does not run",
)
# x's dtype and the variables' to the dtype policy that says so.
_POLICIES: Final = {
    ("float16", "float32"): "mixed_float16",
    ("bfloat16", "float32"): "mixed_bfloat16",
    **{(dtype, dtype): dtype for dtype in ("float16", "bfloat16", "float32", "float64")},
}


class KerasLayers:
    """Keras's own batch norm, on what Keras runs on.

    Keras refuses nothing for having one value per channel; the layer remembers what the spec wanted, so that vectors
    show it.
    """

    name = "keras.layers"

    @property
    def deviations(self) -> Path:
        """The file of this runtime's known deviations."""
        return Path(__file__).with_name("deviations") / f"keras.layers.on-{runtime.name()}.txt"

    @property
    def lacks(self) -> Mapping[str, str]:
        return {"num_updates": "it has no counter"}

    def version(self) -> str:
        return f"{runtime.load_keras().__version__} ({runtime.name()})"

    def owns(self, layer: Any) -> bool:
        keras = sys.modules.get("keras")
        # A subclass may compute something else, and ours is one.
        return keras is not None and type(layer) is keras.layers.BatchNormalization

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        asked = spec.replace(single_value="raise")  # see the class
        reason = _MISSING.reason(asked, request)
        if reason is not None:
            return reason
        if spec.decay == "cumulative":
            return "decay: keras.layers has no cumulative average"
        if spec.param_dtype != spec.stats_dtype:
            return "stats_dtype: keras.layers has one dtype for parameters and statistics"
        if spec.renorm is not None and "renorm" not in _arguments():
            return "renorm: keras.layers has it since Keras 3.15"
        return None if request is None else _unsupported_request(spec, request)

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> keras.layers.BatchNormalization:
        self._refuse(spec)
        start = BatchNormState.initial(spec) if state is None else state.checked(spec)
        layer = runtime.load_keras().layers.BatchNormalization(
            axis=spec.axis,
            momentum=spec.decay,
            epsilon=spec.epsilon,
            center=spec.center,
            scale=spec.scale,
            dtype=spec.param_dtype,
            **({} if spec.renorm is None else _renorm_arguments(spec.renorm)),
        )
        layer.bnlayer_single_value = spec.single_value
        with runtime.current().precision(dtypes(spec)), on(device):
            layer.build(shape_of(spec))
            _assign(layer, spec, start)
        return layer

    def extract(self, layer: keras.layers.BatchNormalization) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        spec = spec_of(layer)
        return spec, BatchNormState(
            **{name: numpy(getattr(layer, name)).astype(array_dtype(spec, name)) for name in array_names(spec)}
        )

    def load(
        self, layer: keras.layers.BatchNormalization, state: BatchNormState[NDArray]
    ) -> keras.layers.BatchNormalization:
        spec = spec_of(layer)
        with runtime.current().precision(dtypes(spec)):
            _assign(layer, spec, state.checked(spec))
        return layer

    def step(
        self, layer: keras.layers.BatchNormalization, request: Request
    ) -> tuple[keras.layers.BatchNormalization, Outcome]:
        spec = spec_of(layer)
        self._refuse(spec, request)
        given = {a.dtype.name for c in request.calls for a in (c.x, c.dy) if a is not None}
        # Frozen statistics are, in Keras's words, a layer called with training=False.
        training = trains(spec, request.training, request.frozen_statistics)
        with runtime.current().precision(given | dtypes(spec)):
            layer = _for_rank(layer, spec, request.calls[0].x.ndim)
            layer.dtype_policy = _policy(spec, request.calls[0].x.dtype.name)

            def forward(x: Any, mask: Any, _: object) -> Any:
                try:
                    return layer(x, training=training, mask=mask)
                except ValueError as error:  # how Keras refuses an input
                    raise InputError(f"keras.layers refuses x with shape {tuple(x.shape)}: {error}") from error

            calls, dgamma, dbeta = runtime.current().step(layer, layer.moving_mean, request, forward)
            _, state = self.extract(layer)
        return layer, Outcome(calls, state=state, dgamma=dgamma, dbeta=dbeta)

    def _refuse(self, spec: BatchNormSpec, request: Request | None = None) -> None:
        reason = self.unsupported(spec, request)
        if reason is not None:
            raise UnsupportedError(f"backend {self.name!r} does not support {reason}.")


def spec_of(layer: keras.layers.BatchNormalization) -> BatchNormSpec:
    """What a Keras layer is.

    Raises:
        InputError: the layer is not built, so that its number of channels is not known.
        SpecError: Keras accepts its arguments, and they have no meaning.
    """
    if layer.moving_mean is None:
        raise InputError(f"layer {layer.name!r} is not built; call or build it first.")
    renorm = None
    if getattr(layer, "renorm", False):
        clips = layer.renorm_clipping or {}
        renorm = Renorm(
            r_max=clips.get("rmax"), r_min=clips.get("rmin"), d_max=clips.get("dmax"), decay=layer.renorm_momentum
        )
    return BatchNormSpec(
        int(layer.moving_mean.shape[0]),
        axis=layer.axis,
        epsilon=layer.epsilon,
        decay=layer.momentum,
        center=layer.center,
        scale=layer.scale,
        renorm=renorm,
        single_value=getattr(layer, "bnlayer_single_value", "allow"),
        synchronized=layer.synchronized,
        param_dtype=layer.variable_dtype,
        stats_dtype=layer.variable_dtype,
    )


def _unsupported_request(spec: BatchNormSpec, request: Request) -> str | None:
    if not request.update_stats and request.training and not request.frozen_statistics:
        return "update_stats: keras.layers always updates in training"
    if request.renorm_clips is not None:
        return "renorm_clips: keras.layers has no such argument"
    for call in request.calls:
        dtype = call.x.dtype.name
        if dtype.startswith(("float", "bfloat")) and (dtype, spec.param_dtype) not in _POLICIES:
            return f"{dtype}: keras.layers has no dtype policy for {dtype} x with {spec.param_dtype} variables"
        if call.weights is not None:
            if call.weights.dtype != bool:
                return "weights: keras.layers takes a mask and no example weights"
            if call.weights.ndim != call.x.ndim - 1:
                return "weights: keras.layers takes masks with one axis fewer than x"
    return None


def _policy(spec: BatchNormSpec, dtype: str) -> str:
    return _POLICIES.get((dtype, spec.param_dtype), spec.param_dtype)  # another x is for Keras to refuse


def _arguments() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(runtime.load_keras().layers.BatchNormalization).parameters


def _renorm_arguments(renorm: Renorm) -> dict[str, Any]:
    clips = {"rmax": renorm.r_max, "rmin": renorm.r_min, "dmax": renorm.d_max}
    given = {key: clip for key, clip in clips.items() if clip is not None}
    return {"renorm": True, "renorm_clipping": given, "renorm_momentum": renorm.decay}


def _for_rank(layer: Any, spec: BatchNormSpec, rank: int) -> Any:
    """A layer built for inputs of this rank: Keras ties it to one, and `build` does not know it yet."""
    if layer.input_spec.ndim == rank:
        return layer
    again = type(layer).from_config(layer.get_config())
    again.bnlayer_single_value = spec.single_value
    try:
        again.build(shape_of(spec, rank))
    except IndexError as error:
        raise InputError(f"x must have an axis {spec.axis}; got {rank} axes.") from error
    for old, new in zip(layer.variables, again.variables, strict=True):
        new.assign(old.value)
    return again


def _assign(layer: Any, spec: BatchNormSpec, state: BatchNormState[NDArray]) -> None:
    for name in array_names(spec):
        getattr(layer, name).assign(getattr(state, name))


BACKEND = KerasLayers()
