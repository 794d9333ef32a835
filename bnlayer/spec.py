"""What a batch norm is: `BatchNormSpec`, and `Renorm` for its batch-renormalization clips.

A spec says everything that decides the numbers of a batch normalization layer, in one vocabulary with one meaning.
It holds no arrays (see `bnlayer.state`) and knows no framework (see `bnlayer.dialects` for the frameworks' own words).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Literal

import numpy as np

from .errors import SpecError

FLOAT_DTYPES: Final = ("float16", "bfloat16", "float32", "float64")

Estimator = Literal["biased", "unbiased"]
ZeroDebias = Literal["none", "mean", "all"]
GhostLayout = Literal["strided", "consecutive"]
SingleValue = Literal["raise", "allow"]
NonFinite = Literal["propagate", "keep"]

_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "moving_variance_estimator": ("biased", "unbiased"),
    "zero_debias": ("none", "mean", "all"),
    "virtual_batch_layout": ("strided", "consecutive"),
    "single_value": ("raise", "allow"),
    "nonfinite": ("propagate", "keep"),
    "param_dtype": FLOAT_DTYPES,
    "stats_dtype": FLOAT_DTYPES,
}
_FLAGS: Final = ("center", "scale", "track_moving_stats", "synchronized")
_LEAST, _MOST = -(2**63), 2**63 - 1  # no length or axis is beyond, and a file could ask for a million digits


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization: the clips of its corrections r and d, and the decay of its own averages.

    Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017.

    Attributes:
        r_max: upper clip of r, at least 0; None for no clip.
        r_min: lower clip of r, at least 0 and at most `r_max`; None for no clip.
        d_max: clip of |d|, at least 0; None for no clip.
        decay: weight on the old renorm averages, in [0, 1].
    """

    _: KW_ONLY
    r_max: float | None = None
    r_min: float | None = None
    d_max: float | None = None
    decay: float = 0.99

    def __post_init__(self) -> None:
        for name in ("r_max", "r_min", "d_max"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _number(f"renorm.{name}", value, low=0.0))
        object.__setattr__(self, "decay", _number("renorm.decay", self.decay, low=0.0, high=1.0))
        if self.r_max is not None and self.r_min is not None and self.r_min > self.r_max:
            raise SpecError(f"renorm.r_min must be at most renorm.r_max; got {self.r_min!r} > {self.r_max!r}.")


@dataclass(frozen=True)
class BatchNormSpec:
    """Everything that decides what a batch normalization layer computes.

    Frozen, hashable, and the same in every backend: two layers with equal specs and equal states compute the same
    numbers, up to rounding. The defaults are bnlayer's own; for a framework's defaults use `from_dialect`.

    Attributes:
        num_features: number of channels, at least 1.
        axis: the channel axis; negative counts from the end. Never 0, which is the batch axis.
        epsilon: added to the variance inside the square root; finite, at least 0, never floored.
        decay: weight on the OLD moving statistics, in [0, 1], or "cumulative" for the plain average of all updates.
            torch's momentum is 1 - decay.
        center: whether there is a beta.
        scale: whether there is a gamma.
        moving_variance_estimator: what enters the moving variance, "biased" or "unbiased" (Bessel's n/(n-1)).
            The normalization itself always uses the biased variance.
        zero_debias: divide the moving mean ("mean") or mean and variance ("all") by 1 - decay**num_updates.
        renorm: batch renormalization, or None.
        virtual_batch_size: rows per ghost batch, or None for the whole batch.
        virtual_batch_layout: "strided" (ghost g has rows g, g+G, ...) or "consecutive" (as `numpy.array_split`).
        track_moving_stats: False: there are no moving statistics; batch statistics normalize in eval too.
        single_value: "raise" or "allow" batch statistics over one value per channel.
        nonfinite: "propagate" non-finite batch statistics into the moving ones, or "keep" that channel's old ones.
        synchronized: batch statistics over all replicas.
        param_dtype: dtype of gamma and beta: "float16", "bfloat16", "float32" or "float64".
        stats_dtype: dtype of the moving statistics, likewise.

    Raises:
        SpecError: a field is out of range, or two fields contradict each other.
    """

    num_features: int
    _: KW_ONLY
    axis: int = -1
    epsilon: float = 1e-5
    decay: float | Literal["cumulative"] = 0.9
    center: bool = True
    scale: bool = True
    moving_variance_estimator: Estimator = "biased"
    zero_debias: ZeroDebias = "none"
    renorm: Renorm | None = None
    virtual_batch_size: int | None = None
    virtual_batch_layout: GhostLayout = "strided"
    track_moving_stats: bool = True
    single_value: SingleValue = "raise"
    nonfinite: NonFinite = "propagate"
    synchronized: bool = False
    param_dtype: str = "float32"
    stats_dtype: str = "float32"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "num_features", _integer("num_features", self.num_features, low=1))
        put(self, "axis", _integer("axis", self.axis))
        put(self, "epsilon", _number("epsilon", self.epsilon, low=0.0))
        if not (isinstance(self.decay, str) and self.decay == "cumulative"):
            put(self, "decay", _number("decay", self.decay, low=0.0, high=1.0, also="'cumulative'"))
        for name in _FLAGS:
            put(self, name, _flag(name, getattr(self, name)))
        for name in ("param_dtype", "stats_dtype"):
            put(self, name, _dtype_name(name, getattr(self, name)))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise SpecError(f"{name} must be one of {_listed(choices)}; got {_shown(value)}.")
        if self.virtual_batch_size is not None:
            put(self, "virtual_batch_size", _integer("virtual_batch_size", self.virtual_batch_size, low=1))
        if self.renorm is not None and not isinstance(self.renorm, Renorm):
            raise SpecError(f"renorm must be None or a Renorm; got {_shown(self.renorm)}.")
        if self.axis == 0:
            raise SpecError("axis 0 is the batch axis; give the channel axis, for example 1 or -1.")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        cumulative = self.decay == "cumulative"
        rules = (
            (self.zero_debias != "none" and cumulative, "zero_debias", "decay='cumulative'",
             "a cumulative average starts without bias"),
            (self.zero_debias != "none" and self.decay == 1.0, "zero_debias", "decay=1",
             "it divides by 1 - decay**t, which is 0"),
            (self.renorm is not None and self.moving_variance_estimator == "unbiased", "renorm",
             "moving_variance_estimator='unbiased'", "renorm averages the biased standard deviation"),
            (self.renorm is not None and cumulative, "renorm", "decay='cumulative'", "renorm needs a decaying average"),
            (self.renorm is not None and self.zero_debias != "none", "renorm", "zero_debias",
             "renorm reads its averages before they are debiased"),
            (self.virtual_batch_size is not None and self.synchronized, "virtual_batch_size", "synchronized",
             "one splits the batch, the other joins it"),
            (self.nonfinite == "keep" and cumulative, "nonfinite='keep'", "decay='cumulative'",
             "a kept channel would have another number of updates than the rest"),
            (self.nonfinite == "keep" and self.zero_debias != "none", "nonfinite='keep'", "zero_debias",
             "a kept channel would have another number of updates than the rest"),
            (not self.track_moving_stats and self.zero_debias != "none", "track_moving_stats=False", "zero_debias",
             "there is no average to debias"),
            (not self.track_moving_stats and self.renorm is not None, "track_moving_stats=False", "renorm",
             "renorm corrects towards the moving statistics"),
            (not self.track_moving_stats and cumulative, "track_moving_stats=False", "decay='cumulative'",
             "there is nothing to average"),
        )  # fmt: skip
        for contradicts, first, second, why in rules:
            if contradicts:
                raise SpecError(f"{first} and {second} contradict each other: {why}. Change one of the two.")

    def replace(self, **changes: Any) -> BatchNormSpec:
        """This spec with some fields changed, checked again.

        Raises:
            SpecError: a name is not a field, or the result contradicts itself.
        """
        _refuse_unknown(changes, "BatchNormSpec", [f.name for f in dataclasses.fields(self)])
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BatchNormSpec:
        """The spec with these fields; the inverse of `to_dict`.

        Raises:
            SpecError: a name is not a field, `num_features` is missing, or a value is refused.
        """
        if not isinstance(fields, Mapping):
            raise SpecError(f"a spec is an object of named fields; got {type(fields).__name__}.")
        _refuse_unknown(fields, "BatchNormSpec", [f.name for f in dataclasses.fields(cls)])
        if "num_features" not in fields:
            raise SpecError("num_features is missing; give the number of channels.")
        values = dict(fields)
        renorm = values.get("renorm")
        if isinstance(renorm, Mapping):
            _refuse_unknown(renorm, "Renorm", [f.name for f in dataclasses.fields(Renorm)])
            values["renorm"] = Renorm(**renorm)
        return cls(**values)

    def to_json(self) -> str:
        """This spec as a JSON object with every field."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BatchNormSpec:
        """The spec that this JSON object describes; the inverse of `to_json`.

        Raises:
            SpecError: the text is not JSON, or does not describe a spec.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"a spec must be a JSON object; this text is not JSON ({error}).") from error
        return cls.from_dict(fields)

    @classmethod
    def from_dialect(cls, name: str, /, *, rank: int | None = None, **arguments: Any) -> BatchNormSpec:
        """The spec of the layer that framework `name` would build from `arguments`, its defaults included.

        See `bnlayer.dialects` for the names, and for where `rank` is needed.

        Raises:
            DialectError: an argument is unknown, missing or cannot be said as a spec.
        """
        from .dialects import dialect

        return dialect(name).to_spec(arguments, rank=rank)

    def to_dialect(self, name: str, /, *, rank: int | None = None, lossy: tuple[str, ...] = ()) -> dict[str, Any]:
        """The arguments with which framework `name` builds the layer of this spec.

        Args:
            name: a dialect, see `bnlayer.dialects`.
            rank: of the layer's input, where the framework's meaning depends on it.
            lossy: spec fields that may be lost; without it, a field the framework cannot express is refused.

        Raises:
            DialectError: names every field that cannot be said and is not in `lossy`.
        """
        from .dialects import dialect

        return dialect(name).from_spec(self, rank=rank, lossy=lossy)


def _number(name: str, value: object, *, low: float, high: float = math.inf, also: str = "") -> float:
    expected = f"a finite number in [{low:g}, {high:g}]" if high < math.inf else f"a finite number of at least {low:g}"
    if also:
        expected += f" or {also}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise SpecError(f"{name} must be {expected}; got {_shown(value)}.")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        raise SpecError(f"{name} must be {expected}; got {_shown(value)}.")
    return number + 0.0  # -0.0 and 0.0 are one value


def _integer(name: str, value: object, *, low: int | None = None) -> int:
    expected = "a 64-bit integer" if low is None else f"a 64-bit integer of at least {low}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise SpecError(f"{name} must be {expected}; got {_shown(value)}.")
    if not (_LEAST if low is None else low) <= value <= _MOST:
        raise SpecError(f"{name} must be {expected}; got {_shown(value)}.")
    return int(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise SpecError(f"{name} must be True or False; got {_shown(value)}.")
    return bool(value)


def _dtype_name(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    # numpy's own float types and ml_dtypes.bfloat16 know their name. What else numpy would take (None is float64 to
    # it) was not meant as a dtype.
    if isinstance(value, (type, np.dtype)):
        return np.dtype(value).name
    raise SpecError(f"{name} must be one of {_listed(FLOAT_DTYPES)}; got {_shown(value)}.")


def _refuse_unknown(given: Mapping[str, Any], what: str, known: list[str]) -> None:
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise SpecError(f"{what} has no field {', '.join(unknown)}; its fields are {', '.join(known)}.")


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _shown(value: object) -> str:
    """`value` for a message; one that came from a file may be endless, or an integer too long for Python to print."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:200]}..."
