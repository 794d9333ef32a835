"""How each framework names, defaults and means things: a table, not code paths.

    dialect("torch").to_spec({"num_features": 64, "momentum": 0.01})
    dialect("keras").from_spec(spec)

A dialect is a list of `bnlayer.words`, plus the spec fields on which the framework leaves no choice. What it cannot
express follows from that: a spec is written as arguments, the arguments are read again, and every field that comes
back with another value is named. So `to_spec(from_spec(spec))` is `spec` wherever `from_spec` does not refuse.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

import numpy as np

from .errors import DialectError, SpecError
from .spec import BatchNormSpec
from .state import BatchNormState
from .words import (
    REQUIRED,
    Values,
    Word,
    affine_and_bias,
    channel_axis,
    complement,
    data_format,
    dtype,
    dtype_name,
    example_axis,
    flag,
    fused_kernel,
    ghost_batches,
    initializer,
    neutral,
    number,
    only,
    renormalization,
    replica_axis,
    weight_on_new,
    zero_debias_mean,
)

__all__ = ["DIALECTS", "Dialect", "complement", "dialect"]


@dataclass(frozen=True, eq=False)
class Dialect:
    """One framework's way to say a batch norm.

    Attributes:
        name: as in `BatchNormSpec.from_dialect(name)`.
        title: the layer, for people.
        words: the arguments, and what they say. Order matters where one reads what earlier ones wrote.
        fixed: the spec fields that no argument decides, and the framework's value of each.
        features: the argument for the number of channels, or None where the framework takes it from the input.
        hints: for a field that cannot be expressed, what to do about it.
        initial: what the moving statistics start from, where it is not `BatchNormState.initial`'s value.
    """

    name: str
    title: str
    _: KW_ONLY
    words: tuple[Word, ...]
    fixed: Mapping[str, Any]
    features: str | None = None
    hints: Mapping[str, str] = field(default_factory=dict)
    initial: Mapping[str, float] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Every argument by name, with its default, or `words.REQUIRED`."""
        named = {} if self.features is None else {self.features: REQUIRED}
        for word in self.words:
            named.update(word.arguments)
        return named

    def to_spec(self, arguments: Mapping[str, Any], *, rank: int | None = None) -> BatchNormSpec:
        """The spec of the layer that the framework would build from `arguments`, its defaults included.

        Args:
            arguments: the framework's keyword arguments. The number of channels goes by the framework's own name
                where it has one, and anywhere by `num_features`.
            rank: of the layer's input; asked for only where the framework's meaning depends on it.

        Raises:
            DialectError: an argument is unknown, missing or cannot be said as a spec.
        """
        _check_rank(self.name, rank)
        num_features, values = self._complete(arguments)
        try:
            fields = dict(self.fixed)
            for word in self.words:
                fields.update(word.read(values, rank))
            return BatchNormSpec(num_features, **fields)
        except (DialectError, SpecError) as error:
            raise DialectError(f"{self.name}: {error}") from error

    def from_spec(self, spec: BatchNormSpec, *, rank: int | None = None, lossy: tuple[str, ...] = ()) -> dict[str, Any]:
        """The arguments with which the framework builds the layer of `spec`.

        The number of channels is among them only where the framework takes it. An argument that is at its default and
        that not every version of the framework has is left out. Dtypes are given by name.

        Args:
            spec: what to build.
            rank: of the layer's input; asked for only where the framework's meaning depends on it.
            lossy: spec fields that may come out otherwise than `spec` has them.

        Raises:
            DialectError: names every field that cannot be said and is not in `lossy`.
        """
        _check_rank(self.name, rank)
        known = [f.name for f in dataclasses.fields(BatchNormSpec)]
        if isinstance(lossy, str) or not set(lossy) <= set(known):
            raise DialectError(
                f"lossy must be a tuple of spec fields; got {lossy!r}. The fields are {', '.join(known)}."
            )
        values = self.defaults
        for word in self.words:
            values.update(word.write(spec, values, rank))
        needless = {name for word in self.words if word.quiet for name in word.arguments} & {
            name for name, default in self.defaults.items() if values[name] is default or values[name] == default
        }
        arguments = {name: value for name, value in values.items() if name not in needless}
        arguments.pop(self.features or "", None)
        for word in self.words:
            if any(arguments.get(name) is REQUIRED for name in word.arguments):
                told = ", ".join(f"{name}={getattr(spec, name)!r}" for name in word.fields)
                raise DialectError(f"{self.name} cannot express {told}, nor anything near it; use spec.replace(...).")
        again = self.to_spec({**arguments, "num_features": spec.num_features}, rank=rank)
        lost = [name for name in known if getattr(again, name) != getattr(spec, name) and name not in lossy]
        if lost:
            raise DialectError(self._cannot(spec, again, lost))
        return arguments if self.features is None else {self.features: spec.num_features, **arguments}

    def initial_state(self, spec: BatchNormSpec) -> BatchNormState[np.ndarray[Any, Any]]:
        """The numpy state of a layer of `spec` that the framework built and nobody trained."""
        state = BatchNormState.initial(spec)
        changed = {
            name: np.full_like(array, self.initial[name])
            for name, array in state.arrays().items()
            if name in self.initial
        }
        return state.replace(**changed)

    def _complete(self, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The number of channels, and every other argument, defaults filled in."""
        defaults = self.defaults
        known = list(dict.fromkeys([*defaults, "num_features"]))
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise DialectError(
                f"{self.name} has no argument {', '.join(map(repr, unknown))}; known are {', '.join(known)}."
            )
        names = ["num_features"] if self.features in (None, "num_features") else [self.features, "num_features"]
        given = [name for name in names if name in arguments]
        if len(given) != 1:
            wanted = " or ".join(f"{name}=" for name in names if name is not None)
            raise DialectError(f"{self.name}: give the number of channels once, as {wanted}; got {given or 'none'}.")
        values = {name: arguments.get(name, default) for name, default in defaults.items() if name != self.features}
        missing = [name for name, value in values.items() if value is REQUIRED]
        if missing:
            raise DialectError(f"{self.name} has no default for {', '.join(missing)}; give it.")
        return arguments[given[0]], values

    def _cannot(self, spec: BatchNormSpec, again: BatchNormSpec, lost: list[str]) -> str:
        told = []
        for name in lost:
            hint = self.hints.get(name)
            told.append(
                f"{name}={getattr(spec, name)!r} (it would be {getattr(again, name)!r}{f'; {hint}' if hint else ''})"
            )
        return (
            f"{self.name} cannot express {', '.join(told)}. Change it with spec.replace(...), or give"
            f" lossy={tuple(lost)!r} to lose it."
        )


def dialect(name: str) -> Dialect:
    """The dialect of this name.

    Raises:
        DialectError: there is none; the message lists the known ones.
    """
    if name not in DIALECTS:
        raise DialectError(f"unknown dialect {name!r}; known are {', '.join(DIALECTS)}.")
    return DIALECTS[name]


def _check_rank(name: str, rank: Any) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 2):
        raise DialectError(f"{name}: rank must be the number of axes of the input, at least 2; got {rank!r}.")


# What a framework without such a thing always does.
_PLAIN: Final[dict[str, Any]] = {
    "moving_variance_estimator": "biased",
    "zero_debias": "none",
    "renorm": None,
    "virtual_batch_size": None,
    "virtual_batch_layout": "strided",
    "track_moving_stats": True,
    "single_value": "allow",
    "nonfinite": "propagate",
    "synchronized": False,
    "param_dtype": "float32",
    "stats_dtype": "float32",
}


def _fixed(*said: str, **other: Any) -> dict[str, Any]:
    """`_PLAIN` without the fields that arguments say, and with the framework's other values."""
    return {name: value for name, value in {**_PLAIN, **other}.items() if name not in said}


_FROZEN: Final = (
    "frozen statistics are the state of a layer, not part of what it is. Leave it out, build the layer, and set its"
    " frozen_statistics."
)
_NOT_UPDATING: Final = (
    "it stops the updates but normalizes with the batch; leave it out, and call the layer with update_stats=False."
)
_NO_PENALTY: Final = "it changes the loss or the optimizer's step, not the layer; leave it out here."
_CALLED: Final = "it is an argument of the call; leave it out here."


def _keras_extras(zeros: str = "zeros", ones: str = "ones") -> tuple[Word, ...]:
    """The arguments of Keras's layers, old and new, on which no number depends while they are at their defaults."""
    penalties = ("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint")
    return (
        initializer("beta_initializer", zeros, "zeros"),
        initializer("gamma_initializer", ones, "ones"),
        initializer("moving_mean_initializer", zeros, "zeros"),
        initializer("moving_variance_initializer", ones, "ones"),
        *(only(name, None, _NO_PENALTY) for name in penalties),
        neutral(name=None),
    )


_KERAS_VALUES: Final = (
    channel_axis(-1, sequences=False),
    number("momentum", 0.99, "decay"),
    number("epsilon", 0.001, "epsilon"),
    flag("center", True, "center"),
    flag("scale", True, "scale"),
)
_TF_VALUES: Final = (channel_axis(-1, sequences=True), *_KERAS_VALUES[1:])
_KERAS_INITIAL: Final = {"renorm_stddev": 1.0, "moving_stddev": 1.0}  # sqrt of the variance, without epsilon


def _tf_fuses(values: Values, rank: int) -> bool:
    """Where tf_keras and tf.compat.v1.layers run the fused kernel: ranks 4 and 5, channels first or last, float32 or
    half, and nothing special asked for."""
    special = values["renorm"] or values["virtual_batch_size"] is not None or values.get("synchronized", False)
    float64 = values.get("dtype") is not None and dtype_name(values["dtype"]) == "float64"
    axis = values["axis"][0] if isinstance(values["axis"], (list, tuple)) else values["axis"]
    at_an_end = axis in (1, rank - 1, -1, 1 - rank)
    return values["fused"] is not False and not special and not float64 and rank in (4, 5) and at_an_end


def _contrib_fuses(values: Values, rank: int) -> bool:
    """Where contrib runs the fused kernel: through its own code at ranks 2 and 4, through the core layer at 4 and 5.

    The core layer neither debiases nor updates in place, so those leave its rank 5 to the plain code.
    """
    own_code = values["zero_debias_moving_mean"] or values["updates_collections"] != _UPDATE_OPS
    return values["fused"] is not False and not values["renorm"] and rank in ((2, 4) if own_code else (2, 4, 5))


_UPDATE_OPS: Final = "update_ops"  # tf.GraphKeys.UPDATE_OPS

_HAIKU_FIRST: Final = re.compile(r"channels_first|NC[^C]*")
_HAIKU_LAST: Final = re.compile(r"channels_last|N[^C]*C|(BT|TB)[^D]*D")


def _haiku_format(given: str) -> int | None:
    if _HAIKU_FIRST.fullmatch(given):
        return 1
    return -1 if _HAIKU_LAST.fullmatch(given) else None


def _contrib_format(given: str) -> int | None:
    return {"NHWC": -1, "NCHW": 1}.get(given)


_MIXED: Final = {"mixed_float16": "float32", "mixed_bfloat16": "float32"}

DIALECTS: Final[dict[str, Dialect]] = {
    each.name: each
    for each in (
        Dialect(
            "torch",
            "torch.nn.BatchNorm1d, 2d, 3d",
            features="num_features",
            words=(
                number("eps", 1e-5, "epsilon"),
                weight_on_new("momentum", 0.1),
                *affine_and_bias(),
                flag("track_running_stats", True, "track_moving_stats"),
                dtype("dtype", None, "param_dtype", "stats_dtype"),
                neutral(device=None),
            ),
            fixed=_fixed(
                "track_moving_stats", "param_dtype", "stats_dtype",
                axis=1, moving_variance_estimator="unbiased", single_value="raise",
            ),
            hints={
                "axis": "for input of rank 2, axis -1 is axis 1",
                "scale": "beta without gamma needs a gamma that stays 1",
                "synchronized": "torch has the class SyncBatchNorm for it",
            },
        ),
        Dialect(
            "keras",
            "keras.layers.BatchNormalization (Keras 3)",
            words=(
                *_KERAS_VALUES,
                renormalization("renorm_momentum"),
                flag("synchronized", False, "synchronized", quiet=True),
                dtype("dtype", None, "param_dtype", "stats_dtype", meanings=_MIXED),
                only("trainable", True, _FROZEN),
                *_keras_extras(),
            ),
            fixed=_fixed("renorm", "synchronized", "param_dtype", "stats_dtype"),
            initial=_KERAS_INITIAL,
        ),
        Dialect(
            "tf_keras",
            "tf_keras.layers.BatchNormalization (Keras 2)",
            words=(
                *_TF_VALUES,
                renormalization("renorm_momentum"),
                ghost_batches(),
                flag("synchronized", False, "synchronized", quiet=True),
                # It keeps the variables of half-precision layers in float32.
                dtype("dtype", None, "param_dtype", "stats_dtype",
                      meanings={**_MIXED, "float16": "float32", "bfloat16": "float32"}),
                only("trainable", True, _FROZEN),
                only("adjustment", None, _CALLED),
                *_keras_extras(),
                fused_kernel(_tf_fuses, insists=True),
            ),
            fixed=_fixed("moving_variance_estimator", "renorm", "virtual_batch_size", "synchronized",
                         "param_dtype", "stats_dtype"),
            initial=_KERAS_INITIAL,
        ),
        Dialect(
            "tf_layers",
            "tf.compat.v1.layers.batch_normalization",
            words=(
                *_TF_VALUES,
                renormalization("renorm_momentum"),
                ghost_batches(),
                only("trainable", True, _NOT_UPDATING),
                only("adjustment", None, _CALLED),
                neutral(training=False, reuse=None),
                *_keras_extras(),
                fused_kernel(_tf_fuses, insists=False),
            ),
            fixed=_fixed("moving_variance_estimator", "renorm", "virtual_batch_size"),
            initial=_KERAS_INITIAL,
        ),
        Dialect(
            "contrib",
            "tf.contrib.layers.batch_norm (tf_slim)",
            words=(
                number("decay", 0.999, "decay"),
                number("epsilon", 0.001, "epsilon"),
                flag("center", True, "center"),
                flag("scale", False, "scale"),
                data_format("NHWC", _contrib_format, first="NCHW"),
                zero_debias_mean("zero_debias_moving_mean"),
                renormalization("renorm_decay"),
                only("activation_fn", None, "it is a layer of its own, after this one; leave it out here."),
                only("param_initializers", None, "a spec holds no arrays; give the layer a BatchNormState instead."),
                only("param_regularizers", None, _NO_PENALTY),
                only("batch_weights", None, _CALLED),
                only("adjustment", None, _CALLED),
                only("updates_collections", _UPDATE_OPS, "updates run in place (None) or are collected there.",
                     _UPDATE_OPS, None),
                only("trainable", True, "whether its statistics then stop depends on the rank and on other arguments."
                     " Leave it out, and to stop them call the layer with update_stats=False."),
                neutral(is_training=True, reuse=None, scope=None, variables_collections=None,
                        outputs_collections=None),
                fused_kernel(_contrib_fuses, insists=False),
            ),
            fixed=_fixed("moving_variance_estimator", "zero_debias", "renorm"),
            hints={"axis": "it has NHWC for axis -1 and NCHW for axis 1"},
            initial=_KERAS_INITIAL,
        ),
        Dialect(
            "flax",
            "flax.linen.BatchNorm, flax.nnx.BatchNorm",
            words=(
                channel_axis(-1, sequences=True),
                number("momentum", 0.99, "decay"),
                number("epsilon", 1e-5, "epsilon"),
                flag("use_bias", True, "center"),
                flag("use_scale", True, "scale"),
                replica_axis("axis_name"),
                dtype("param_dtype", "float32", "param_dtype"),
                only("dtype", None, "a spec computes in float32 or wider and returns x's dtype; leave it out."),
                only("axis_index_groups", None, "a spec synchronizes all replicas or none."),
                only("force_float32_reductions", True, "a spec computes in float32 or wider."),
                only("bias_init", None, "a spec holds no arrays; give the layer a BatchNormState instead."),
                only("scale_init", None, "a spec holds no arrays; give the layer a BatchNormState instead."),
                neutral(use_running_average=None, use_fast_variance=True, name=None, parent=None, rngs=None,
                        bias_metadata=None, scale_metadata=None),
            ),
            fixed=_fixed("synchronized", "param_dtype"),
            hints={"stats_dtype": "Flax creates its statistics in float32"},
        ),
        Dialect(
            "haiku",
            "haiku.BatchNorm",
            words=(
                flag("create_scale", REQUIRED, "scale"),
                flag("create_offset", REQUIRED, "center"),
                number("decay_rate", REQUIRED, "decay"),
                number("eps", 1e-5, "epsilon"),
                data_format("channels_last", _haiku_format, first="channels_first"),
                replica_axis("cross_replica_axis"),
                only("axis", None, "it names the axes to reduce; leave it out and say the channels by data_format."),
                only("cross_replica_axis_index_groups", None, "a spec synchronizes all replicas or none."),
                only("scale_init", None, "a spec holds no arrays; give the layer a BatchNormState instead."),
                only("offset_init", None, "a spec holds no arrays; give the layer a BatchNormState instead."),
                neutral(name=None),
            ),
            fixed=_fixed("synchronized", zero_debias="all"),
            hints={
                "axis": "it has channels_last for axis -1 and channels_first for axis 1",
                "param_dtype": "Haiku's variables have the input's dtype",
                "stats_dtype": "Haiku's variables have the input's dtype",
            },
            initial={"moving_mean": 0.0, "moving_variance": 0.0},
        ),
        Dialect(
            "equinox",
            "equinox.nn.BatchNorm, mode='batch'",
            features="input_size",
            words=(
                example_axis("axis_name"),
                number("eps", 1e-5, "epsilon"),
                number("momentum", 0.99, "decay"),
                flag("channelwise_affine", True, "center", "scale"),
                only("mode", "legacy", "only mode='batch' is batch normalization; 'ema', which 'legacy' stands for,"
                     " normalizes with the moving average in training too.", "batch"),
                dtype("dtype", None, "param_dtype", "stats_dtype"),
                neutral(inference=False),
            ),
            # Its examples have no batch axis: their channel axis 0 is axis 1 of the batch.
            fixed=_fixed("synchronized", "param_dtype", "stats_dtype", axis=1, zero_debias="all"),
            hints={
                "axis": "an example's axis 0 is the batch's axis 1",
                "synchronized": "axis_name, required: the batch's axis, and beside it the replicas'",
            },
            # Debiased as if it started at 0, which is what Equinox does.
            initial={"hidden_variance": 1.0},
        ),
        Dialect(
            "onnx",
            "ONNX BatchNormalization (opset 14 and 15)",
            words=(
                number("epsilon", 1e-5, "epsilon"),
                number("momentum", 0.9, "decay"),
                only("spatial", 1, "statistics per element instead of per channel are no batch normalization."),
                neutral(training_mode=0),
            ),
            fixed=_fixed(axis=1, center=True, scale=True),
            hints={
                "center": "B is an input of the node: give zeros",
                "scale": "scale is an input of the node: give ones",
                "param_dtype": "a node's dtypes are its inputs'",
                "stats_dtype": "a node's dtypes are its inputs'",
            },
        ),
    )
}  # fmt: skip
