"""`batch_norm`: the drop-in for `tf.contrib.layers.batch_norm` (tf-slim's `batch_norm`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from bnlayer.errors import InputError

from .arguments import (
    adjust,
    read_clips,
    read_decay,
    read_flag,
    read_initializer,
    read_inputs,
    read_weights,
    refuse_eager,
    refuse_unknown,
)
from .call import Call, normalize, spec_of
from .paths import contrib_path
from .record import Record, remember
from .variables import Maker

_INITIALIZERS = {"beta": "zeros", "gamma": "ones", "moving_mean": "zeros", "moving_variance": "ones"}


def batch_norm(
    inputs: Any,
    decay: float | tf.Tensor = 0.999,
    center: bool = True,
    scale: bool = False,
    epsilon: float = 0.001,
    activation_fn: Callable[[tf.Tensor], tf.Tensor] | None = None,
    param_initializers: Mapping[str, Any] | None = None,
    param_regularizers: Mapping[str, Callable[[tf.Tensor], tf.Tensor | None]] | None = None,
    updates_collections: str | Sequence[str] | None = tf.compat.v1.GraphKeys.UPDATE_OPS,
    is_training: bool | tf.Tensor = True,
    reuse: Any = None,
    variables_collections: Mapping[str, Sequence[str] | None] | Sequence[str] | None = None,
    outputs_collections: str | Sequence[str] | None = None,
    trainable: bool = True,
    batch_weights: Any = None,
    fused: bool | None = None,
    data_format: str = "NHWC",
    zero_debias_moving_mean: bool = False,
    scope: Any = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_decay: float | tf.Tensor = 0.99,
    adjustment: Callable[[tf.Tensor], tuple[Any, Any]] | None = None,
) -> tf.Tensor:
    """Batch normalization as `tf.contrib.layers.batch_norm` did it, variables, collections and checkpoints included.

    Graphs and sessions only. The moving statistics move when the operations in `updates_collections` run, so train
    under a control dependency on them or fetch them beside the train operation; `check_update_ops` tells where that
    was forgotten. What enters the moving variance depends on the rank and on other arguments, as it did in contrib:
    the unbiased variance where contrib ran its fused kernel (ranks 2, 4 and 5 unless `fused=False` or batch weights,
    renorm or an adjustment are given; not rank 5 with zero-debiasing or other `updates_collections`), the biased one
    elsewhere.

    Args:
        inputs: float16, bfloat16, float32 or float64, of rank 2 or more, with a known number of channels.
        decay: weight on the old statistics, in [0, 1]; a number or a scalar tensor.
        center: whether there is a beta.
        scale: whether there is a gamma.
        epsilon: added to the variance; a number.
        activation_fn: applied to the result.
        param_initializers: by the names beta, gamma, moving_mean and moving_variance.
        param_regularizers: by the names beta and gamma; their losses enter REGULARIZATION_LOSSES.
        updates_collections: where the two update operations go; None updates in place, whenever the result is
            computed in training.
        is_training: True, False, or a boolean scalar tensor that decides when the graph runs.
        reuse: of the variable scope; needs `scope`.
        variables_collections: more collections for the variables: a list for all four, or a list for each by name.
        outputs_collections: collections for the result, which gets the scope's name as an alias.
        trainable: whether beta and gamma are trainable. False also stops the moving statistics where contrib's core
            layer ran: at ranks other than 2, with none of batch weights, zero-debiasing and other updates_collections.
        batch_weights: of shape (N,), finite and at least 0: one for each example. Where all are 0 the batch counts
            as one of mean 0 and variance 0, as in contrib.
        fused: False keeps contrib from its fused kernel, which decides what enters the moving variance. The
            computation here is the same.
        data_format: "NHWC" for channels on the last axis, "NCHW" for axis 1, at any rank.
        zero_debias_moving_mean: divide the moving mean by 1 - decay**t; adds moving_mean/biased and
            moving_mean/local_step.
        scope: name or variable scope; "BatchNorm", made unique, if None.
        renorm: batch renormalization; adds moving_stddev, renorm_mean and renorm_stddev.
        renorm_clipping: by the keys rmax, rmin and dmax; numbers or scalar tensors, None for no clip.
        renorm_decay: weight on renorm's own old averages, in [0, 1]; a number or a scalar tensor.
        adjustment: called with the inputs' dynamic shape, gives a pair (scale, bias) that the normalized values are
            multiplied with and moved by in training, before gamma and beta.

    Returns:
        A tensor of the inputs' shape and dtype.

    Raises:
        UnsupportedError: the code runs eagerly, or renorm is combined with what contrib refuses beside it.
        InputError: an argument does not fit; the message names it.
        tf.errors.InvalidArgumentError: when the graph runs, for bad batch weights.
    """
    refuse_eager("batch_norm")
    if data_format not in ("NHWC", "NCHW"):
        raise InputError(f"data_format must be 'NHWC' or 'NCHW'; got {data_format!r}.")
    initializers, regularizers = dict(param_initializers or {}), dict(param_regularizers or {})
    refuse_unknown("param_initializers", initializers, tuple(_INITIALIZERS))
    refuse_unknown("param_regularizers", regularizers, ("beta", "gamma"))
    axis = 1 if data_format == "NCHW" else -1
    with tf.compat.v1.variable_scope(scope, "BatchNorm", [inputs], reuse=reuse) as current:
        x, channels = read_inputs(inputs, axis)
        path = contrib_path(
            x,
            axis,
            fused=fused,
            updates_collections=updates_collections,
            weighted=batch_weights is not None,
            zero_debias=bool(zero_debias_moving_mean),
            renorm=bool(renorm),
            adjusted=adjustment is not None,
        )
        training = read_flag("is_training", is_training)
        clips = read_clips(renorm, renorm_clipping)
        old = read_decay("decay", decay), read_decay("renorm_decay", renorm_decay)
        if zero_debias_moving_mean and old[0] == 1.0 and isinstance(old[0], float):
            raise InputError("zero_debias_moving_mean divides by 1 - decay**t, which is 0 at decay=1; choose another.")
        spec = spec_of(x, channels, axis, path, epsilon=epsilon, center=center, scale=scale, renorm=renorm)
        weights = read_weights(batch_weights, x)
        maker = Maker(
            shape=(channels,),
            dtype=path.dtype,
            trainable=trainable,
            initializers={n: read_initializer(n, initializers.get(n, w)) for n, w in _INITIALIZERS.items()},
            regularizers=regularizers,
            constraints={},
            model=True,
            collections=variables_collections,
        )
        variables = maker.make(
            center=center,
            scale=scale,
            gamma_first=path.gamma_first,
            renorm=renorm,
            # An eval graph never had these two, and its checkpoints need not.
            debias=bool(zero_debias_moving_mean) and training is not False,
            debias_is_model=path.debias_is_model,
        )
        call = Call(
            x=x,
            spec=spec,
            variables=variables,
            training=training,
            moves=trainable or not path.trainable_stops,
            decay=old[0],
            renorm_decay=old[1],
            weights=weights,
            adjustment=None if training is False else adjust(adjustment, x),
            clips=clips,
        )
        in_place = updates_collections is None
        y, updates = normalize(call, in_place=in_place)
        if not in_place:
            for operation in updates:
                tf.compat.v1.add_to_collections(updates_collections, operation)
        remember(Record(current.name, x, y, training, updates, in_place and call.moves, variables))
        if activation_fn is not None:
            y = activation_fn(y)
        if outputs_collections:
            named: Any = y  # tf-slim's way to call a tensor by the name of its layer
            named.aliases = [*getattr(y, "aliases", []), current.name]
            tf.compat.v1.add_to_collections(outputs_collections, y)
        return y
