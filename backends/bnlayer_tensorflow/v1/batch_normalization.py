"""`batch_normalization`: the drop-in for `tf.layers.batch_normalization`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from bnlayer.errors import InputError

from .arguments import adjust, read_clips, read_decay, read_flag, read_initializer, read_inputs, refuse_eager
from .call import Call, normalize, spec_of
from .paths import layers_path
from .record import Record, remember
from .variables import Maker

_NAME = "batch_normalization"


def batch_normalization(
    inputs: Any,
    axis: int | Sequence[int] = -1,
    momentum: float | tf.Tensor = 0.99,
    epsilon: float = 0.001,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Any = "zeros",
    gamma_initializer: Any = "ones",
    moving_mean_initializer: Any = "zeros",
    moving_variance_initializer: Any = "ones",
    beta_regularizer: Callable[[tf.Tensor], tf.Tensor | None] | None = None,
    gamma_regularizer: Callable[[tf.Tensor], tf.Tensor | None] | None = None,
    beta_constraint: Callable[[tf.Tensor], tf.Tensor] | None = None,
    gamma_constraint: Callable[[tf.Tensor], tf.Tensor] | None = None,
    training: bool | tf.Tensor = False,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, Any] | None = None,
    renorm_momentum: float | tf.Tensor = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: Callable[[tf.Tensor], tuple[Any, Any]] | None = None,
) -> tf.Tensor:
    """Batch normalization as `tf.layers.batch_normalization` did it, variables, collections and checkpoints included.

    Graphs and sessions only. The moving statistics move when the operations in UPDATE_OPS run, so train under a
    control dependency on them or fetch them beside the train operation; `check_update_ops` tells where that was
    forgotten. What enters the moving variance depends on the rank and on other arguments, as it did in tf.layers: the
    unbiased variance where it ran its fused kernel (ranks 4 and 5, channels on axis 1 or on the last, float32 or half,
    without renorm, adjustment or virtual batches, unless `fused=False`), the biased one elsewhere.

    Args:
        inputs: float16, bfloat16, float32 or float64, of rank 2 or more, with a known number of channels.
        axis: of the channels, an integer or a sequence of one; not 0, the batch axis.
        momentum: weight on the old statistics, in [0, 1]; a number or a scalar tensor.
        epsilon: added to the variance; a number.
        center: whether there is a beta.
        scale: whether there is a gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: as `get_variable`
            takes them, or the short name of one of TensorFlow's, such as "zeros".
        beta_regularizer, gamma_regularizer: their losses enter REGULARIZATION_LOSSES.
        beta_constraint, gamma_constraint: applied by TensorFlow's optimizers after each of their updates.
        training: True, False, or a boolean scalar tensor that decides when the graph runs.
        trainable: False: beta and gamma are not trainable and the moving statistics stop; the batch still normalizes.
        name: of the variable scope; "batch_normalization", made unique, if None.
        reuse: of the variable scope.
        renorm: batch renormalization; adds moving_stddev, renorm_mean and renorm_stddev.
        renorm_clipping: by the keys rmax, rmin and dmax; numbers or scalar tensors, None for no clip.
        renorm_momentum: weight on renorm's own old averages, in [0, 1]; a number or a scalar tensor.
        fused: False keeps tf.layers from its fused kernel, which decides what enters the moving variance. The
            computation here is the same.
        virtual_batch_size: rows per ghost batch in training; ghost g of G has the rows g, g + G, and so on. The
            variables then have one more axis than the inputs, of length 1 but for the channels.
        adjustment: called with the inputs' dynamic shape, gives a pair (scale, bias) that the normalized values are
            multiplied with and moved by in training, before gamma and beta.

    Returns:
        A tensor of the inputs' shape and dtype.

    Raises:
        UnsupportedError: the code runs eagerly.
        InputError: an argument does not fit; the message names it.
        SpecError: epsilon or virtual_batch_size is out of range.
    """
    refuse_eager("batch_normalization")
    axis = _one_axis(axis)
    # Reuse without a name means the first layer of the default name; else such a name is made unique.
    scope = tf.compat.v1.variable_scope(_NAME if name is None and reuse else name, _NAME, reuse=reuse)
    with scope as current:
        x, channels = read_inputs(inputs, axis)
        special = bool(renorm) or adjustment is not None or virtual_batch_size is not None
        path = layers_path(x, axis, fused=fused, special=special)
        flag = read_flag("training", training)
        clips = read_clips(renorm, renorm_clipping)
        old = read_decay("momentum", momentum), read_decay("renorm_momentum", renorm_momentum)
        spec = spec_of(
            x,
            channels,
            axis,
            path,
            epsilon=epsilon,
            center=center,
            scale=scale,
            renorm=renorm,
            virtual_batch_size=virtual_batch_size,
        )
        if adjustment is not None and virtual_batch_size is not None:
            raise InputError("adjustment and virtual_batch_size contradict each other; use one of the two.")
        given = {
            "beta": beta_initializer,
            "gamma": gamma_initializer,
            "moving_mean": moving_mean_initializer,
            "moving_variance": moving_variance_initializer,
        }
        maker = Maker(
            shape=(channels,) if virtual_batch_size is None else _expanded(x, axis, channels),
            dtype=path.dtype,
            trainable=trainable,
            initializers={n: read_initializer(f"{n}_initializer", initializer) for n, initializer in given.items()},
            regularizers={"beta": beta_regularizer, "gamma": gamma_regularizer},
            constraints={"beta": beta_constraint, "gamma": gamma_constraint},
            model=False,
        )
        variables = maker.make(
            center=center,
            scale=scale,
            gamma_first=path.gamma_first,
            renorm=renorm,
            debias=False,
            debias_is_model=False,
        )
        call = Call(
            x=x,
            spec=spec,
            variables=variables,
            training=flag,
            moves=trainable,
            decay=old[0],
            renorm_decay=old[1],
            adjustment=None if flag is False else adjust(adjustment, x),
            clips=clips,
        )
        y, updates = normalize(call, in_place=False)
        for operation in updates:
            tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.UPDATE_OPS, operation)
        remember(Record(current.name, x, y, flag, updates, False, variables))
        return y


def _one_axis(axis: int | Sequence[int]) -> int:
    axes: list[Any] = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    if len(axes) != 1:
        raise InputError(f"axis must be one axis; got {axes!r}. Several channel axes in one layer are not supported.")
    if isinstance(axes[0], bool) or not hasattr(axes[0], "__index__"):
        raise InputError(f"axis must be an integer; got {axes[0]!r}.")
    return int(axes[0])


def _expanded(x: tf.Tensor, axis: int, channels: int) -> tuple[int, ...]:
    """The variables' shape with virtual batches, whose axis comes second: 1 but for the channels."""
    rank = x.shape.rank
    lengths = [1] * (rank + 1)
    lengths[axis % rank + 1] = channels
    return tuple(lengths)
