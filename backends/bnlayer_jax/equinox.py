"""`BatchNorm` for Equinox: `equinox.nn.BatchNorm`'s arguments, call and leaves over `batch_norm`.

Change the import, and nothing else:

    from bnlayer_jax.equinox import BatchNorm

In training the statistics of the batch normalize, in every mode; the mode says which average is kept, in the host's
leaves, so that `.eqx` files of either load into the other:

| mode | leaves in the state | as `bnlayer.BatchNormState` |
|---|---|---|
| "batch" | counter; (mean, variance) | num_updates; hidden_mean, hidden_variance of zero_debias="all" |
| "ema", "legacy" | first time; (mean, variance) | no update yet, or an unknown number; moving_mean, moving_variance |

What differs from Equinox, always:

* "ema" there normalizes with the moving average in training too, which is no batch normalization: the gradient misses
  most of what centers it, and the output is neither centered nor of unit variance while the average lags. Here it
  averages as there (the first batch's statistics enter whole) and normalizes with the batch. "legacy" is "ema" without
  the warning, whose reason is gone.
* "batch" there starts the hidden variance at 1 and then divides by 1 - momentum**counter as if it had started at 0, so
  eval's variance is too large by momentum**counter / (1 - momentum**counter): 9.5 times at update 10. Here the average
  starts at 0, whatever the leaf holds at counter 0. A state that Equinox has trained holds that remainder still;
  `without_start` takes it out.
* Under mode "batch", eval before the first update normalizes with mean 0 and variance 1 (as there); under "ema" too
  (there: with what is in the uninitialized buffer).
* half x: statistics are computed in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bnlayer.call import trains
from bnlayer.errors import StateError
from bnlayer.spec import BatchNormSpec, Estimator, NonFinite, SingleValue
from bnlayer.state import BatchNormState

from .hosts import FLAGS, OPTIONS, normalized
from .precision import refuse_missing_float64

Held = BatchNormState[jax.Array]


class BatchNorm(eqx.nn.BatchNorm):
    """Batch normalization with Equinox's arguments, and by keyword what a spec has beyond them.

    A layer for one example, called under a vmap (or shard_map) that maps the batch and has the layer's `axis_name`; a
    sequence of names joins several mapped axes. Ghost batches and renorm are not here: the first contradict statistics
    over a mapped axis, the second the averages of either mode.

    y has Equinox's dtype: what x, weight and bias, and in inference the statistics promote to, so float32 for half x
    under float32 parameters. Arithmetic is in float32 or wider, whatever it is.

    Attributes:
        weight, bias, axis_name, inference, input_size, eps, channelwise_affine, momentum, mode: Equinox's.
        ema_first_time_index, ema_state_index, batch_counter, batch_state_index: Equinox's, two of them None.
        moving_variance_estimator, single_value, nonfinite: as in `bnlayer.BatchNormSpec`; static.
        frozen_statistics: True: the moving statistics normalize and stay as they are, in training too; static.
        frozen_parameters: True: weight and bias get gradient 0; static. (An optimizer that decays weights moves them
            all the same; filter them out there.)
    """

    moving_variance_estimator: Estimator = eqx.field(static=True)
    single_value: SingleValue = eqx.field(static=True)
    nonfinite: NonFinite = eqx.field(static=True)
    frozen_statistics: bool = eqx.field(static=True)
    frozen_parameters: bool = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Hashable | Sequence[Hashable],
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype: Any = None,
        mode: Literal["ema", "batch", "legacy"] = "legacy",
        *,
        moving_variance_estimator: Estimator = "biased",
        single_value: SingleValue = "allow",
        nonfinite: NonFinite = "propagate",
        frozen_statistics: bool = False,
        frozen_parameters: bool = False,
    ) -> None:
        """Equinox's arguments and defaults, and ours (see the class).

        Args:
            input_size, axis_name, eps, channelwise_affine, momentum, inference, dtype: as Equinox's.
            mode: which average is kept, and in which leaves; see the module.
            moving_variance_estimator, single_value, nonfinite: as in `bnlayer.BatchNormSpec`; nonfinite="keep" goes
                with "ema" only.
            frozen_statistics, frozen_parameters: see the class.

        Raises:
            SpecError: an argument is out of range, or two contradict each other.
            UnsupportedError: dtype is float64 without x64.
            ValueError: there is no such mode (Equinox's error).
        """
        super().__init__(
            input_size,
            axis_name,
            eps,
            channelwise_affine,
            momentum,
            inference,
            dtype,
            "ema" if mode == "legacy" else mode,
        )
        if self.ema_state_index is not None:  # Equinox leaves what the memory held
            initial = jnp.zeros(input_size, dtype), jnp.ones(input_size, dtype)
            self.ema_state_index = eqx.nn.StateIndex(initial)
        self.moving_variance_estimator = moving_variance_estimator
        self.single_value = single_value
        self.nonfinite = nonfinite
        self.frozen_statistics = frozen_statistics
        self.frozen_parameters = frozen_parameters
        stored = jnp.result_type(float) if dtype is None else dtype
        refuse_missing_float64(self.spec_of(stored), "")

    def __call__(
        self,
        x: ArrayLike,
        state: eqx.nn.State,
        *,
        key: Any = None,
        inference: bool | None = None,
        weights: ArrayLike | None = None,
        update_stats: bool = True,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalize one example, and in training update the moving statistics.

        Args:
            x: float array of shape (input_size, ...).
            state: has the layer's statistics.
            key: ignored, as Equinox's.
            inference: True normalizes with the moving statistics; None for the attribute.
            weights: mask or weights of this example: a scalar, or of x's shape without the first axis (1s allowed).
            update_stats: False: batch statistics normalize, but the state is returned as it came.

        Returns:
            y of x's shape, and the state after, which is the same for every example.

        Raises:
            InputError: in training, nothing maps `axis_name`; or an argument does not fit the layer.
        """
        x = jnp.asarray(x)
        held = self.held(state)
        spec = self.spec_of(state.get(indices(self)[1])[0].dtype)
        training = trains(spec, not (self.inference if inference is None else inference), self.frozen_statistics)
        y, after = normalized(
            x,
            # Its first update enters whole, and the later ones are averaged below: a spec has one decay for all.
            held.replace(num_updates=0) if self.mode == "ema" else held,
            spec.replace(decay=0.0) if self.mode == "ema" else spec,
            is_example=True,
            training=training,
            dtype=jnp.result_type(x, *(a for n, a in held.arrays().items() if n in ("gamma", "beta") or not training)),
            axis_name=tuple(self.axis_name) if isinstance(self.axis_name, list) else self.axis_name,
            frozen_parameters=self.frozen_parameters,
            weights=weights,
            update_stats=update_stats,
        )
        if not (training and update_stats):
            return y, state
        return y, self._keep(state, held, after)

    @property
    def spec(self) -> BatchNormSpec:
        """What the layer is; an example's axis 0 is the batch's axis 1. Its dtypes are those of `weight`, float32
        without one.

        Raises:
            SpecError: a field is what no batch norm can be.
        """
        return self.spec_of(jnp.float32 if self.weight is None else self.weight.dtype)

    def spec_of(self, stats_dtype: Any) -> BatchNormSpec:
        """`spec`, for moving statistics of this dtype.

        Raises:
            SpecError: a field is what no batch norm can be.
        """
        options = {name: getattr(self, name) for name in plain_options() if name not in FLAGS}
        return spec_of(self, stats_dtype, **options)

    def held(self, state: eqx.nn.State) -> Held:
        """What the layer has learned: its parameters, and its leaves in `state`, which stays usable.

        num_updates is None in mode "ema", which does not count them.
        """
        return held_in(self, state)

    def _keep(self, state: eqx.nn.State, held: Held, after: Held) -> eqx.nn.State:
        """The state with what one update made of the statistics."""
        counter, statistics = indices(self)
        if self.mode == "batch":
            state = state.set(counter, after.num_updates)
            return state.set(statistics, (after.hidden_mean, after.hidden_variance))
        first = state.get(counter)
        entered = after.num_updates > 0
        d = self.momentum

        def averaged(old: Any, batch: Any) -> jax.Array:
            # A channel that kept its statistics, as nothing entered or what did was not finite, has `batch == old`.
            wide = jnp.promote_types(old.dtype, jnp.float32)
            moved = (d * old.astype(wide) + (1 - d) * batch.astype(wide)).astype(old.dtype)
            return jnp.where(first | (batch == old), batch, moved)

        state = state.set(counter, first & ~entered)
        mean = averaged(held.moving_mean, after.moving_mean)
        return state.set(statistics, (mean, averaged(held.moving_variance, after.moving_variance)))


def indices(layer: Any) -> tuple[Any, Any]:
    """Where a state has a layer's counter (in mode "ema" the flag that nothing entered yet), and its statistics."""
    if layer.mode == "ema":
        return layer.ema_first_time_index, layer.ema_state_index
    return layer.batch_counter, layer.batch_state_index


def spec_of(
    layer: eqx.nn.BatchNorm, stats_dtype: Any, *, single_value: SingleValue = "allow", **options: Any
) -> BatchNormSpec:
    """The spec of Equinox's batch norm or ours, for moving statistics of this dtype.

    Raises:
        SpecError: a field is what no batch norm can be.
    """
    return BatchNormSpec(
        layer.input_size,
        axis=1,
        epsilon=layer.eps,
        decay=layer.momentum,
        center=layer.channelwise_affine,
        scale=layer.channelwise_affine,
        zero_debias="all" if layer.mode == "batch" else "none",
        synchronized=True,
        single_value=single_value,
        param_dtype=jnp.dtype(stats_dtype if layer.weight is None else layer.weight.dtype).name,
        stats_dtype=jnp.dtype(stats_dtype).name,
        **options,
    )


def held_in(layer: eqx.nn.BatchNorm, state: eqx.nn.State) -> Held:
    """What Equinox's batch norm or ours has learned; see `BatchNorm.held`."""
    counts, statistics = indices(layer)
    count, (mean, variance) = state.get(counts), state.get(statistics)
    # What the leaves hold before the first update is where Equinox starts, or what its memory held.
    fresh = count if layer.mode == "ema" else count == 0
    mean = jnp.where(fresh, 0, mean)
    hidden_variance = jnp.where(fresh, 0, variance)
    moving_variance = jnp.where(fresh, 1, variance)
    if layer.mode == "ema":
        return BatchNormState(
            gamma=layer.weight,
            beta=layer.bias,
            moving_mean=mean,
            moving_variance=moving_variance,
            num_updates=None,
        )
    seen = jnp.where(fresh, 1, _seen(layer.momentum, count)).astype(mean.dtype)
    return BatchNormState(
        gamma=layer.weight,
        beta=layer.bias,
        moving_mean=mean / seen,
        moving_variance=moving_variance / seen,
        hidden_mean=mean,
        hidden_variance=hidden_variance,
        num_updates=count,
    )


def without_start(layer: eqx.nn.BatchNorm, state: eqx.nn.State) -> eqx.nn.State:
    """The state of a layer that Equinox trained in mode "batch", without what the hidden variance started from.

    Equinox starts it at 1, so that after t updates momentum**t of that is left in it, which eval takes for variance.
    Use it once, on states that `equinox.nn.BatchNorm` has trained from its own beginning, and not on ours.

    Args:
        layer: Equinox's or ours.
        state: has the layer's leaves; not to be used afterwards (see `equinox.nn.State.set`).

    Raises:
        StateError: the layer's mode is "ema", whose average has no such start; or its hidden variance is less than
            the start would have left, so that it did not start at 1.
    """
    if layer.mode != "batch":
        raise StateError('only mode="batch" starts its variance at 1; this layer\'s mode is "ema".')
    counts, statistics = indices(layer)
    counter, (mean, variance) = state.get(counts), state.get(statistics)
    left = jnp.where(counter == 0, 0, 1 - _seen(layer.momentum, counter))
    corrected = variance - left
    if bool((corrected < -1e-6 * left).any()):
        raise StateError("the hidden variance is less than a start at 1 would have left in it; it started at 0.")
    return state.set(statistics, (mean, jnp.maximum(corrected, 0).astype(variance.dtype)))


def plain_options() -> dict[str, Any]:
    """Our fields, as they are in a layer that computes what Equinox's does."""
    ours = {f.name for f in dataclasses.fields(BatchNorm)} - {f.name for f in dataclasses.fields(eqx.nn.BatchNorm)}
    usual = {**OPTIONS, **dict.fromkeys(FLAGS, False)}
    return {name: usual[name] for name in ours}


def with_fields(layer: eqx.nn.BatchNorm, kind: type[Any], **changes: Any) -> Any:
    """A layer of class `kind` with the same leaves and fields, but for those changed; static ones too, which
    `eqx.tree_at` does not reach."""
    made = object.__new__(kind)
    for field in dataclasses.fields(kind):
        value = changes[field.name] if field.name in changes else getattr(layer, field.name)
        object.__setattr__(made, field.name, value)
    return made


def _seen(momentum: float, counter: jax.Array) -> jax.Array:
    """1 - momentum**counter, in which no digit is lost for a momentum near 1."""
    steps = counter.astype(jnp.result_type(float))
    return jnp.ones_like(steps) if momentum == 0 else -jnp.expm1(steps * math.log(momentum))
