"""The words of a dialect: framework arguments that belong together, and the spec fields they say.

`bnlayer.dialects` is a table of these. A word reads arguments into fields and writes a spec as arguments; writing may
come as near as the framework allows, because the dialect reads its own arguments again and names what was lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np

from .errors import DialectError
from .spec import BatchNormSpec, Renorm


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()  # in place of a default, where the framework has none

Values = Mapping[str, Any]  # every argument of the dialect by name, defaults filled in
Read = Callable[[Values, int | None], dict[str, Any]]
Write = Callable[[BatchNormSpec, Values, int | None], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Word:
    """Arguments that are read and written together.

    Attributes:
        arguments: their names and defaults.
        fields: the spec fields they say; empty where none depends on them.
        read: (values, rank of the input or None) to spec fields. Raises DialectError, the argument named.
        write: (spec, values written so far, rank) to arguments.
        quiet: written only where they differ from their defaults; for arguments that not every version takes.
    """

    arguments: Values
    fields: tuple[str, ...]
    read: Read
    write: Write
    _: KW_ONLY
    quiet: bool = False


def complement(value: float) -> float:
    """1 - value, so that the decimals people write come back: .1 and .9, .01 and .99, .001 and .999.

    Where the decimal complement of `repr(value)` leads back to `value` it is the answer, else 1.0 - value. For
    0.5 <= value <= 1, and for any decimal of up to 15 places, complement(complement(value)) == value. A value below
    0.5 with more digits than that may come back rounded, by at most 2**-53.
    """
    decimal = _decimal_complement(value)
    return decimal if _decimal_complement(decimal) == value else 1.0 - value


def _decimal_complement(value: float) -> float:
    return float(1 - Fraction(repr(float(value))))


def number(name: str, default: Any, field: str) -> Word:
    """A number that means the same as `field`."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        return {field: _number(name, values[name])}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        value = getattr(spec, field)
        return {name: default if isinstance(value, str) else value}  # "cumulative" is nobody's number

    return Word({name: default}, (field,), read, write)


def weight_on_new(name: str, default: float) -> Word:
    """torch's momentum: the weight on the new statistics, or None for the cumulative average."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        if values[name] is None:
            return {"decay": "cumulative"}
        given = _number(name, values[name])
        if not 0.0 <= given <= 1.0:
            raise DialectError(f"{name} must be in [0, 1] or None; got {given!r}.")
        return {"decay": complement(given)}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {name: None if isinstance(spec.decay, str) else complement(spec.decay)}

    return Word({name: default}, ("decay",), read, write)


def flag(name: str, default: Any, *fields: str, quiet: bool = False) -> Word:
    """A boolean that says each of `fields`, such as Equinox's `channelwise_affine` for gamma and beta at once."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        return dict.fromkeys(fields, _flag(name, values[name]))

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {name: any(getattr(spec, field) for field in fields)}

    return Word({name: default}, fields, read, write, quiet=quiet)


def affine_and_bias() -> tuple[Word, Word]:
    """torch's `affine` (gamma, and beta too) and `bias` (beta; without `affine` it says nothing)."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        return {"scale": _flag("affine", values["affine"])}

    def read_bias(values: Values, _: int | None) -> dict[str, Any]:
        return {"center": _flag("bias", values["bias"]) and _flag("affine", values["affine"])}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {"affine": spec.scale or spec.center}

    def write_bias(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {"bias": spec.center or not spec.scale}

    return (
        Word({"affine": True}, ("scale",), read, write),
        Word({"bias": True}, ("center",), read_bias, write_bias, quiet=True),
    )


def channel_axis(default: int, *, sequences: bool) -> Word:
    """`axis`: the channel axis, as an integer, or where the framework allows it as a sequence of one."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        return {"axis": _axis(values["axis"], sequences)}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {"axis": spec.axis}

    return Word({"axis": default}, ("axis",), read, write)


def data_format(default: str, read_format: Callable[[str], int | None], first: str) -> Word:
    """`data_format`: `default` for channels on axis -1, `first` for axis 1; `read_format` knows the other spellings."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        given = values["data_format"]
        axis = read_format(given) if isinstance(given, str) else None
        if axis is None:
            raise DialectError(f"data_format must be a layout such as {default!r} or {first!r}; got {given!r}.")
        return {"axis": axis}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {"data_format": first if spec.axis == 1 else default}

    return Word({"data_format": default}, ("axis",), read, write)


def renormalization(decay: str) -> Word:
    """`renorm`, `renorm_clipping` and the decay of its averages, which Keras calls a momentum and contrib a decay."""
    keys = {"rmax": "r_max", "rmin": "r_min", "dmax": "d_max"}
    default = 0.99

    def read(values: Values, _: int | None) -> dict[str, Any]:
        if not _flag("renorm", values["renorm"]):
            return {"renorm": None}
        clipping = values["renorm_clipping"] or {}
        if not isinstance(clipping, Mapping) or set(clipping) - set(keys):
            raise DialectError(f"renorm_clipping must be None or have keys among {', '.join(keys)}; got {clipping!r}.")
        # An infinite clip is none: Keras and tf.layers take it as one.
        clips = {keys[key]: None if value == math.inf else value for key, value in clipping.items()}
        return {"renorm": Renorm(**clips, decay=_number(decay, values[decay]))}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        if spec.renorm is None:
            return {"renorm": False, "renorm_clipping": None, decay: default}
        clips = {key: getattr(spec.renorm, ours) for key, ours in keys.items()}
        clipping = {key: value for key, value in clips.items() if value is not None}
        return {"renorm": True, "renorm_clipping": clipping or None, decay: spec.renorm.decay}

    return Word({"renorm": False, "renorm_clipping": None, decay: default}, ("renorm",), read, write, quiet=True)


def ghost_batches() -> Word:
    """`virtual_batch_size`."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        return {"virtual_batch_size": values["virtual_batch_size"]}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {"virtual_batch_size": spec.virtual_batch_size}

    return Word({"virtual_batch_size": None}, ("virtual_batch_size",), read, write, quiet=True)


def zero_debias_mean(name: str) -> Word:
    """A flag that debiases the moving mean and leaves the variance."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        return {"zero_debias": "mean" if _flag(name, values[name]) else "none"}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {name: spec.zero_debias != "none"}

    return Word({name: False}, ("zero_debias",), read, write, quiet=True)


def replica_axis(name: str) -> Word:
    """A mapped axis to average over: `synchronized` where one is named.

    A spec does not know the name; "batch" is written, and a mapping without that name fails loudly.
    """

    def read(values: Values, _: int | None) -> dict[str, Any]:
        return {"synchronized": values[name] is not None}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {name: "batch" if spec.synchronized else None}

    return Word({name: None}, ("synchronized",), read, write, quiet=True)


def example_axis(name: str) -> Word:
    """Equinox's `axis_name`: the vmapped batch axis, and in a sequence the replicas' axes beside it.

    Equinox insists on it, but no number depends on what a single axis is called, so it may be left out here.
    """

    def read(values: Values, _: int | None) -> dict[str, Any]:
        given = values[name]
        return {"synchronized": isinstance(given, (list, tuple)) and len(given) > 1}

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        return {name: ("batch", "replicas") if spec.synchronized else "batch"}

    return Word({name: "batch"}, ("synchronized",), read, write)


def dtype(name: str, default: Any, *fields: str, meanings: Mapping[str, str] | None = None) -> Word:
    """A dtype, or its name, for each of `fields`; `default` means float32.

    `meanings` maps a name to the dtype of the variables where the two differ, as Keras's mixed policies do. Names are
    written, because this package imports no framework.
    """
    meanings = meanings or {}

    def read(values: Values, _: int | None) -> dict[str, Any]:
        given = values[name]
        called = "float32" if given is None else dtype_name(given)
        return dict.fromkeys(fields, meanings.get(called, called))

    def write(spec: BatchNormSpec, _: Values, __: int | None) -> dict[str, Any]:
        wanted = getattr(spec, fields[0])
        return {name: default if wanted == "float32" else wanted}

    return Word({name: default}, fields, read, write, quiet=True)


def fused_kernel(used: Callable[[Values, int], bool], *, insists: bool) -> Word:
    """`fused`: the fused kernel stores the unbiased variance, everything else the biased one.

    `used(values, rank)` says where it runs. With `insists`, fused=True is an error where it does not.
    """

    def verdict(values: Values, rank: int | None) -> bool | None:
        if rank is not None:
            return used(values, rank)
        # Without a rank there is an answer where all ranks agree.
        verdicts = {used(values, each) for each in (2, 3, 4, 5)}
        return verdicts.pop() if len(verdicts) == 1 else None

    def read(values: Values, rank: int | None) -> dict[str, Any]:
        fused = values["fused"]
        if fused is not None:
            _flag("fused", fused)
        runs = verdict(values, rank)
        if runs is None:
            raise DialectError(
                "whether the moving variance is biased depends on the rank of the input; give rank= (2 for (N, C), 4"
                " for images), or fused=False."
            )
        if fused and insists and not runs:
            raise DialectError("the fused kernel does not take this, so fused=True is refused; leave fused out.")
        return {"moving_variance_estimator": "unbiased" if runs else "biased"}

    def write(spec: BatchNormSpec, values: Values, rank: int | None) -> dict[str, Any]:
        avoided = spec.moving_variance_estimator == "biased" and verdict({**values, "fused": None}, rank) is not False
        return {"fused": False if avoided else None}

    return Word({"fused": None}, ("moving_variance_estimator",), read, write, quiet=True)


def neutral(**defaults: Any) -> Word:
    """Arguments that any value may have: no spec field depends on them."""
    return Word(defaults, (), lambda values, rank: {}, lambda spec, values, rank: {}, quiet=True)


def only(name: str, default: Any, why: str, *accepted: Any) -> Word:
    """An argument that must be `default`, or one of `accepted` where any are named; of those the first is written."""
    allowed = accepted or (default,)

    def read(values: Values, _: int | None) -> dict[str, Any]:
        given = values[name]
        if not any(given is value or (type(given) is type(value) and given == value) for value in allowed):
            raise DialectError(f"{name}={given!r} cannot be said as a spec: {why}")
        return {}

    return Word({name: default}, (), read, lambda spec, values, rank: {name: allowed[0]}, quiet=True)


def initializer(name: str, default: Any, usual: str) -> Word:
    """An initializer that must be the usual one, as a name, an object or a serialized object."""

    def read(values: Values, _: int | None) -> dict[str, Any]:
        given = values[name]
        called = given.get("class_name") if isinstance(given, Mapping) else given
        called = called if isinstance(called, str) else type(given).__name__
        if given is not None and called.lower() != usual:
            raise DialectError(
                f"{name}={given!r} cannot be said as a spec, which holds no arrays: leave it out, and give the layer"
                " a BatchNormState with those values."
            )
        return {}

    return Word({name: default}, (), read, lambda spec, values, rank: {}, quiet=True)


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise DialectError(f"{name} must be a number; got {value!r}.")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise DialectError(f"{name} must be True or False; got {value!r}.")
    return bool(value)


def _axis(value: Any, sequences: bool) -> Any:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    if not sequences:
        raise DialectError(f"axis must be an integer; got {value!r}.")
    if len(value) != 1:
        raise DialectError(f"axis must be one channel axis; got {value!r}, and a spec has exactly one.")
    return value[0]


def dtype_name(value: Any) -> str:
    """The name of a dtype of any framework, or of a Keras dtype policy, serialized or not."""
    if isinstance(value, Mapping):
        config = value.get("config")
        value = config.get("name") if isinstance(config, Mapping) else value
    if isinstance(value, str):
        return value
    try:
        return str(np.dtype(value).name)
    except TypeError:
        return str(getattr(value, "name", value)).removeprefix("torch.")
