"""`BatchNorm`: a `tf.Module` over `batch_norm` that keeps its state in variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from bnlayer.call import trains
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_names

from .function import batch_norm
from .support import MISSING


class BatchNorm(tf.Module):
    """Batch normalization that keeps its own state.

        layer = BatchNorm(BatchNormSpec(3))
        y = layer(x, training=True)

    A call assigns the new statistics at once, also inside a `tf.function`; gamma and beta are trainable variables,
    the rest are not. Built in `strategy.scope()` it trains in `strategy.run`: see `batch_norm` on `spec.synchronized`.

    Attributes:
        spec: what the layer is.
        gamma, beta: variables of shape (C,) and `param_dtype`, or None.
        moving_mean, moving_variance: variables of shape (C,) and `stats_dtype`, or None.
        hidden_mean, hidden_variance: likewise, with `zero_debias`.
        renorm_mean, renorm_stddev, moving_stddev: likewise, with `renorm`.
        num_updates: int64 scalar variable.
        frozen_statistics: True: the moving statistics normalize and stay as they are, in training too. Read when a
            `tf.function` is traced, as every Python attribute is.

    Raises:
        UnsupportedError: the spec asks for what this backend lacks.
        StateError: the state does not fit the spec.
    """

    def __init__(
        self, spec: BatchNormSpec, state: BatchNormState[Any] | None = None, *, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        MISSING.refuse("tensorflow", spec)
        self.spec = spec
        self.frozen_statistics = False
        start = BatchNormState.initial(spec) if state is None else state.checked(spec)
        aggregation = _aggregation(spec)
        with self.name_scope:
            self.gamma = _parameter("gamma", start.gamma)
            self.beta = _parameter("beta", start.beta)
            self.moving_mean = _statistic("moving_mean", start.moving_mean, aggregation)
            self.moving_variance = _statistic("moving_variance", start.moving_variance, aggregation)
            self.hidden_mean = _statistic("hidden_mean", start.hidden_mean, aggregation)
            self.hidden_variance = _statistic("hidden_variance", start.hidden_variance, aggregation)
            self.renorm_mean = _statistic("renorm_mean", start.renorm_mean, aggregation)
            self.renorm_stddev = _statistic("renorm_stddev", start.renorm_stddev, aggregation)
            self.moving_stddev = _statistic("moving_stddev", start.moving_stddev, aggregation)
            # One step is one update, on however many replicas it ran.
            counter = np.asarray(start.num_updates, np.int64)
            self.num_updates = _statistic("num_updates", counter, tf.VariableAggregation.ONLY_FIRST_REPLICA)

    def __call__(
        self,
        x: tf.Tensor,
        *,
        training: bool,
        weights: tf.Tensor | None = None,
        update_stats: bool = True,
        adjustment: tuple[Any, Any] | None = None,
        renorm_clips: Mapping[str, Any] | None = None,
        decay: Any = None,
    ) -> tf.Tensor:
        """Normalize x; see `bnlayer_tensorflow.batch_norm`."""
        before = self.state
        y, after = batch_norm(
            x,
            before,
            self.spec,
            training=trains(self.spec, training, self.frozen_statistics),
            weights=weights,
            update_stats=update_stats,
            adjustment=adjustment,
            renorm_clips=renorm_clips,
            decay=decay,
        )
        if after is not before:
            for name, array in after.arrays().items():
                if name not in ("gamma", "beta"):
                    getattr(self, name).assign(array)
            self.num_updates.assign(after.num_updates)
        return y

    @property
    def state(self) -> BatchNormState[Any]:
        """The layer's variables, themselves and not copies of them."""
        arrays = {name: getattr(self, name) for name in array_names(self.spec)}
        return BatchNormState(**arrays, num_updates=self.num_updates)

    def load(self, state: BatchNormState[Any]) -> None:
        """Assign a numpy state.

        Raises:
            StateError: the state does not fit the spec.
        """
        new = state.checked(self.spec)
        for name, array in new.arrays().items():
            getattr(self, name).assign(array)
        self.num_updates.assign(new.num_updates)


def _parameter(name: str, value: Any) -> Any:
    return None if value is None else tf.Variable(value, trainable=True, name=name)


def _statistic(name: str, value: Any, aggregation: tf.VariableAggregation) -> Any:
    """A variable of which, under a strategy, each replica updates its own copy.

    ON_READ, because ON_WRITE would send every new value around: a collective for each variable and step, where the one
    that merged the batches' statistics has said everything. All replicas compute the new values from the same numbers
    by the same operations, so their copies stay the same. Without a strategy neither setting does anything.
    """
    if value is None:
        return None
    read = tf.VariableSynchronization.ON_READ
    return tf.Variable(value, trainable=False, name=name, synchronization=read, aggregation=aggregation)


def _aggregation(spec: BatchNormSpec) -> tf.VariableAggregation:
    """How the replicas' copies are one value outside of `strategy.run`, where it is saved or evaluated.

    Equal copies are any one of them; their mean would round. Of a layer that is not synchronized each replica has its
    own statistics, and Keras's layer takes their mean.
    """
    return tf.VariableAggregation.ONLY_FIRST_REPLICA if spec.synchronized else tf.VariableAggregation.MEAN
