"""`BatchNorm` for Flax Linen: `flax.linen.BatchNorm`'s fields and variables over `batch_norm`.

Change the import, and nothing else:

    from bnlayer_jax.linen import BatchNorm

What differs from Flax, always: the variance is computed from centered values (Flax's default subtracts two large
numbers), an empty or fully masked batch leaves the statistics alone, masks on several devices are weighed by how many
values they leave, and the statistics keep their dtype. What is the same: the dtype of y (see `BatchNorm`), the
variables, their names and collections, so that checkpoints of either load into the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from jax.typing import ArrayLike

from bnlayer.call import trains
from bnlayer.spec import BatchNormSpec, Estimator, GhostLayout, NonFinite, Renorm, SingleValue, ZeroDebias
from bnlayer.state import BatchNormState, array_names, needs_counter

from .hosts import FLAGS, OPTIONS, channel_axis, example_axis, flax_spec, normalized
from .model_linen import Inputs
from .state import counter_dtype, counter_of

__all__ = ["BatchNorm", "Inputs"]

VARIABLES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


class BatchNorm(nn.BatchNorm, kw_only=True):  # type: ignore[call-arg]  # a word of Flax's dataclasses
    """Batch normalization with Flax's fields, and by keyword what a spec has beyond them.

    y has Flax's dtype: `dtype` if given, else what x and the parameters promote to, so float32 for half x under float32
    parameters. Arithmetic is in float32 or wider, whatever it is. `use_fast_variance` is taken and has no effect: the
    variance is always the accurate one. Of `force_float32_reductions` there remains that False creates the statistics
    in `param_dtype`.

    Attributes:
        use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init,
            axis_name: Flax's; `momentum` is the weight on the old statistics, or "cumulative".
        axis_index_groups: None; groups are not supported.
        moving_variance_estimator, zero_debias, renorm, virtual_batch_size, virtual_batch_layout, track_moving_stats,
            single_value, nonfinite: as in `bnlayer.BatchNormSpec`. zero_debias, renorm and momentum="cumulative" add
            variables to "batch_stats", named as in `bnlayer.BatchNormState`; without track_moving_stats it has none.
        frozen_statistics: True: the moving statistics normalize and stay as they are, in training too.
        frozen_parameters: True: scale and bias get gradient 0. (An optimizer that decays weights moves them all the
            same; mask them there.)
    """

    moving_variance_estimator: Estimator = "biased"
    zero_debias: ZeroDebias = "none"
    renorm: Renorm | None = None
    virtual_batch_size: int | None = None
    virtual_batch_layout: GhostLayout = "strided"
    track_moving_stats: bool = True
    single_value: SingleValue = "allow"
    nonfinite: NonFinite = "propagate"
    frozen_statistics: bool = False
    frozen_parameters: bool = False

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        update_stats: bool = True,
        adjustment: tuple[ArrayLike, ArrayLike] | None = None,
        renorm_clips: Mapping[str, ArrayLike | None] | None = None,
    ) -> jax.Array:
        """Normalize x, and in training update the moving statistics ("batch_stats" has to be mutable then).

        While the module is initialized nothing is updated, and no replicas are asked.

        Args:
            x: array; integers are promoted. Where the channel axis is the first, x is a single example, and vmap maps
                the batch.
            use_running_average: False trains; None for the field. Exactly one of the two says.
            mask: boolean, broadcastable to x: which values the statistics see; numbers other than 0 are True.
            weights: instead of a mask: non-negative weights, as of `bnlayer_jax.batch_norm`.
            update_stats: False: batch statistics normalize, but no variable changes (for recomputation and extra
                forward passes).
            adjustment, renorm_clips: as of `bnlayer_jax.batch_norm`.

        Returns:
            An array of x's shape; its dtype: see the class.

        Raises:
            ValueError: use_running_average is given twice or not at all (Flax's error).
            InputError: an argument does not fit the layer.
            SpecError: a field is what no batch norm can be.
            UnsupportedError: several channel axes or axis_index_groups are asked for, or float64 without x64.
        """
        return call_on(
            self,
            self,
            x,
            use_running_average,
            mask=mask,
            weights=weights,
            update_stats=update_stats,
            adjustment=adjustment,
            renorm_clips=renorm_clips,
        )

    def spec_of(self, num_features: int) -> BatchNormSpec:
        """What the layer is for inputs of so many channels.

        Raises:
            SpecError: a field is what no batch norm can be.
            UnsupportedError: several channel axes or axis_index_groups are asked for.
        """
        return flax_spec(self, num_features, channel_axis(self.axis), self.param_dtype, created_dtype(self))


def host_fields(module: nn.BatchNorm) -> dict[str, Any]:
    """The fields that Flax's layer has, of it or of ours."""
    names = [f.name for f in dataclasses.fields(nn.BatchNorm) if f.name not in ("parent", "name")]
    return {name: getattr(module, name) for name in names}


def arrays_in(variables: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of the layer at this path, by the state's names; the counter too."""
    found: dict[str, Any] = {}
    for collection in ("params", "batch_stats"):
        scope: Any = variables.get(collection, {})
        for name in path:
            scope = scope.get(name, {})
        found.update(scope)
    names = [f.name for f in dataclasses.fields(BatchNormState)]
    return {n: nn.meta.unbox(found[VARIABLES.get(n, n)]) for n in names if VARIABLES.get(n, n) in found}


def created_dtype(module: nn.BatchNorm) -> Any:
    """The dtype in which the statistics of `module`, Flax's or ours, are created."""
    return jnp.float32 if module.force_float32_reductions else module.param_dtype


class _Configured:
    """The fields of the module that runs, with the options of ours that stands for it."""

    def __init__(self, module: nn.BatchNorm, ours: BatchNorm) -> None:
        self._module = module
        for name in (*OPTIONS, *FLAGS):
            setattr(self, name, getattr(ours, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def call_on(
    module: nn.BatchNorm,
    ours: BatchNorm,
    x: ArrayLike,
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    adjustment: tuple[ArrayLike, ArrayLike] | None = None,
    renorm_clips: Mapping[str, ArrayLike | None] | None = None,
) -> jax.Array:
    """A call of our layer on the variables of a bound module inside its compact method.

    Args:
        module: bound, Flax's `BatchNorm` or ours: its fields, scope and variables are used.
        ours: has the options beyond Flax's fields; `module` itself where that is ours.
        x, use_running_average, mask, weights, update_stats, adjustment, renorm_clips: of the call.
    """
    fields: Any = module if module is ours else _Configured(module, ours)
    use_running_average = nn.merge_param("use_running_average", module.use_running_average, use_running_average)
    x = jnp.asarray(x)
    axis, is_example = example_axis(channel_axis(module.axis), x.ndim)
    channels = x.shape[axis - 1 if is_example else axis]
    created = flax_spec(fields, channels, axis, module.param_dtype, created_dtype(module))
    statistics = _statistics(module, created)
    held = {name: variable.value for name, variable in statistics.items()}
    for name, used, init in (
        ("gamma", module.use_scale, module.scale_init),
        ("beta", module.use_bias, module.bias_init),
    ):
        if used:
            held[name] = module.param(VARIABLES[name], init, (channels,), module.param_dtype)
    counter = held.pop("num_updates", 0)
    parameters = [held[name] for name in ("gamma", "beta") if name in held]
    spec = created.replace(
        param_dtype=parameters[0].dtype.name if parameters else created.param_dtype,
        stats_dtype=held["moving_mean"].dtype.name if "moving_mean" in held else created.stats_dtype,
    )
    initializing = module.is_initializing()
    if initializing:  # what comes out is thrown away, and x is a sample
        spec = spec.replace(synchronized=False, single_value="allow")
    y, after = normalized(
        x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32),
        BatchNormState(**held, num_updates=counter),
        spec,
        is_example=is_example,
        training=trains(spec, not use_running_average, fields.frozen_statistics),
        dtype=canonicalize_dtype(x, *parameters, dtype=module.dtype),
        axis_name=None if initializing else module.axis_name,
        frozen_parameters=fields.frozen_parameters,
        mask=None if mask is None else jnp.asarray(mask, bool),
        weights=weights,
        update_stats=update_stats and not initializing,
        adjustment=adjustment,
        renorm_clips=renorm_clips,
    )
    for name, variable in statistics.items():
        if getattr(after, name) is not (counter if name == "num_updates" else held[name]):
            variable.value = counter_of(after) if name == "num_updates" else getattr(after, name)
    return y


def _statistics(module: nn.BatchNorm, spec: BatchNormSpec) -> dict[str, nn.Variable[Any]]:
    """The variables of the spec's statistics, by the state's names, created where they are not there."""

    def initial(name: str) -> jax.Array:
        return jnp.asarray(getattr(BatchNormState.initial(spec), name))

    found = {
        name: module.variable("batch_stats", VARIABLES.get(name, name), initial, name)
        for name in array_names(spec)
        if name not in ("gamma", "beta")
    }
    if needs_counter(spec):
        found["num_updates"] = module.variable("batch_stats", "num_updates", jnp.zeros, (), counter_dtype())
    return found
