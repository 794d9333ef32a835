"""Flax's own `flax.nnx.BatchNorm` as a conformance target, with Flax's defaults. Imports neither JAX nor Flax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnlayer.spec import BatchNormSpec
from bnlayer.state import numpy_dtype

from .native_flax import FlaxHost
from .native_host import Variables, decay

if TYPE_CHECKING:
    import jax

_HOLDERS = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


class FlaxNNX(FlaxHost):
    """flax.nnx.BatchNorm; it changes its own variables, so that every training call updates."""

    name = "flax.nnx"
    functional = False

    def module(self, spec: BatchNormSpec) -> Any:
        from flax import nnx

        return nnx.BatchNorm(
            spec.num_features,
            axis=spec.axis,
            epsilon=spec.epsilon,
            momentum=decay(spec),
            use_bias=spec.center,
            use_scale=spec.scale,
            param_dtype=numpy_dtype(spec.param_dtype),
            rngs=nnx.Rngs(0),
        )

    def initial(self, spec: BatchNormSpec) -> Variables:
        return _read(self.module(spec))

    def apply(
        self, spec: BatchNormSpec, variables: Variables, x: jax.Array, mask: jax.Array | None, *, training: bool
    ) -> tuple[jax.Array, Variables]:
        layer = self.module(spec)
        for name, value in variables.items():
            getattr(layer, _HOLDERS[name]).set_value(value)
        y = layer(x, use_running_average=not training, mask=mask)
        return y, _read(layer)


def _read(layer: Any) -> Variables:
    held = {name: getattr(layer, holder) for name, holder in _HOLDERS.items()}
    return {name: variable[...] for name, variable in held.items() if variable is not None}


BACKEND = FlaxNNX()
