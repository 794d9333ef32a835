"""`BatchNormalization`: a Keras layer over the function `batch_norm` of the framework that Keras runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnlayer.call import plan_call, trains
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import BatchNormSpec, Estimator, NonFinite, SingleValue
from bnlayer.state import BatchNormState, array_names, needs_counter

from . import runtime
from .support import MISSING

if TYPE_CHECKING:
    import keras
else:
    keras = runtime.load_keras()  # and not a bare import, which takes TensorFlow even where it is not installed

# The keywords that keras.layers.BatchNormalization does not have, with what they are where nobody gives them.
_EXTRAS: dict[str, Any] = {
    "cumulative": False,
    "moving_variance_estimator": "biased",
    "single_value": "allow",
    "nonfinite": "propagate",
    "track_moving_stats": True,
    "frozen_statistics": False,
    "param_dtype": None,
    "stats_dtype": None,
}


@dataclass(eq=False)
class _OutOfSight:
    """Holds a variable. Keras makes a weight of every variable in a layer's attributes; into this it does not look."""

    variable: Any = None


@keras.saving.register_keras_serializable(package="bnlayer")
class BatchNormalization(keras.layers.Layer):
    """Batch normalization with the arguments and defaults of `keras.layers.BatchNormalization`, and the same weights.

    The attributes are the truth: `layer.momentum = 0.9` works, and `layer.spec` is computed from them.

    Args:
        axis: the channel axis, one integer.
        momentum: weight on the OLD statistics.
        epsilon: added to the variance.
        center, scale: whether beta, gamma exist.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: as in Keras.
        beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as in Keras.
        renorm, renorm_clipping, renorm_momentum, synchronized: taken for the sake of existing configs; refused when
            switched on.
        cumulative: the plain average of all updates in place of `momentum`.
        moving_variance_estimator, single_value, nonfinite, track_moving_stats: see `bnlayer.BatchNormSpec`.
        frozen_statistics: the moving statistics normalize and stay as they are, in training too.
        param_dtype, stats_dtype: of gamma and beta, and of the moving statistics; None for the dtype policy's.
        **kwargs: the base layer's, such as `name`, `dtype` and `trainable`; `trainable=False` means inference without
            an update, as in Keras. With `autocast=False` y has the input's dtype whatever the policy says.

    Call arguments:
        inputs: float tensor of rank 2 or more.
        training: batch statistics if True.
        mask: boolean; positions to leave out of the statistics. Its shape follows the rule for `weights`.
        weights: example weights of shape (N,), the inputs' shape without the channel axis, or with 1 on it; with a
            mask they count where it is True. Keras passes a mask on by itself only where no weights are given, and
            casts weights to the compute dtype as every other float argument.
        update_stats: False: batch statistics normalize, but do not enter the moving ones.

    Raises:
        SpecError: an argument is out of range, or two contradict each other.
        UnsupportedError: an argument asks for what this backend lacks.
        InputError: a call's inputs, mask or weights do not fit.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        cumulative: bool = False,
        moving_variance_estimator: Estimator = "biased",
        single_value: SingleValue = "allow",
        nonfinite: NonFinite = "propagate",
        track_moving_stats: bool = True,
        frozen_statistics: bool = False,
        param_dtype: str | None = None,
        stats_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if renorm:
            raise UnsupportedError(f"backend 'keras' does not support renorm: {MISSING.fields['renorm']}.")
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.beta_initializer = keras.initializers.get(beta_initializer)
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.moving_mean_initializer = keras.initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = keras.initializers.get(moving_variance_initializer)
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.synchronized = synchronized
        self.cumulative = cumulative
        self.moving_variance_estimator: Estimator = moving_variance_estimator
        self.single_value: SingleValue = single_value
        self.nonfinite: NonFinite = nonfinite
        self.track_moving_stats = track_moving_stats
        self.frozen_statistics = frozen_statistics
        self.param_dtype = param_dtype
        self.stats_dtype = stats_dtype
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None
        self._counter = _OutOfSight()
        MISSING.refuse("keras", self._spec(1))  # the arguments are checked before there is an input

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the variables for inputs of this shape."""
        rank = len(input_shape)
        channels = input_shape[self.axis] if -rank <= self.axis < rank else None
        if channels is None:
            raise InputError(f"axis {self.axis} must be a known length of the inputs; got shape {tuple(input_shape)}.")
        self._num_features = int(channels)
        spec = self._spec(self._num_features)
        for name in array_names(spec):
            learns = name in ("gamma", "beta")
            of_parameter = {
                "regularizer": getattr(self, f"{name}_regularizer"),
                "constraint": getattr(self, f"{name}_constraint"),
            } if learns else {}  # fmt: skip
            variable = self.add_weight(
                name=name,
                shape=(spec.num_features,),
                initializer=getattr(self, f"{name}_initializer"),
                dtype=spec.param_dtype if learns else spec.stats_dtype,
                trainable=learns,
                autocast=False,
                **of_parameter,
            )
            if keras.backend.standardize_dtype(variable.value.dtype) != variable.dtype:
                raise UnsupportedError(
                    f"{name} should be {variable.dtype}, which JAX has only under x64. Set"
                    " jax.config.update('jax_enable_x64', True) before the layer is built, or use float32."
                )
            setattr(self, name, variable)
        self._build_counter(spec)

    def _build_counter(self, spec: BatchNormSpec) -> None:
        # Where the averages depend on the counter, it has to be saved: a weight. Elsewhere it only counts, and a fifth
        # weight would end the exchange of weights with keras.layers.BatchNormalization. Then it is state of the kind
        # that a random seed is: among `variables`, which compiled training carries on JAX, but not among `weights`.
        options: dict[str, Any] = {"shape": (), "initializer": "zeros", "dtype": runtime.current().counter_dtype(),
                                   "trainable": False, "autocast": False, "name": "num_updates",
                                   "aggregation": "only_first_replica"}  # fmt: skip
        if needs_counter(spec):
            self._counter.variable = self.add_weight(**options)
        else:
            options["initializer"] = keras.initializers.get("zeros")
            self._counter.variable = keras.Variable(**options)

    @property
    def num_updates(self) -> Any:
        """The variable that counts the updates of the moving statistics: an integer scalar; None before `build`."""
        return self._counter.variable

    @property
    def variables(self) -> list[Any]:
        """All state of the layer: `weights`, and the counter where it is none of them."""
        known = super().variables
        counter = self._counter.variable
        return known if counter is None or any(v is counter for v in known) else [*known, counter]

    @property
    def spec(self) -> BatchNormSpec:
        """What the layer is, as its attributes say now.

        Raises:
            InputError: the layer is not built, so that its number of channels is not known.
        """
        if self._counter.variable is None:
            raise InputError("spec needs the number of channels; call or build the layer first.")
        return self._spec(self._num_features)

    @property
    def state(self) -> BatchNormState[Any]:
        """The current values of the layer's variables, as tensors of the framework that Keras runs on."""
        arrays = {name: getattr(self, name).value for name in array_names(self.spec)}
        return BatchNormState(**arrays, num_updates=self.num_updates.value)

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        weights: Any = None,
        update_stats: bool = True,
    ) -> Any:
        """Normalize the inputs; see the class."""
        spec, before = self.spec, self.state
        y, after = runtime.current().batch_norm(
            inputs,
            before,
            spec,
            training=trains(spec, bool(training) and self.trainable, self.frozen_statistics),
            weights=_weights(mask, weights),
            update_stats=update_stats,
        )
        if after is not before:
            self.moving_mean.assign(after.moving_mean)
            self.moving_variance.assign(after.moving_variance)
            self.num_updates.assign(after.num_updates)
        return y

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The inputs' shape."""
        return input_shape

    def compute_output_spec(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        weights: Any = None,
        update_stats: bool = True,
    ) -> Any:
        """The inputs' shape and dtype, checked against the layer while a model is put together."""
        counting = _weights_shape(mask, weights)
        plan_call(self.spec, inputs.shape, inputs.dtype, training=False, weights_shape=counting)
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of this layer; those that Keras's layer lacks only where they are not at their default."""
        config = {
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "synchronized": self.synchronized,
        }
        for name in ("beta", "gamma", "moving_mean", "moving_variance"):
            config[f"{name}_initializer"] = keras.initializers.serialize(getattr(self, f"{name}_initializer"))
        for name in ("beta", "gamma"):
            config[f"{name}_regularizer"] = keras.regularizers.serialize(getattr(self, f"{name}_regularizer"))
            config[f"{name}_constraint"] = keras.constraints.serialize(getattr(self, f"{name}_constraint"))
        extras = {name: getattr(self, name) for name, default in _EXTRAS.items() if getattr(self, name) != default}
        return {**super().get_config(), **config, **extras}

    def _spec(self, num_features: int) -> BatchNormSpec:
        return BatchNormSpec(
            num_features,
            axis=self.axis,
            epsilon=self.epsilon,
            decay="cumulative" if self.cumulative else self.momentum,
            center=self.center,
            scale=self.scale,
            moving_variance_estimator=self.moving_variance_estimator,
            track_moving_stats=self.track_moving_stats,
            single_value=self.single_value,
            nonfinite=self.nonfinite,
            synchronized=self.synchronized,
            param_dtype=self.param_dtype or self.variable_dtype,
            stats_dtype=self.stats_dtype or self.variable_dtype,
        )


def _weights(mask: Any, weights: Any) -> Any:
    """Mask and weights as one."""
    if mask is None or weights is None:
        return weights if mask is None else mask
    while len(weights.shape) < len(mask.shape):  # (N,) always means the batch axis
        weights = keras.ops.expand_dims(weights, -1)
    if len(weights.shape) != len(mask.shape):
        raise InputError(f"weights must have the mask's rank or be (N,); got {weights.shape} with mask {mask.shape}.")
    return keras.ops.where(mask, weights, keras.ops.zeros_like(weights))


def _weights_shape(mask: Any, weights: Any) -> tuple[int | None, ...] | None:
    given = weights if mask is None else mask
    return None if given is None else tuple(given.shape)
