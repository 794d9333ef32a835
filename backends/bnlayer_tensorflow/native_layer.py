"""`tf.compat.v1.nn.fused_batch_norm` as a layer: the function, and the state that its caller has to keep."""

from __future__ import annotations

import tensorflow as tf

from bnlayer.contract import NDArray
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_names

_FORMATS = {(4, False): "NCHW", (4, True): "NHWC", (5, False): "NCDHW", (5, True): "NDHWC"}


class FusedBatchNorm:
    """A spec and a state, called with the function's own arguments and nothing added.

    Attributes:
        spec: with float32 parameters and statistics.
        device: where it is, or None for TensorFlow's choice.
        gamma, beta: variables of shape (C,), or None.
        moving_mean, moving_variance: tensors of shape (C,) that a call replaces, or None.
    """

    def __init__(self, spec: BatchNormSpec, state: BatchNormState[NDArray], device: str | None = None) -> None:
        self.spec = spec
        self.device = device
        self.load(state)

    def load(self, state: BatchNormState[NDArray]) -> None:
        """Take over a state that fits the spec; what it has counted is lost."""
        with tf.device(self.device):
            self.gamma = None if state.gamma is None else tf.Variable(tf.constant(state.gamma))
            self.beta = None if state.beta is None else tf.Variable(tf.constant(state.beta))
            self.moving_mean = None if state.moving_mean is None else tf.constant(state.moving_mean)
            self.moving_variance = None if state.moving_variance is None else tf.constant(state.moving_variance)

    @property
    def parameters(self) -> dict[str, tf.Variable]:
        """gamma and beta, where they are."""
        return {n: v for n, v in (("gamma", self.gamma), ("beta", self.beta)) if v is not None}

    @property
    def state(self) -> BatchNormState[NDArray]:
        """A copy, without a counter."""
        arrays = {name: tf.convert_to_tensor(getattr(self, name)).numpy().copy() for name in array_names(self.spec)}
        return BatchNormState(**arrays, num_updates=None)

    def __call__(self, x: tf.Tensor, *, training: bool, update_stats: bool) -> tf.Tensor:
        """y; in training the moving statistics become what the function returns beside it.

        Raises:
            tf.errors.OpError, ValueError: the kernel refuses x.
        """
        spec = self.spec
        factor = 1.0 - float(spec.decay) if spec.track_moving_stats else 1.0
        # So the function asks for it: with a factor of 1 there is nothing to average with.
        averages = not training or factor != 1.0
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            x,
            tf.ones(spec.num_features) if self.gamma is None else self.gamma,
            tf.zeros(spec.num_features) if self.beta is None else self.beta,
            mean=self.moving_mean if averages else None,
            variance=self.moving_variance if averages else None,
            epsilon=spec.epsilon,
            data_format=_FORMATS[x.shape.rank, spec.axis != 1],
            is_training=training,
            exponential_avg_factor=factor,
        )
        if training and update_stats and spec.track_moving_stats:
            self.moving_mean, self.moving_variance = mean, variance
        return y
