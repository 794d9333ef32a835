"""Haiku's own `haiku.BatchNorm` as a conformance target. Imports neither JAX nor Haiku."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnlayer.contract import Call, Missing
from bnlayer.spec import BatchNormSpec

from .native_host import NativeHost, Variables, decay, not_only

if TYPE_CHECKING:
    import jax

_NO_OPTION = "Haiku has no such option"
_PARAMETERS = {"gamma": "scale", "beta": "offset"}
_AVERAGES = {"mean": "batch_norm/~/mean_ema", "variance": "batch_norm/~/var_ema"}


class Haiku(NativeHost):
    """haiku.BatchNorm, transformed with its state; its averages are divided by 1 - decay_rate^t."""

    name = "haiku"
    library = "haiku"
    counts = True
    missing = Missing(
        fields={
            "moving_variance_estimator": "Haiku's is biased",
            "renorm": _NO_OPTION,
            "virtual_batch_size": _NO_OPTION,
            "nonfinite": "Haiku always propagates",
            "synchronized": "Haiku's cross_replica_axis needs as many rows on each device",
        },
        adjustment="Haiku has no such argument",
    )

    def module(self, spec: BatchNormSpec) -> Any:
        import haiku

        return haiku.transform_with_state(lambda x, training: _layer(spec)(x, is_training=training))

    def said(self, module: Any) -> dict[str, Any]:
        return {}  # a transformed function, of which nothing can be asked

    def initial(self, spec: BatchNormSpec) -> Variables:
        import jax

        x = jax.numpy.zeros((2, spec.num_features), spec.param_dtype)  # at rank 2 the formats are one
        parameters, state = self.module(spec).init(jax.random.key(0), x, True)
        # Its init has made the averages; their values are those before the first update.
        return _read(parameters, state)

    def apply(
        self, spec: BatchNormSpec, variables: Variables, x: jax.Array, mask: jax.Array | None, *, training: bool
    ) -> tuple[jax.Array, Variables]:
        shape = [1] * x.ndim
        shape[spec.axis] = spec.num_features
        named = {entry: variables[name].reshape(shape) for name, entry in _PARAMETERS.items() if name in variables}
        parameters = {"batch_norm": named} if named else {}
        state = {
            place: {
                "counter": variables["num_updates"],
                "hidden": variables[f"hidden_{which}"].reshape(shape),
                "average": variables[f"moving_{which}"].reshape(shape),
            }
            for which, place in _AVERAGES.items()
        }
        y, state = self.module(spec).apply(parameters, state, None, x, training)
        return y, _read(parameters, state)

    def lacks_of(self, spec: BatchNormSpec) -> str | None:
        if spec.zero_debias != "all":
            return "zero_debias: Haiku divides mean and variance by 1 - decay_rate^t"
        if spec.axis not in (1, -1):
            return "axis: Haiku has channels_last for axis -1 and channels_first for axis 1"
        if spec.param_dtype != spec.stats_dtype:
            return "stats_dtype: Haiku's variables have x's dtype"
        return not_only({"track_moving_stats": "Haiku always keeps moving statistics"}, spec)

    def lacks_in(self, spec: BatchNormSpec, call: Call) -> str | None:
        if call.x.dtype.name != spec.param_dtype and call.x.dtype.name in ("float16", "bfloat16", "float32", "float64"):
            return f"{call.x.dtype.name}: Haiku's variables have x's dtype"
        return super().lacks_in(spec, call)


def _layer(spec: BatchNormSpec) -> Any:
    import haiku

    return haiku.BatchNorm(
        create_scale=spec.scale,
        create_offset=spec.center,
        decay_rate=decay(spec),
        eps=spec.epsilon,
        data_format="channels_first" if spec.axis == 1 else "channels_last",
    )


def _read(parameters: Any, state: Any) -> Variables:
    named = parameters.get("batch_norm", {})
    held = {name: named[entry].reshape(-1) for name, entry in _PARAMETERS.items() if entry in named}
    for which, place in _AVERAGES.items():
        held[f"hidden_{which}"] = state[place]["hidden"].reshape(-1)
        held[f"moving_{which}"] = state[place]["average"].reshape(-1)
    return {**held, "num_updates": state[_AVERAGES["mean"]]["counter"]}


BACKEND = Haiku()
