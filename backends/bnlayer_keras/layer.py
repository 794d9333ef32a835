"""`BatchNormalization`: a Keras layer over the function `batch_norm` of the framework that Keras runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnlayer.call import plan_call, trains
from bnlayer.errors import InputError, SpecError, StateError, UnsupportedError
from bnlayer.spec import (
    FLOAT_DTYPES,
    BatchNormSpec,
    Estimator,
    GhostLayout,
    NonFinite,
    Renorm,
    SingleValue,
    ZeroDebias,
)
from bnlayer.state import BatchNormState, array_names, needs_counter

from . import masks, runtime
from .support import MISSING

if TYPE_CHECKING:
    import keras
else:
    keras = runtime.load_keras()  # and not a bare import, which takes TensorFlow even where it is not installed

# The keywords that keras.layers.BatchNormalization lacks, with what they are where nobody gives them.
EXTRAS: dict[str, Any] = {
    "virtual_batch_size": None,
    "virtual_batch_layout": "strided",
    "zero_debias": "none",
    "cumulative": False,
    "moving_variance_estimator": "biased",
    "single_value": "allow",
    "nonfinite": "propagate",
    "track_moving_stats": True,
    "frozen_statistics": False,
    "param_dtype": None,
    "stats_dtype": None,
}
# Weights are saved and exchanged by their position: first Keras's own, in its order.
_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev",
            "hidden_mean", "hidden_variance")  # fmt: skip
_COUNTER = "num_updates.txt"  # beside the weights, in the archive that `model.save` writes
CLIPS = {"rmax": "r_max", "rmin": "r_min", "dmax": "d_max"}  # Keras's names and the spec's


@dataclass(eq=False)
class _OutOfSight:
    """Holds a variable. Keras makes a weight of every variable in a layer's attributes; into this it does not look."""

    variable: Any = None


@keras.saving.register_keras_serializable(package="bnlayer")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization with the arguments and defaults of `keras.layers.BatchNormalization`, and the same weights.

    It is a subclass for the sake of code that asks `isinstance(layer, keras.layers.BatchNormalization)`, to freeze such
    layers for instance; it uses nothing of what that class computes. The attributes are the truth:
    `layer.momentum = 0.9` works, and `layer.spec` is computed from them. Where a model is saved as `.keras`, the file
    has the counter too; files of weights have it only where the averages depend on it.

    Args:
        axis: the channel axis, one integer, and not the batch axis; a list of one, as Keras 2 wrote it, is that one.
        momentum: weight on the OLD statistics.
        epsilon: added to the variance.
        center, scale: whether beta, gamma exist.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: as in Keras.
        beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as in Keras.
        renorm: batch renormalization, with the three weights that it has in Keras.
        renorm_clipping: "rmax", "rmin" and "dmax" to numbers; None, or a missing key, is no clip.
        renorm_momentum: weight on the OLD renorm averages.
        synchronized: batch statistics over all replicas: those of `tf.distribute` on TensorFlow and of
            torch.distributed's default group on PyTorch, unless there is none. On JAX Keras's arrays are global, and so
            are the statistics whether this is set or not.
        virtual_batch_size: rows of a ghost batch, each normalized by its own statistics in training; None for none.
        virtual_batch_layout, zero_debias: see `bnlayer.BatchNormSpec`. zero_debias adds its hidden averages and the
            counter to the weights.
        adjustment: a function of the inputs' shape that returns the pair (scale, bias) for the normalized values, each
            broadcastable to the inputs; called in training only. A function is no config: `get_config`, and so saving
            the model, is refused while there is one. Save its weights, or give `adjustment` in the call.
        cumulative: the plain average of all updates in place of `momentum`.
        moving_variance_estimator, single_value, nonfinite, track_moving_stats: see `bnlayer.BatchNormSpec`.
        frozen_statistics: the moving statistics normalize and stay as they are, in training too.
        param_dtype, stats_dtype: of gamma and beta, and of the moving statistics; None for the dtype policy's.
        **kwargs: the base layer's, such as `name`, `dtype` and `trainable`; `trainable=False` means inference without
            an update, as in Keras. y has the policy's compute dtype, and with `autocast=False` the input's.

    Call arguments:
        inputs: tensor of rank 2 or more, float; integers and booleans are cast to the compute dtype, as in Keras, and
            refused with `autocast=False`.
        training: batch statistics if True.
        mask: False at positions to leave out of the statistics. Its shape follows the rule for `weights`; see
            `bnlayer_keras.masks` for a mask that Keras hands on to a layer whose channel axis is not the last.
        weights: example weights of shape (N,), the inputs' shape without the channel axis, or with 1 on it; with a
            mask they count where it is True. Keras passes a mask on by itself only where no weights are given, and
            casts weights to the compute dtype as every other float argument.
        update_stats: False: batch statistics normalize, but do not enter the moving ones.
        adjustment: a pair (scale, bias), in place of what the layer's function would return; Keras takes a pair of
            arrays or a pair of numbers, and casts arrays to the compute dtype.
        renorm_clips: "r_max", "r_min" or "d_max" to what holds in place of `renorm_clipping` in this call.

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
        virtual_batch_size: int | None = None,
        virtual_batch_layout: GhostLayout = "strided",
        zero_debias: ZeroDebias = "none",
        adjustment: Callable[[tuple[Any, ...]], tuple[Any, Any]] | None = None,
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
        super(keras.layers.BatchNormalization, self).__init__(**kwargs)
        self.axis = _python(axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis)
        self.momentum = _python(momentum)
        self.epsilon = _python(epsilon)
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
        self.renorm = renorm
        self.renorm_clipping = renorm_clipping
        self.renorm_momentum = renorm_momentum
        self.synchronized = synchronized
        self.virtual_batch_size = virtual_batch_size
        self.virtual_batch_layout: GhostLayout = virtual_batch_layout
        self.zero_debias: ZeroDebias = zero_debias
        self.adjustment = adjustment
        self.cumulative = cumulative
        self.moving_variance_estimator: Estimator = moving_variance_estimator
        self.single_value: SingleValue = single_value
        self.nonfinite: NonFinite = nonfinite
        self.track_moving_stats = track_moving_stats
        self.frozen_statistics = frozen_statistics
        self.param_dtype = param_dtype
        self.stats_dtype = stats_dtype
        self.supports_masking = True
        for name in _WEIGHTS:
            setattr(self, name, None)
        self._counter = _OutOfSight()
        MISSING.refuse("keras", self._spec(1))  # the arguments are checked before there is an input
        if adjustment is not None and virtual_batch_size is not None:
            raise SpecError("adjustment and virtual_batch_size contradict each other; use one of the two.")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the variables for inputs of this shape."""
        rank = len(input_shape)
        channels = input_shape[self.axis] if -rank <= self.axis < rank else None
        if channels is None:
            raise InputError(f"axis {self.axis} must be a known length of the inputs; got shape {tuple(input_shape)}.")
        self._num_features = int(channels)
        spec = self._spec(self._num_features)
        for name in (name for name in _WEIGHTS if name in array_names(spec)):
            learns = name in ("gamma", "beta")
            of_parameter = {
                "regularizer": getattr(self, f"{name}_regularizer"),
                "constraint": getattr(self, f"{name}_constraint"),
            } if learns else {}  # fmt: skip
            variable = self.add_weight(
                name=name,
                shape=(spec.num_features,),
                initializer=self._initializer(name),
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

    def _initializer(self, name: str) -> Any:
        if name.startswith("hidden"):
            return "zeros"
        if name == "renorm_mean":
            return self.moving_mean_initializer
        if name.endswith("stddev"):  # without epsilon, as Keras does
            variance = self.moving_variance_initializer
            return lambda shape, dtype=None: keras.ops.sqrt(variance(shape, dtype=dtype))
        return getattr(self, f"{name}_initializer")

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
        """All state of the layer: `weights`, and the counter where it is none of them.

        On PyTorch without it: what is here becomes keys of `state_dict()`, which are to be Keras's own.
        """
        known: list[Any] = super().variables
        counter = self._counter.variable
        if counter is None or any(v is counter for v in known) or not runtime.current().counter_among_variables():
            return known
        return [*known, counter]

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
        return self._state(self.spec)

    def _state(self, spec: BatchNormSpec) -> BatchNormState[Any]:
        arrays = {name: getattr(self, name).value for name in array_names(spec)}
        return BatchNormState(**arrays, num_updates=self.num_updates.value)

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        weights: Any = None,
        update_stats: bool = True,
        adjustment: tuple[Any, Any] | None = None,
        renorm_clips: Mapping[str, Any] | None = None,
    ) -> Any:
        """Normalize the inputs; see the class."""
        given = (mask, weights, adjustment, renorm_clips)
        if update_stats and all(each is None for each in given) and self._is_plain():
            y = runtime.current().plain(self, inputs, bool(training) and self.trainable and not self.frozen_statistics)
            if y is not None:
                return y
        spec = self.spec
        before = self._state(spec)
        learns = trains(spec, bool(training) and self.trainable, self.frozen_statistics)
        if self.autocast and keras.backend.standardize_dtype(inputs.dtype) not in FLOAT_DTYPES:
            inputs = keras.ops.cast(inputs, self.compute_dtype)
        if adjustment is None and self.adjustment is not None and learns:
            adjustment = self.adjustment(keras.ops.shape(inputs))
        positions = masks.positions(inputs, mask, weights, self.axis)
        y, after = masks.batch_norm(
            runtime.current().batch_norm,
            inputs,
            before,
            spec,
            positions,
            training=learns,
            update_stats=update_stats,
            adjustment=None if adjustment is None else _tensors(adjustment, inputs.dtype),
            renorm_clips=renorm_clips,
        )
        # Also where nothing has changed, as by an empty batch: what a replica assigns, TensorFlow wants all to assign.
        if learns and update_stats and spec.track_moving_stats:
            for name in array_names(spec):
                if name not in ("gamma", "beta"):
                    getattr(self, name).assign(getattr(after, name))
            self.num_updates.assign(after.num_updates)
        return y

    def _is_plain(self) -> bool:
        """Whether the layer is as Keras's own may be, but for the estimator of the moving variance."""
        return (
            self.built
            and self.track_moving_stats
            and self.adjustment is None
            and self.virtual_batch_size is None
            and self.zero_debias == "none"
            and self.nonfinite == "propagate"
            and not (self.renorm or self.cumulative or self.synchronized)
            and isinstance(self.momentum, float)
            and 0.0 <= self.momentum <= 1.0
            and isinstance(self.epsilon, float)
            and 0.0 < self.epsilon < float("inf")
        )

    def compute_output_spec(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        weights: Any = None,
        update_stats: bool = True,
        adjustment: tuple[Any, Any] | None = None,
        renorm_clips: Mapping[str, Any] | None = None,
    ) -> Any:
        """The inputs' shape and dtype, checked against the layer while a model is put together."""
        dtype = inputs.dtype if inputs.dtype in FLOAT_DTYPES or not self.autocast else self.compute_dtype
        plan_call(
            self.spec,
            inputs.shape,
            dtype,
            training=False,
            weights_shape=masks.shape(inputs, mask, weights, self.axis),
            adjustment_shapes=None if adjustment is None else (_shape(adjustment[0]), _shape(adjustment[1])),
        )
        return keras.KerasTensor(inputs.shape, dtype=dtype)

    def save_assets(self, dir_path: str) -> None:
        """Write the counter where it is no weight; Keras calls this when it saves a model as `.keras`."""
        if self.num_updates is not None and not needs_counter(self.spec):
            count = int(keras.ops.convert_to_numpy(self.num_updates.value))
            Path(dir_path, _COUNTER).write_text(f"{count}\n", "ascii")

    def load_assets(self, dir_path: str | None) -> None:
        """Read the counter, if the file has one: a file of keras.layers.BatchNormalization has none.

        Raises:
            StateError: it is not a count that this framework's integers can hold.
        """
        file = None if dir_path is None else Path(dir_path, _COUNTER)
        if file is None or not file.is_file() or self.num_updates is None:
            return
        with file.open("rb") as stream:
            text = stream.read(32).strip()  # of an untrusted file no more than a count can need
        largest = int(np.iinfo(self.num_updates.dtype).max)
        if not text.isdigit() or int(text) > largest:
            raise StateError(f"{_COUNTER} of layer {self.name!r} must be a count of at most {largest}; got {text!r}.")
        self.num_updates.assign(int(text))

    def get_config(self) -> dict[str, Any]:
        """The arguments of this layer; those that a Keras layer may lack only where they are not at their default.

        Raises:
            UnsupportedError: the layer has an `adjustment`, a function, which no config can hold.
        """
        if self.adjustment is not None:
            raise UnsupportedError(
                f"a config cannot hold the adjustment of layer {self.name!r}, a function. Give it in the call, as"
                " layer(x, adjustment=...), or save the weights alone and build the layer again in code."
            )
        extras = {name: getattr(self, name) for name, default in EXTRAS.items() if getattr(self, name) != default}
        if self.renorm:  # an argument of Keras's own since 3.15
            extras |= {"renorm": True, "renorm_momentum": self.renorm_momentum}
        config: dict[str, Any] = {**super().get_config(), **extras}
        if self.renorm_clipping is not None:
            config["renorm_clipping"] = dict(self.renorm_clipping)  # Keras has wrapped it to watch it for variables
        return config

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
            zero_debias=self.zero_debias,
            renorm=self._renorm() if self.renorm else None,
            virtual_batch_size=self.virtual_batch_size,
            virtual_batch_layout=self.virtual_batch_layout,
            param_dtype=self.param_dtype or self.variable_dtype,
            stats_dtype=self.stats_dtype or self.variable_dtype,
        )

    def _renorm(self) -> Renorm:
        clipping = self.renorm_clipping or {}
        unknown = sorted(set(clipping) - set(CLIPS))
        if unknown:
            raise SpecError(f"Received invalid keys for renorm_clipping, {unknown}; its keys are {', '.join(CLIPS)}.")
        low, high, shift = (clipping.get(key) for key in ("rmin", "rmax", "dmax"))
        if low is not None and high is not None and low > high:
            raise SpecError(f"rmax should be at least rmin in renorm_clipping; got rmax={high}, rmin={low}.")
        if shift is not None and shift < 0:
            raise SpecError(f"dmax should be non-negative in renorm_clipping; got {shift}.")
        clips = {CLIPS[key]: None if value == float("inf") else value for key, value in clipping.items()}
        return Renorm(**clips, decay=self.renorm_momentum)


def _tensors(adjustment: tuple[Any, Any], dtype: Any) -> tuple[Any, Any]:
    """Arrays and Python's numbers as tensors; the numbers in a dtype in which they lose nothing."""
    wide = keras.backend.result_type(keras.backend.standardize_dtype(dtype), "float32")
    scale, bias = (
        each
        if keras.ops.is_tensor(each)
        else keras.ops.convert_to_tensor(each, dtype=None if hasattr(each, "dtype") else wide)
        for each in adjustment
    )
    return scale, bias


def _python(number: Any) -> Any:
    """NumPy's numbers as Python's, for JSON knows no others."""
    return number.item() if isinstance(number, np.generic) else number


def _shape(value: Any) -> tuple[int | None, ...]:
    return tuple(getattr(value, "shape", ()))
