"""By which way one call is computed: the kernel, closed forms over sums, or plain operations."""

from __future__ import annotations

from typing import Final

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # nothing public tells that a trace is for XLA

from bnlayer.paths import Paths

from .call import Call
from .ghosts import Ghosts, ghosts_of
from .kernel import on_cuda

PATHS = Paths("fused", "sums", "composite")

# Elements of a batch from which the kernel is faster than sums by matrix products (measured on 2 cores, float32: at
# 32,768 it takes 1.5 times as long, at 131,072 .7 times), and of a ghost batch than plain operations (at 8,192 up to 3
# times as long, at 32,768 .6 to 1.1 times, at 65,536 .8 times). Of an unknown number, many are assumed.
_WORTH_A_KERNEL: Final = 2**16
_CUDNN_EPSILON: Final = 1e-5  # cuDNN raises what is less


def path_of(x: tf.Tensor, call: Call) -> str:
    """The name in `PATHS` of what computes this call."""
    plan = call.plan
    ghosts = ghosts_of(x, plan, call.spec)
    able = _able(x, call, ghosts)
    size = plan.count and plan.count * call.spec.num_features
    order: tuple[str, ...] = ("fused", "sums", "composite")
    if size is not None and size < _WORTH_A_KERNEL * (1 if ghosts is None else ghosts.number):
        order = ("sums", "fused", "composite") if ghosts is None else ("composite", "fused")
    return PATHS.chosen(next(name for name in order if name in able), able)


def _able(x: tf.Tensor, call: Call, ghosts: Ghosts | None) -> tuple[str, ...]:
    plan = call.plan
    if not _pays() or call.replica is not None or call.adjustment is not None or plan.count == 0:
        return ("composite",)
    kernel = plan.axis == len(plan.channel_shape) - 1 and x.dtype != tf.float64
    honored = _least_epsilon() <= call.spec.epsilon <= np.finfo(np.float32).max
    if ghosts is not None:
        takes = kernel and honored and ghosts.even and call.weights is None and not call.spec.renorm
        return ("fused", "composite") if takes else ("composite",)
    if call.weights is not None:
        takes = kernel and not (plan.batch_statistics and call.spec.renorm)
        return ("fused", "composite") if takes else ("composite",)
    if not plan.batch_statistics:
        return ("fused", "sums", "composite") if kernel else ("sums", "composite")
    others = ("composite",) if call.spec.renorm else ("sums", "composite")
    # What the kernel's gradient needs of the statistics is cuDNN's own matter, where it is cuDNN's kernel.
    return ("fused", *others) if kernel and honored and not (call.spec.renorm and on_cuda()) else others


def _pays() -> bool:
    """Whether anything but plain operations does.

    XLA makes few loops of them by itself, and its own batch norm is no choice: its variance is E[x^2] - E[x]^2. In
    graphs of TensorFlow 1, loops and conditions do not let a custom gradient see what it needs.
    """
    if tf.executing_eagerly():
        return True
    if not tf.compat.v1.executing_eagerly_outside_functions():
        return False
    return not control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _least_epsilon() -> float:
    """Of those that the kernel honors wherever it may be placed."""
    return _CUDNN_EPSILON if on_cuda() else 0.0
