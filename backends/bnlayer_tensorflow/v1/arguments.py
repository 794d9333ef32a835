"""What both drop-ins check and convert before they touch the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from bnlayer.errors import InputError, UnsupportedError


def refuse_eager(name: str) -> None:
    """These functions collect variables and updates in a graph, which eager code does not have.

    Raises:
        UnsupportedError: TensorFlow executes eagerly, here or around this `tf.function`.
    """
    if tf.compat.v1.executing_eagerly_outside_functions():
        raise UnsupportedError(
            f"v1.{name} builds a graph for tf.compat.v1 sessions, and this code runs eagerly. In eager code use the"
            " Keras layer, bnlayer_keras.BatchNormalization. For a graph, call it inside `with"
            " tf.Graph().as_default():`, or call tf.compat.v1.disable_eager_execution() at the start of the program."
        )


def read_inputs(inputs: Any, axis: int) -> tuple[tf.Tensor, int]:
    """The inputs as a tensor, and its number of channels.

    Raises:
        InputError: its rank or the length of `axis` is unknown, or it has no such axis.
    """
    x = tf.convert_to_tensor(inputs)
    if x.shape.rank is None:
        raise InputError("inputs must have a known rank; give it one with tf.ensure_shape or set_shape.")
    rank = x.shape.rank
    if rank < 2 or not -rank < axis < rank or axis == 0:
        raise InputError(f"inputs must have a batch axis 0 and channels on axis {axis}; got shape {x.shape}.")
    channels = x.shape.as_list()[axis]
    if channels is None:
        raise InputError(f"inputs must have a known number of channels on axis {axis}; got shape {x.shape}.")
    return x, channels


def read_flag(name: str, value: Any) -> bool | tf.Tensor:
    """Whether to train: a Python boolean where that is known, else a boolean scalar tensor.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, (int, np.integer)) and value in (0, 1)):
        return bool(value)
    wanted = f"{name} must be True, False or a boolean scalar tensor, such as a placeholder; got {value!r}."
    if value is None or isinstance(value, (str, bytes, int, float)):
        raise InputError(wanted)
    tensor = tf.convert_to_tensor(value)
    if not (tensor.dtype.is_bool or tensor.dtype.is_integer) or tensor.shape.rank not in (None, 0):
        raise InputError(wanted)
    known = None if isinstance(value, tf.Variable) else tf.get_static_value(tensor)
    return tf.cast(tensor, tf.bool) if known is None else bool(known)


def read_decay(name: str, value: Any) -> float | tf.Tensor:
    """A weight on the old statistics: a Python number in [0, 1], or a real scalar tensor, whose value is not checked.

    Raises:
        InputError: it is neither.
    """
    wanted = f"{name} must be a number in [0, 1] or a scalar tensor; got {value!r}."
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        if not 0 <= value <= 1:
            raise InputError(wanted)
        return float(value)
    if value is None or isinstance(value, (bool, str, bytes)):
        raise InputError(wanted)
    tensor = tf.convert_to_tensor(value)
    if not tensor.dtype.is_floating or tensor.shape.rank not in (None, 0):
        raise InputError(wanted)
    return tensor


def read_clips(renorm: bool, clipping: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`renorm_clipping` in the words of a spec: r_max, r_min and d_max, None for those not given.

    Raises:
        InputError: a key is not rmax, rmin or dmax.
    """
    if not renorm:
        return None
    given = dict(clipping or {})
    refuse_unknown("renorm_clipping", given, ("rmax", "rmin", "dmax"))
    return {"r_max": given.get("rmax"), "r_min": given.get("rmin"), "d_max": given.get("dmax")}


def read_weights(weights: Any, x: tf.Tensor) -> tf.Tensor | None:
    """`batch_weights`, one for each example, checked when the graph runs.

    Raises:
        InputError: they have another shape.
    """
    if weights is None:
        return None
    given = tf.convert_to_tensor(weights)
    if not given.shape.is_compatible_with(x.shape[:1]):
        raise InputError(f"batch_weights must have shape {x.shape[:1]}; got {given.shape}.")
    if given.dtype.is_bool:
        return given
    good = tf.reduce_all(
        (given >= 0) & (given < given.dtype.max if given.dtype.is_integer else tf.math.is_finite(given))
    )
    # In a graph an assertion runs only where something depends on it.
    with tf.control_dependencies(
        [tf.debugging.Assert(good, ["batch_weights must be finite and not negative; got", given])]
    ):
        return tf.ensure_shape(tf.identity(given), x.shape[:1])


def read_initializer(name: str, given: Any) -> Any:
    """An initializer for `get_variable`; Keras's short names stand for TensorFlow's initializers.

    Raises:
        InputError: there is no initializer of this name.
    """
    if not isinstance(given, str):
        return given() if isinstance(given, type) else given
    found = getattr(tf.compat.v1, f"{given}_initializer", None)
    if found is None:
        raise InputError(f"{name} names no initializer of TensorFlow: {given!r}. Give the initializer itself.")
    return found()


def refuse_unknown(name: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    """Refuse keys that would do nothing.

    Raises:
        InputError: with the unknown keys and the known ones.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"{name} has no {', '.join(map(repr, unknown))}; its keys are {', '.join(known)}.")


def adjust(adjustment: Callable[[tf.Tensor], Any] | None, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor] | None:
    """The pair (scale, bias) that the callable gives for x's dynamic shape, in the dtype of the arithmetic.

    Raises:
        InputError: it gives no pair.
    """
    if adjustment is None:
        return None
    pair = adjustment(tf.shape(x))
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(f"adjustment must return a pair (scale, bias); got {pair!r}.")
    work = tf.float64 if x.dtype == tf.float64 else tf.float32
    scale, bias = (tf.cast(tf.convert_to_tensor(part), work) for part in pair)
    return scale, bias
