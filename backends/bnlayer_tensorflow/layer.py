"""`BatchNorm`: a `tf.Module` over `batch_norm` that keeps its state in variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    the rest are not.

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
        with self.name_scope:
            self.gamma = _variable("gamma", start.gamma, trainable=True)
            self.beta = _variable("beta", start.beta, trainable=True)
            self.moving_mean = _variable("moving_mean", start.moving_mean)
            self.moving_variance = _variable("moving_variance", start.moving_variance)
            self.hidden_mean = _variable("hidden_mean", start.hidden_mean)
            self.hidden_variance = _variable("hidden_variance", start.hidden_variance)
            self.renorm_mean = _variable("renorm_mean", start.renorm_mean)
            self.renorm_stddev = _variable("renorm_stddev", start.renorm_stddev)
            self.moving_stddev = _variable("moving_stddev", start.moving_stddev)
            self.num_updates = tf.Variable(start.num_updates, trainable=False, dtype=tf.int64, name="num_updates")

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


def _variable(name: str, value: Any, *, trainable: bool = False) -> Any:
    return None if value is None else tf.Variable(value, trainable=trainable, name=name)
