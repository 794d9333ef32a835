"""One batch norm in a graph: what both drop-ins do once their arguments are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bnlayer.call import plan_call
from bnlayer.spec import BatchNormSpec, Renorm
from bnlayer.state import BatchNormState

from ..function import batch_norm
from .paths import Path
from .update import Batch, update
from .variables import Variables


@dataclass(frozen=True, eq=False)
class Call:
    """One call, its arguments read.

    Attributes:
        x: the inputs.
        spec: what is computed; its decays are 0, so that the state after a step is the batch's own statistics.
        variables: of the layer.
        training: a Python boolean, or a tensor that decides when the graph runs.
        moves: whether training moves the statistics.
        decay, renorm_decay: of the moving statistics, numbers or tensors.
        weights, adjustment, clips: as `bnlayer_tensorflow.batch_norm` takes them.
    """

    x: tf.Tensor
    spec: BatchNormSpec
    variables: Variables
    training: bool | tf.Tensor
    moves: bool
    decay: float | tf.Tensor
    renorm_decay: float | tf.Tensor = 0.0
    weights: tf.Tensor | None = None
    adjustment: tuple[tf.Tensor, tf.Tensor] | None = None
    clips: dict[str, Any] | None = None


def spec_of(
    x: tf.Tensor,
    channels: int,
    axis: int,
    path: Path,
    *,
    epsilon: float,
    center: bool,
    scale: bool,
    renorm: bool,
    virtual_batch_size: int | None = None,
) -> BatchNormSpec:
    """What is computed, checked against the inputs. Its decays are 0: the averaging is `update`'s.

    Raises:
        SpecError: epsilon or the virtual batch size is out of range.
        InputError: the inputs' dtype is none of the four.
    """
    spec = BatchNormSpec(
        channels,
        axis=axis,
        epsilon=epsilon,
        decay=0.0,
        center=bool(center),
        scale=bool(scale),
        moving_variance_estimator=path.estimator,
        renorm=Renorm(decay=0.0) if renorm else None,
        virtual_batch_size=virtual_batch_size,
        single_value="allow",
        param_dtype=path.dtype.name,
        stats_dtype=path.dtype.name,
    )
    plan_call(spec, x.shape.as_list(), x.dtype.name, training=True)
    return spec


def normalize(call: Call, *, in_place: bool) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
    """y, and the two tensors that move the statistics when they run: none in eval, and none where y moves them."""
    if call.training is False:
        return _evaluated(call), ()
    if call.training is True:
        y, batch = _trained(call)
        if not call.moves:
            return y, ()
        if not in_place:
            return y, _update(call, y, batch)
        with tf.control_dependencies(_update(call, y, batch)):
            return tf.identity(y), ()
    if in_place or not call.moves:

        def train() -> tf.Tensor:
            y, batch = _trained(call)
            with tf.control_dependencies(_update(call, y, batch) if call.moves else ()):
                return tf.identity(y)

        return _like(call.x, tf.cond(call.training, train, lambda: _evaluated(call))), ()
    zero = tf.zeros([call.spec.num_features], tf.as_dtype(call.spec.stats_dtype))

    def statistics() -> tuple[tf.Tensor, ...]:
        y, batch = _trained(call)
        return y, batch.mean, batch.variance, zero if batch.stddev is None else batch.stddev

    y, mean, variance, stddev = tf.cond(call.training, statistics, lambda: (_evaluated(call), zero, zero, zero))
    batch = Batch(mean, variance, None if call.spec.renorm is None else stddev, _present(call))
    kept = call.variables
    updates = tf.cond(
        call.training,
        lambda: _update(call, y, batch),
        lambda: (tf.convert_to_tensor(kept.moving_mean), tf.convert_to_tensor(kept.moving_variance)),
    )
    return _like(call.x, y), tuple(updates)


def _trained(call: Call) -> tuple[tf.Tensor, Batch]:
    """y by the batch's statistics, and these.

    The moving statistics given here are zeros. The decays are 0, so none of them enters the result; and where a batch
    has no weight at all they are what normalizes, which is contrib's answer: a mean and a variance of 0.
    """
    zero = tf.zeros([call.spec.num_features], tf.as_dtype(call.spec.stats_dtype))
    kept = call.variables
    state = BatchNormState(
        gamma=_flat(kept.gamma),
        beta=_flat(kept.beta),
        moving_mean=zero,
        moving_variance=zero,
        moving_stddev=None if call.spec.renorm is None else zero,
        renorm_mean=_flat(kept.renorm_mean),
        renorm_stddev=_flat(kept.renorm_stddev),
        num_updates=tf.zeros([], tf.int64),
    )
    y, after = batch_norm(
        call.x,
        state,
        call.spec,
        training=True,
        weights=call.weights,
        adjustment=call.adjustment,
        renorm_clips=call.clips,
    )
    assert after.moving_mean is not None and after.moving_variance is not None  # the spec tracks them
    return y, Batch(after.moving_mean, after.moving_variance, after.moving_stddev, _present(call))


def _evaluated(call: Call) -> tf.Tensor:
    kept = call.variables
    # Eval reads these four alone; the averages behind them may be anything.
    spec = call.spec.replace(renorm=None, virtual_batch_size=None)
    state = BatchNormState(
        gamma=_flat(kept.gamma),
        beta=_flat(kept.beta),
        moving_mean=_flat(kept.moving_mean),
        moving_variance=_flat(kept.moving_variance),
    )
    y, _ = batch_norm(call.x, state, spec, training=False)
    return y


def _update(call: Call, y: tf.Tensor, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    # renorm normalizes with averages that the update then moves, so y comes first.
    with tf.control_dependencies([y] if call.spec.renorm is not None else []):
        return update(call.variables, batch, call.decay, call.renorm_decay, call.spec.epsilon)


def _present(call: Call) -> tf.Tensor | None:
    """Whether there is any example; None where the shape says so."""
    return None if all(call.x.shape.as_list()) else tf.size(call.x) > 0


def _flat(variable: Any) -> tf.Tensor | None:
    """A variable's value, per channel: with virtual batches the originals keep it in the rank of the inputs."""
    return None if variable is None else tf.reshape(tf.convert_to_tensor(variable), [-1])


def _like(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """A tensor out of `tf.cond`, which may have forgotten its shape."""
    y.set_shape(x.shape)
    return y
