"""`batch_norm` for TensorFlow: reads and checks its arguments, and has one of the paths compute the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from bnlayer.call import plan_call, refuse_single_value
from bnlayer.call import renorm_clips as clips_of
from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from . import composite, fused, sums
from .averages import updated
from .call import Call
from .ghosts import ghosts_of
from .paths import path_of
from .support import MISSING
from .synchronized import replicas_of
from .tensors import at_least_one

_WAYS = {"fused": fused.normalized, "sums": sums.normalized, "composite": composite.normalized}


def batch_norm(
    x: tf.Tensor,
    state: BatchNormState[tf.Tensor],
    spec: BatchNormSpec,
    *,
    training: bool,
    weights: tf.Tensor | None = None,
    update_stats: bool = True,
    adjustment: tuple[Any, Any] | None = None,
    renorm_clips: Mapping[str, Any] | None = None,
    decay: Any = None,
) -> tuple[tf.Tensor, BatchNormState[tf.Tensor]]:
    """Normalize x and update the moving statistics; eagerly, in a `tf.function`, and under `jit_compile`.

    With `spec.synchronized`, in a replica of a `tf.distribute` strategy (`strategy.run`), the batch statistics in
    training are those of all replicas' batches together, which may have different numbers of rows, also none. It takes
    one all-reduce, and one more in the backward pass; eval takes none. The gradient is that of the sum of the replicas'
    losses. MirroredStrategy cannot reduce inside a `tf.function`, a `tf.cond` or a loop of a replica's own: put the
    `tf.function` around `strategy.run`. Outside `strategy.run` there is one replica.

    Lengths of x may be unknown in a graph, its rank and its channel count may not. What then depends on them (an
    empty batch, one value per channel, the number of ghost batches) is decided when the graph runs.

    First and second derivatives are right. A limit of TensorFlow's own kernel, which computes large batches, and large
    ghost batches of one size, where there is no adjustment, the channels are last, and x is not float64: third
    derivatives in training are wrong, and forward mode around a `tf.function` (and not around the call itself) finds
    None. Under `jit_compile` plain operations compute, and both are right.

    Args:
        x: float16, bfloat16, float32 or float64, of rank 2 or more, `spec.num_features` long on `spec.axis`.
        state: parameters and moving statistics as tensors, variables or numpy arrays; not modified.
        spec: what the layer is.
        training: batch statistics if True, moving ones if False; a Python boolean.
        weights: mask or weights of shape (N,), x's shape without the channel axis, or with 1 on it; at least 0.
            Real ones get a gradient, boolean and integer ones do not.
        update_stats: False: batch statistics normalize, but the state is returned as it came.
        adjustment: scale and bias of the normalized values, in training only, each broadcastable to x; both get a
            gradient.
        renorm_clips: "r_max", "r_min" or "d_max" to what holds in place of the spec's in this call: a number, a scalar
            tensor, or None for no clip.
        decay: what holds in place of `spec.decay` in this call, for schedules: a number in [0, 1] or a scalar tensor.
            zero_debias divides by 1 - decay**t with this call's decay, which may then not be 1. `renorm.decay` stays.

    Returns:
        y, of x's shape and dtype, and the state after: `state` itself where nothing can enter it, else new tensors,
        which carry no gradient; `num_updates` is an int64 scalar.

    Raises:
        InputError: x or an argument does not fit the spec. Negative or non-finite weights, and one value per channel
            where only the running graph can tell, raise `tf.errors.InvalidArgumentError`; XLA drops such checks. The
            values of tensors in `renorm_clips` and `decay` are not looked at.
        UnsupportedError: the spec asks for what this backend lacks.
    """
    MISSING.refuse("tensorflow", spec)
    x = tf.convert_to_tensor(x)
    given = None if weights is None else tf.convert_to_tensor(weights)
    adjusting = None if adjustment is None else _adjustment(adjustment)
    plan = plan_call(
        spec,
        _lengths("x", x),
        x.dtype.name,
        training=training,
        update_stats=update_stats,
        weights_shape=None if given is None else _lengths("weights", given),
        adjustment_shapes=None
        if adjusting is None
        else (_lengths("scale", adjusting[0]), _lengths("bias", adjusting[1])),
    )
    clips = clips_of(spec, renorm_clips)
    if decay is not None:
        _check_decay(decay, spec)
    replica = replicas_of(plan)
    call = Call(
        spec=spec,
        plan=plan,
        state=state,
        weights=given,
        clips=clips,
        adjustment=adjusting if training else None,
        replica=replica,
    )
    if replica is None:  # else they decide together
        x = _several_values(x, call)
    gamma, beta = (None if each is None else tf.cast(each, call.work) for each in (state.gamma, state.beta))
    y, batch = _WAYS[path_of(x, call)](x, gamma, beta, call)
    return y, state if batch is None or not plan.update else updated(state, batch, spec, decay)


def _several_values(x: tf.Tensor, call: Call) -> tf.Tensor:
    """x, refused where it has one value per channel, in all or in its smallest ghost batch, and where only the running
    graph can tell that."""
    plan, spec = call.plan, call.spec
    if not plan.batch_statistics or spec.single_value == "allow":
        return x
    if plan.count is not None:
        if plan.synchronized:  # else the plan has asked
            refuse_single_value(spec, plan.count, f"x has shape {tuple(x.shape)}")
        return x
    count, ghosts = call.count(x), ghosts_of(x, plan, spec)
    if ghosts is not None:
        rows = tf.cast(ghosts.rows, tf.int64)
        count = count // at_least_one(rows) * (rows // ghosts.number)
    check = tf.debugging.assert_none_equal(
        count,
        tf.constant(1, tf.int64),
        message="batch statistics need more than one value per channel. Give a larger batch, call with training=False,"
        " or build the layer with single_value='allow'.",
    )
    with tf.control_dependencies([check]):  # in a graph of TensorFlow 1 nothing else would run it
        return tf.identity(x)


def _adjustment(given: tuple[Any, Any]) -> tuple[tf.Tensor, tf.Tensor]:
    # Python's numbers are float64; what has a dtype keeps it, to be looked at.
    scale, bias = (
        tf.convert_to_tensor(each, dtype_hint=None if hasattr(each, "dtype") else tf.float64) for each in given
    )
    for name, each in (("scale", scale), ("bias", bias)):
        if not (each.dtype.is_floating or each.dtype.is_integer):
            raise InputError(f"the adjustment's {name} must be real; got {each.dtype.name}.")
    return scale, bias


def _check_decay(decay: Any, spec: BatchNormSpec) -> None:
    if spec.decay == "cumulative":
        raise InputError("decay contradicts decay='cumulative' of the spec; build the layer with a number.")
    if tf.is_tensor(decay):
        return
    if not 0.0 <= decay <= 1.0:
        raise InputError(f"decay must be in [0, 1]; got {decay!r}.")
    if decay == 1.0 and spec.zero_debias != "none":
        raise InputError("decay must be below 1 with zero_debias, which divides by 1 - decay**t.")


def _lengths(what: str, tensor: tf.Tensor) -> list[int | None]:
    if tensor.shape.rank is None:
        raise InputError(f"{what} must have a known rank in a graph; give it one with tf.ensure_shape.")
    lengths: list[int | None] = tensor.shape.as_list()
    return lengths
