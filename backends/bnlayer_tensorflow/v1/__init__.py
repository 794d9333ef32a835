"""TensorFlow 1's batch normalization functions, for graphs and sessions on today's TensorFlow.

`batch_norm` is `tf.contrib.layers.batch_norm` and `batch_normalization` is `tf.layers.batch_normalization`: the same
arguments, variable names, collections and checkpoint names, without tf-slim and tf-keras. docs/tensorflow1.md says
where they differ from the originals. The `check_` functions turn the classic mistakes into messages.
"""

from __future__ import annotations

from ..check import (
    BatchNormUsageError,
    BatchNormUsageWarning,
    check_eval,
    check_saver,
    check_statistics,
    check_update_ops,
)
from .batch_norm import batch_norm
from .batch_normalization import batch_normalization

__all__ = [
    "BatchNormUsageError",
    "BatchNormUsageWarning",
    "batch_norm",
    "batch_normalization",
    "check_eval",
    "check_saver",
    "check_statistics",
    "check_update_ops",
]
