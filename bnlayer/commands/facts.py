"""What people should know of each framework's batch norm beyond its arguments, for `bnlayer explain`.

Measured on the CPU with torch 2.13, Keras 3.15, tf-keras and TensorFlow 2.21, tf-slim 1.1, Flax 0.12.8, Haiku 0.0.17,
Equinox 0.13.8, and ONNX 1.23 with its reference evaluator and ONNX Runtime 1.31.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Final


@dataclass(frozen=True)
class Facts:
    """One framework's behavior, a phrase each.

    Attributes:
        library: whose layer it is.
        weight_on: what momentum (or decay) is the weight of.
        estimator: which variance enters the moving variance.
        untrained_eval: what eval gives before any training.
        bare_call: what a call without a mode flag does.
        frozen: how statistics are frozen, and what that does.
        half_output: y's dtype for float16 input.
        variance: how the batch variance is computed; E[x^2] - E[x]^2 loses it where the mean is large.
        arrays: the names of gamma, beta, moving mean, moving variance, and of what else is kept.
        single_value: training with one value per channel.
        empty_batch: training on an empty batch.
    """

    _: KW_ONLY
    library: str
    weight_on: str
    estimator: str
    untrained_eval: str
    bare_call: str
    frozen: str
    half_output: str
    variance: str
    arrays: str
    single_value: str
    empty_batch: str


_FROM_UNIT: Final = "x / sqrt(1 + epsilon)"
_ZERO: Final = "normalizes to 0; variance 0 enters the average"
_POISONED: Final = "statistics become NaN, without an error"
_TWO_PASS: Final = "two-pass"
_UPDATE_OPS: Final = "statistics move only where UPDATE_OPS are run"

FACTS: Final[dict[str, Facts]] = {
    "torch": Facts(
        library="PyTorch",
        weight_on="the NEW batch: decay = 1 - momentum; None is a cumulative average",
        estimator="unbiased",
        untrained_eval=_FROM_UNIT,
        bare_call="trains, until .eval()",
        frozen="by .eval() only: with requires_grad=False or under no_grad the statistics still move",
        half_output="float16, from float32 parameters",
        variance=_TWO_PASS,
        arrays="weight, bias, running_mean, running_var, num_batches_tracked",
        single_value="raises ValueError",
        empty_batch="statistics stay as they are",
    ),
    "keras": Facts(
        library="Keras 3",
        weight_on="the OLD average: decay = momentum",
        estimator="biased",
        untrained_eval=_FROM_UNIT,
        bare_call="infers (training=False)",
        frozen="trainable=False: infers and moves nothing, even with training=True",
        half_output="the policy's: float32 by default, float16 under float16 and mixed_float16",
        variance="two-pass on TensorFlow and JAX; E[x^2] - E[x]^2, not clamped, on torch and NumPy",
        arrays="gamma, beta, moving_mean, moving_variance",
        single_value=_ZERO,
        empty_batch=_POISONED,
    ),
    "tf_keras": Facts(
        library="Keras 2 (tf-keras)",
        weight_on="the OLD average: decay = momentum",
        estimator="unbiased at rank 4 and 5 with channels first or last (fused kernel), else biased",
        untrained_eval=_FROM_UNIT,
        bare_call="follows the learning phase (training=None)",
        frozen="trainable=False: infers and moves nothing, even with training=True",
        half_output="float32 by default: inputs are cast",
        variance=_TWO_PASS,
        arrays="gamma, beta, moving_mean, moving_variance",
        single_value=_ZERO,
        empty_batch=_POISONED,
    ),
    "tf_layers": Facts(
        library="TensorFlow 1 (tf.compat.v1)",
        weight_on="the OLD average: decay = momentum",
        estimator="unbiased at rank 4 and 5 with channels first or last (fused kernel), else biased",
        untrained_eval=_FROM_UNIT,
        bare_call="infers (training=False)",
        frozen="trainable=False: still normalizes with the batch, moves nothing",
        half_output="float16, from float32 parameters",
        variance=_TWO_PASS,
        arrays=f"gamma, beta, moving_mean, moving_variance; {_UPDATE_OPS}",
        single_value=_ZERO,
        empty_batch=_POISONED,
    ),
    "contrib": Facts(
        library="TensorFlow 1 (tf.contrib, tf-slim)",
        weight_on="the OLD average",
        estimator="unbiased at rank 2, 4 and 5 (fused kernel), biased at rank 3 and with fused=False",
        untrained_eval=_FROM_UNIT,
        bare_call="trains (is_training=True)",
        frozen="trainable=False: still normalizes with the batch; moves its statistics at rank 2, nothing at 3 to 5",
        half_output="float16, from float32 parameters",
        variance=_TWO_PASS,
        arrays=f"gamma (not by default), beta, moving_mean, moving_variance; {_UPDATE_OPS}",
        single_value=_ZERO,
        empty_batch=_POISONED,
    ),
    "flax": Facts(
        library="Flax (linen and nnx)",
        weight_on="the OLD average: decay = momentum",
        estimator="biased",
        untrained_eval=_FROM_UNIT,
        bare_call="linen: an error, it needs use_running_average; nnx: trains, until .eval()",
        frozen="use_running_average=True, or nnx's .eval()",
        half_output="float32, promoted with the parameters",
        variance="E[x^2] - E[x]^2, clamped at 0; two-pass with use_fast_variance=False",
        arrays="scale, bias, mean, var",
        single_value=_ZERO,
        empty_batch=_POISONED,
    ),
    "haiku": Facts(
        library="Haiku",
        weight_on="the OLD average, which is divided by 1 - decay**t",
        estimator="biased",
        untrained_eval="x / sqrt(epsilon): 316 x at 1e-5, the averages start at 0",
        bare_call="an error: is_training is required",
        frozen="is_training=False; test_local_stats=True normalizes with the batch and moves nothing",
        half_output="float16, and so are the parameters and statistics",
        variance="E[x^2] - E[x]^2, not clamped: NaN where it rounds below -epsilon",
        arrays="scale, offset, mean_ema/average, var_ema/average; each with counter and hidden",
        single_value=_ZERO,
        empty_batch=_POISONED,
    ),
    "equinox": Facts(
        library="Equinox",
        weight_on="the OLD average, which is divided by 1 - decay**t",
        estimator="biased; too large by d**t / (1 - d**t), as its hidden variance starts at 1",
        untrained_eval=_FROM_UNIT,
        bare_call="trains (inference=False)",
        frozen="inference_mode()",
        half_output="float32, promoted with the parameters",
        variance=_TWO_PASS,
        arrays="weight, bias; counter, hidden mean and hidden variance in the State, unnamed",
        single_value=_ZERO,
        empty_batch=_POISONED,
    ),
    "onnx": Facts(
        library="ONNX",
        weight_on="the OLD average: decay = momentum",
        estimator="biased",
        untrained_eval="by its inputs: a node has no statistics of its own",
        bare_call="infers (training_mode=0)",
        frozen="training_mode=0",
        half_output="float16",
        variance=_TWO_PASS,
        arrays="scale, B, input_mean, input_var",
        single_value=_ZERO,
        empty_batch=_POISONED,
    ),
}
