"""One call, its arguments read: what every path computes y from, beside x, gamma and beta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bnlayer.call import CallPlan, RenormClips
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState


@dataclass(frozen=True, eq=False)
class Call:
    """What was asked.

    Attributes:
        spec: of the layer.
        plan: what follows from the shapes.
        state: before the call.
        weights: as they were given, or None.
        clips: renorm's.
        adjustment: scale and bias, or None.
        replica: of a synchronized call, or None.
    """

    spec: BatchNormSpec
    plan: CallPlan
    state: BatchNormState[tf.Tensor]
    weights: tf.Tensor | None
    clips: RenormClips
    adjustment: tuple[tf.Tensor, tf.Tensor] | None
    replica: tf.distribute.ReplicaContext | None

    @property
    def work(self) -> tf.DType:
        """The dtype of the arithmetic."""
        return tf.as_dtype(self.plan.arithmetic)

    def count(self, x: tf.Tensor) -> Any:
        """Elements of x per channel: an integer where the shape says it, else an int64 scalar."""
        if self.plan.count is not None:
            return self.plan.count
        return tf.reduce_prod(tf.gather(tf.shape(x, tf.int64), self.plan.reduced))
