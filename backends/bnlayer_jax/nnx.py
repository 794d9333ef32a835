"""`BatchNorm` for Flax NNX: `flax.nnx.BatchNorm`'s arguments, attributes and variables over `batch_norm`.

Change the import, and nothing else:

    from bnlayer_jax.nnx import BatchNorm

What differs from Flax, always: the variance is computed from centered values (Flax's default subtracts two large
numbers), an empty or fully masked batch leaves the statistics alone, masks on several devices are weighed by how many
values they leave, and the statistics keep their dtype. What is the same: the dtype of y (see `BatchNorm`), the
variables and their names, so that checkpoints of either load into the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike

from bnlayer.call import trains
from bnlayer.errors import InputError, StateError
from bnlayer.spec import BatchNormSpec, Estimator, GhostLayout, NonFinite, Renorm, SingleValue, ZeroDebias
from bnlayer.state import BatchNormState, array_names, needs_counter

from .hosts import channel_axis, example_axis, flax_spec, normalized
from .precision import refuse_missing_float64
from .state import counter_dtype

VARIABLES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


class BatchNorm(nnx.BatchNorm):
    """Batch normalization with Flax's arguments, and by keyword what a spec has beyond them.

    Attributes are the truth: `train()`, `eval()`, `set_attributes` and assignments take effect at the next call, and
    `spec` is computed from them.

    y has Flax's dtype: `dtype` if given, else what x, the statistics and the parameters promote to, so float32 for half
    x under float32 parameters. Whatever it is, arithmetic is in float32 or wider, and the parameters and statistics
    enter it unrounded. `promote_dtype` decides the dtype of x and y only. `use_fast_variance` is taken and has no
    effect: the variance is always the accurate one.

    Attributes:
        num_features, use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale, axis_name,
            use_fast_variance, promote_dtype: Flax's; `momentum` is the weight on the old statistics, or "cumulative".
        mean, var, scale, bias: Flax's variables.
        moving_variance_estimator, zero_debias, renorm, virtual_batch_size, virtual_batch_layout, track_moving_stats,
            single_value, nonfinite: as in `bnlayer.BatchNormSpec`.
        frozen_statistics: True: the moving statistics normalize and stay as they are, whatever `train()` says.
        frozen_parameters: True: scale and bias get gradient 0. (An optimizer that decays weights moves them all the
            same; leave them out of its `wrt`.)
        hidden_mean, hidden_variance, renorm_mean, renorm_stddev, moving_stddev, num_updates: `nnx.BatchStat`s of a
            layer that was built with zero_debias, renorm or momentum="cumulative" only, as in `bnlayer.BatchNormState`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | Literal["cumulative"] = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Any = nnx.initializers.zeros_init(),  # noqa: B008  (Flax's default, a stateless function)
        scale_init: Any = nnx.initializers.ones_init(),  # noqa: B008
        axis_name: str | None = None,
        axis_index_groups: None = None,
        use_fast_variance: bool = True,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        moving_variance_estimator: Estimator = "biased",
        zero_debias: ZeroDebias = "none",
        renorm: Renorm | None = None,
        virtual_batch_size: int | None = None,
        virtual_batch_layout: GhostLayout = "strided",
        track_moving_stats: bool = True,
        single_value: SingleValue = "allow",
        nonfinite: NonFinite = "propagate",
        stats_dtype: Any = jnp.float32,
        frozen_statistics: bool = False,
        frozen_parameters: bool = False,
    ) -> None:
        """Flax's arguments and defaults, and ours (see the class).

        Args:
            num_features: number of channels.
            use_running_average, axis, momentum, epsilon, dtype, param_dtype, use_bias, use_scale, bias_init,
                scale_init, axis_name, promote_dtype, rngs, bias_metadata, scale_metadata: as Flax's.
            axis_index_groups: None; groups are not supported.
            use_fast_variance: no effect.
            moving_variance_estimator, zero_debias, renorm, virtual_batch_size, virtual_batch_layout,
                track_moving_stats, single_value, nonfinite, stats_dtype: as in `bnlayer.BatchNormSpec`; without
                track_moving_stats, `mean` and `var` are None.
            frozen_statistics, frozen_parameters: see the class.

        Raises:
            SpecError: an argument is out of range, or two contradict each other.
            UnsupportedError: several channel axes or axis_index_groups are asked for, or float64 without x64.
        """
        words: dict[str, Any] = {"axis": axis, "momentum": momentum}  # of which we take more than Flax says
        super().__init__(
            num_features,
            **words,
            use_running_average=use_running_average,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.moving_variance_estimator = moving_variance_estimator
        self.zero_debias = zero_debias
        self.renorm = renorm
        self.virtual_batch_size = virtual_batch_size
        self.virtual_batch_layout = virtual_batch_layout
        self.track_moving_stats = track_moving_stats
        self.single_value = single_value
        self.nonfinite = nonfinite
        self.frozen_statistics = frozen_statistics
        self.frozen_parameters = frozen_parameters
        # Of a layer for single examples the axis is 0 here and 1 in the batch (see `example_axis`).
        spec = flax_spec(self, num_features, channel_axis(axis) or 1, param_dtype, stats_dtype)
        refuse_missing_float64(spec, "")
        initial = BatchNormState.initial(spec)
        if not track_moving_stats:
            self.mean, self.var = nnx.data(None), nnx.data(None)
        for name in array_names(spec):
            if name not in ("gamma", "beta"):
                attribute = VARIABLES.get(name, name)
                setattr(self, attribute, nnx.BatchStat(jnp.asarray(getattr(initial, name))))
        if needs_counter(spec):
            self.num_updates = nnx.BatchStat(jnp.zeros((), counter_dtype()))

    @property
    def spec(self) -> BatchNormSpec:
        """What the layer is now, by its attributes and the dtypes of its variables.

        Raises:
            SpecError: an attribute was set to what no batch norm can be.
            UnsupportedError: `axis` names several axes, or `axis_index_groups` was set.
        """
        return self._spec(channel_axis(self.axis))

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
        """Normalize x, and in training update the moving statistics.

        Args:
            x: array, `num_features` long on the channel axis; integers are promoted. Where the channel axis is the
                first, x is a single example, and vmap maps the batch.
            use_running_average: False trains; None for the attribute.
            mask: boolean, broadcastable to x: which values the statistics see.
            weights: instead of a mask: non-negative weights, as of `bnlayer_jax.batch_norm`.
            update_stats: False: batch statistics normalize, but no variable changes (for recomputation and extra
                forward passes).
            adjustment, renorm_clips: as of `bnlayer_jax.batch_norm`.

        Returns:
            An array of x's shape; its dtype: see the class.

        Raises:
            InputError: an argument does not fit the layer, or nothing says whether it trains.
            SpecError: an attribute was set to what no batch norm can be.
            StateError: an attribute asks for statistics that the layer was built without.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise InputError(
                "use_running_average must be True or False, in the call or as the layer's attribute; got None in both."
                " Call layer.train() or layer.eval() first, or give it."
            )
        variables = variables_of(self)
        held = {name: variable[...] for name, variable in variables.items()}
        counter = held.pop("num_updates", None)
        statistics, parameters = ("moving_mean", "moving_variance"), ("gamma", "beta")
        promoted: tuple[Any, ...] = self.promote_dtype(
            (x, *map(held.get, statistics), *map(held.get, parameters)), dtype=self.dtype
        )
        axis, is_example = example_axis(channel_axis(self.axis), promoted[0].ndim)
        spec = self._spec(axis)
        if needs_counter(spec) and counter is None:
            raise StateError(
                "the layer was built without num_updates; build it with the momentum and zero_debias that it has now."
            )
        y, after = normalized(
            promoted[0],
            BatchNormState(**held, num_updates=0 if counter is None else counter),
            spec,
            is_example=is_example,
            training=trains(spec, not use_running_average, self.frozen_statistics),
            dtype=dtypes.canonicalize_dtype(promoted[0], *promoted[3:], dtype=self.dtype),
            axis_name=self.axis_name,
            frozen_parameters=self.frozen_parameters,
            mask=mask,
            weights=weights,
            update_stats=update_stats,
            adjustment=adjustment,
            renorm_clips=renorm_clips,
        )
        for name, variable in variables.items():
            moved = getattr(after, name)
            if name not in parameters and moved is not (counter if name == "num_updates" else held[name]):
                variable[...] = moved
        return y

    def _spec(self, axis: int) -> BatchNormSpec:
        stored = next((v for v in (self.scale, self.bias) if v is not None), self)
        return flax_spec(
            self,
            self.num_features,
            axis,
            self.param_dtype if stored is self else stored.dtype,
            jnp.float32 if self.mean is None else self.mean.dtype,
        )


def variables_of(layer: nnx.BatchNorm) -> dict[str, Any]:
    """The Variables that Flax's layer or ours has, by the state's names."""
    names = [f.name for f in dataclasses.fields(BatchNormState)]
    found = {name: getattr(layer, VARIABLES.get(name, name), None) for name in names}
    return {name: variable for name, variable in found.items() if variable is not None}
