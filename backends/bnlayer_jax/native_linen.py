"""Flax's own `flax.linen.BatchNorm` as a conformance target, with Flax's defaults. Imports neither JAX nor Flax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnlayer.spec import BatchNormSpec
from bnlayer.state import numpy_dtype

from .native_flax import FlaxHost
from .native_host import Variables, decay

if TYPE_CHECKING:
    import jax

_PLACES = {
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}


class FlaxLinen(FlaxHost):
    """flax.linen.BatchNorm, applied with `batch_stats` mutable in training."""

    name = "flax.linen"

    def module(self, spec: BatchNormSpec) -> Any:
        from flax import linen

        return linen.BatchNorm(
            axis=spec.axis,
            epsilon=spec.epsilon,
            momentum=decay(spec),
            use_bias=spec.center,
            use_scale=spec.scale,
            param_dtype=numpy_dtype(spec.param_dtype),
        )

    def initial(self, spec: BatchNormSpec) -> Variables:
        import jax

        rank = max(spec.axis + 1 if spec.axis > 0 else 1 - spec.axis, 2)
        shape = [1] * rank
        shape[spec.axis] = spec.num_features
        x = jax.numpy.zeros(shape, jax.numpy.float32)
        return _read(self.module(spec).init(jax.random.key(0), x, use_running_average=True))

    def apply(
        self, spec: BatchNormSpec, variables: Variables, x: jax.Array, mask: jax.Array | None, *, training: bool
    ) -> tuple[jax.Array, Variables]:
        held: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
        for name, value in variables.items():
            collection, entry = _PLACES[name]
            held[collection][entry] = value
        y, changed = self.module(spec).apply(
            held,
            x,
            use_running_average=not training,
            mask=mask,
            mutable=["batch_stats"] if training else [],
        )
        return y, _read({**held, **changed})

    def refusals(self) -> tuple[type[Exception], ...]:
        from flax.errors import FlaxError

        return (*super().refusals(), FlaxError)


def _read(held: Any) -> Variables:
    return {
        name: held[collection][entry]
        for name, (collection, entry) in _PLACES.items()
        if entry in held.get(collection, {})
    }


BACKEND = FlaxLinen()
