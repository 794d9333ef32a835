"""Equinox's own `equinox.nn.BatchNorm` as conformance targets, in both its modes. Imports neither JAX nor Equinox.

The layer takes one example and is mapped over the batch, so that its channel axis 0 is the batch's axis 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from bnlayer.contract import Call, Missing, NDArray
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, numpy_dtype

from .native_host import NativeHost, Variables, decay, not_only, one_axis

if TYPE_CHECKING:
    import jax

_NO_OPTION = "Equinox has no such option"
_NO_ARGUMENT = "Equinox has no such argument"
_FIELDS = {
    "moving_variance_estimator": "Equinox's is biased",
    "renorm": _NO_OPTION,
    "virtual_batch_size": _NO_OPTION,
    "nonfinite": "Equinox always propagates",
    "synchronized": "Equinox's axis_name needs as many rows on each device",
}
_BATCH = "batch"  # the name of the mapped axis


class Equinox(NativeHost):
    """equinox.nn.BatchNorm under `jax.vmap`."""

    library = "equinox"
    counts = True
    mode: ClassVar[Literal["ema", "batch"]]
    leaves: ClassVar[tuple[str, ...]]  # of Equinox's state, in its order

    def module(self, spec: BatchNormSpec) -> Any:
        return self._made(spec)[0]

    def _made(self, spec: BatchNormSpec) -> tuple[Any, Any]:
        import equinox

        return equinox.nn.make_with_state(equinox.nn.BatchNorm)(
            spec.num_features,
            _BATCH,
            eps=spec.epsilon,
            channelwise_affine=spec.scale,
            momentum=decay(spec),
            dtype=numpy_dtype(spec.param_dtype),
            mode=self.mode,
        )

    def said(self, module: Any) -> dict[str, Any]:
        affine = module.channelwise_affine
        return {"epsilon": module.eps, "decay": module.momentum, "center": affine, "scale": affine}

    def initial(self, spec: BatchNormSpec) -> Variables:
        layer, state = self._made(spec)
        affine = {"gamma": layer.weight, "beta": layer.bias} if spec.scale else {}
        return {**affine, **self._read(state)}

    def apply(
        self, spec: BatchNormSpec, variables: Variables, x: jax.Array, mask: jax.Array | None, *, training: bool
    ) -> tuple[jax.Array, Variables]:
        import equinox
        import jax

        layer, state = self._made(spec)
        affine = {name: value for name, value in variables.items() if name not in self.leaves}
        if affine:
            layer = equinox.tree_at(lambda m: (m.weight, m.bias), layer, (affine["gamma"], affine["beta"]))
        # Not `state.set`: under a trace, an initial counter has a type that a stored one has not.
        state = jax.tree.unflatten(jax.tree.structure(state), [variables[name] for name in self.leaves])

        def call(example: jax.Array, held: Any) -> Any:
            return layer(example, held, inference=not training)

        y, state = jax.vmap(call, axis_name=_BATCH, in_axes=(0, None), out_axes=(0, None))(x, state)
        return y, {**affine, **self._read(state)}

    def _read(self, state: Any) -> Variables:
        import jax

        return dict(zip(self.leaves, jax.tree.leaves(state), strict=True))

    def lacks_of(self, spec: BatchNormSpec) -> str | None:
        if spec.decay == "cumulative":
            return "decay: Equinox has no cumulative average"
        if spec.axis not in (1, -1):
            return "axis: Equinox's is an example's axis 0, which is the batch's axis 1"
        if spec.param_dtype != spec.stats_dtype:
            return "stats_dtype: Equinox has one dtype for parameters and statistics"
        if spec.center != spec.scale:
            return f"{'scale' if spec.center else 'center'}: Equinox has both a weight and a bias or neither"
        return not_only({"track_moving_stats": "Equinox always keeps moving statistics"}, spec)

    def lacks_in(self, spec: BatchNormSpec, call: Call) -> str | None:
        if call.x.ndim > 2 and not one_axis(spec, 1, call.x.ndim):
            return "axis: Equinox's is an example's axis 0, which is the batch's axis 1"
        return super().lacks_in(spec, call)


class EquinoxBatch(Equinox):
    """mode="batch": averages from the hidden (0, 1), divided by 1 - momentum^t in inference."""

    name = "equinox.nn.batch"
    mode = "batch"
    leaves = ("num_updates", "hidden_mean", "hidden_variance")
    missing = Missing(fields=_FIELDS, adjustment=_NO_ARGUMENT)

    @property
    def lacks(self) -> Mapping[str, str]:
        why = "it keeps the hidden average, and divides it where it normalizes"
        return {"moving_mean": why, "moving_variance": why}

    def lacks_of(self, spec: BatchNormSpec) -> str | None:
        if spec.zero_debias != "all":
            return "zero_debias: Equinox's batch mode divides mean and variance by 1 - momentum^t"
        return super().lacks_of(spec)

    def from_state(self, state: BatchNormState[NDArray]) -> Variables:
        held = super().from_state(state)
        return {name: array for name, array in held.items() if not name.startswith("moving_")}

    def to_state(self, spec: BatchNormSpec, variables: Variables) -> BatchNormState[NDArray]:
        count = int(variables["num_updates"])
        seen = 1.0 - decay(spec) ** count if count else 1.0  # what inference divides by
        moving = {
            f"moving_{which}": (np.asarray(variables[f"hidden_{which}"], np.float64) / seen).astype(spec.stats_dtype)
            for which in ("mean", "variance")
        }
        return super().to_state(spec, {**variables, **moving})


class EquinoxEMA(Equinox):
    """mode="ema", the default: the moving averages normalize in training too."""

    name = "equinox.nn.ema"
    mode = "ema"
    leaves = ("num_updates", "moving_mean", "moving_variance")  # the first is whether there was no update
    missing = Missing(
        fields={**_FIELDS, "zero_debias": "Equinox's ema mode has no such option"}, adjustment=_NO_ARGUMENT
    )

    @property
    def lacks(self) -> Mapping[str, str]:
        return {"num_updates": "it has no counter, only whether there was an update"}

    def from_state(self, state: BatchNormState[NDArray]) -> Variables:
        held = super().from_state(state)
        return {**held, "num_updates": held["num_updates"] == 0}

    def to_state(self, spec: BatchNormSpec, variables: Variables) -> BatchNormState[NDArray]:
        return super().to_state(spec, {**variables, "num_updates": ~variables["num_updates"]})


BATCH = EquinoxBatch()
EMA = EquinoxEMA()
