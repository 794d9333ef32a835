"""What a batch norm has learned: `BatchNormState`, its parameters, moving statistics and counter.

One class for every framework: in the core and in files its arrays are numpy's; a backend's function takes and returns
the same class with the framework's own arrays in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import ml_dtypes
import numpy as np

from .errors import StateError

if TYPE_CHECKING:
    from pathlib import Path

    from .spec import BatchNormSpec

Array = TypeVar("Array")

# Value of each array in a layer that never trained; DESIGN's one meaning, whatever a framework starts from.
_INITIAL: Final = {
    "gamma": 1.0,
    "beta": 0.0,
    "moving_mean": 0.0,
    "moving_variance": 1.0,
    "hidden_mean": 0.0,
    "hidden_variance": 0.0,
    "renorm_mean": 0.0,
}
_PARAMETERS: Final = ("gamma", "beta")
_NOT_NEGATIVE: Final = ("moving_variance", "hidden_variance", "renorm_stddev", "moving_stddev")
MAX_COUNTER: Final = 2**63 - 1


@dataclass(frozen=True, eq=False)
class BatchNormState(Generic[Array]):
    """Parameters, moving statistics and counter of one batch norm: enough to go on training where another stopped.

    Arrays have shape (num_features,). Which are present follows from the spec (`array_names`); an absent one is None.

    Attributes:
        gamma, beta: scale and offset, of the spec's `param_dtype`.
        moving_mean, moving_variance: what eval normalizes with, of `stats_dtype`.
        num_updates: how many updates have entered the moving statistics; None where the source did not count.
        hidden_mean, hidden_variance: the averages before their zero-debias division.
        renorm_mean, renorm_stddev, moving_stddev: the averages of batch renormalization.
    """

    _: KW_ONLY
    gamma: Array | None = None
    beta: Array | None = None
    moving_mean: Array | None = None
    moving_variance: Array | None = None
    num_updates: Any = 0
    hidden_mean: Array | None = None
    hidden_variance: Array | None = None
    renorm_mean: Array | None = None
    renorm_stddev: Array | None = None
    moving_stddev: Array | None = None

    @classmethod
    def initial(cls, spec: BatchNormSpec) -> BatchNormState[np.ndarray[Any, Any]]:
        """The numpy state of a layer that never trained: gamma 1, beta 0, moving mean 0, moving variance 1."""
        fill = dict(_INITIAL)
        # renorm averages a standard deviation, which at moving variance 1 is this (DESIGN: sqrt(moving_variance+eps)).
        fill["renorm_stddev"] = fill["moving_stddev"] = (1.0 + spec.epsilon) ** 0.5
        return BatchNormState(
            **{name: np.full(spec.num_features, fill[name], array_dtype(spec, name)) for name in array_names(spec)}
        )

    def arrays(self) -> dict[str, Array]:
        """The arrays that are present, by name; the counter is not among them."""
        every = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "num_updates"}
        return {name: array for name, array in every.items() if array is not None}

    def replace(self, **changes: Any) -> BatchNormState[Array]:
        """This state with some arrays changed."""
        known = [f.name for f in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise StateError(f"BatchNormState has no {', '.join(unknown)}; it has {', '.join(known)}.")
        return dataclasses.replace(self, **changes)

    def copy(self) -> BatchNormState[np.ndarray[Any, Any]]:
        """This numpy state, sharing no memory with it."""
        return BatchNormState(
            **{name: np.array(array) for name, array in self.arrays().items()}, num_updates=self.num_updates
        )

    def astype(self, spec: BatchNormSpec) -> BatchNormState[np.ndarray[Any, Any]]:
        """This state, its numpy arrays in the dtypes of `spec`: the explicit word where `checked` refuses a dtype."""
        return BatchNormState(
            **{name: np.asarray(array).astype(array_dtype(spec, name)) for name, array in self.arrays().items()},
            num_updates=self.num_updates,
        )

    def checked(self, spec: BatchNormSpec) -> BatchNormState[np.ndarray[Any, Any]]:
        """A copy of this numpy state, proven to fit `spec`: what every backend calls before it loads one.

        A plain state fits a spec with zero_debias or renorm too: the averages behind the moving statistics that it
        lacks follow from these (`_behind`).

        Raises:
            StateError: an array is missing, extra, or has another shape or dtype; a variance is negative; the counter
                is negative, or missing where the average depends on it.
        """
        counter = _checked_counter(self.num_updates, spec)
        wanted, given = array_names(spec), self.arrays()
        extra = [name for name in given if name not in wanted]
        if extra:
            raise StateError(
                f"the state has {', '.join(extra)}, which this spec has no place for; it takes {_listed(wanted)}."
            )
        held = {name: _checked_array(name, given[name], spec) for name in wanted if name in given}
        held = {**_behind(held, spec, counter), **held}
        missing = [name for name in wanted if name not in held]
        if missing:
            raise StateError(f"the state lacks {', '.join(missing)}, which this spec needs; it has {_listed(given)}.")
        return BatchNormState(**{name: held[name] for name in wanted}, num_updates=counter)

    def to_npz(self, path: str | Path) -> None:
        """Write this numpy state to an `.npz` file: one member an array, and `num_updates`.

        numpy's file format cannot name bfloat16, so such an array is stored as its bits (uint16) and the member
        `dtypes`, a JSON object, says so.

        Raises:
            StateError: an array is not a vector of a spec's dtype, or the counter is not a count; nothing is written.
            OSError: the file cannot be written.
        """
        from .state_file import write  # here, since most programs write no such file

        write(self, path)

    @classmethod
    def from_npz(cls, path: str | Path) -> BatchNormState[np.ndarray[Any, Any]]:
        """Read what `to_npz` wrote. The file is not trusted: no code runs, and damage is an error.

        Raises:
            FileError: the file is not such an `.npz`, or is damaged.
            OSError: the file cannot be opened.
        """
        from .state_file import read

        return read(path)


def array_names(spec: BatchNormSpec) -> tuple[str, ...]:
    """Which arrays a state of this spec has, in their order."""
    moving = spec.track_moving_stats
    present = {
        "gamma": spec.scale,
        "beta": spec.center,
        "moving_mean": moving,
        "moving_variance": moving,
        "hidden_mean": spec.zero_debias in ("mean", "all"),
        "hidden_variance": spec.zero_debias == "all",
        "renorm_mean": spec.renorm is not None,
        "renorm_stddev": spec.renorm is not None,
        "moving_stddev": spec.renorm is not None,
    }
    return tuple(name for name, there in present.items() if there)


def array_dtype(spec: BatchNormSpec, name: str) -> np.dtype[Any]:
    """The dtype of the state array `name`."""
    return numpy_dtype(spec.param_dtype if name in _PARAMETERS else spec.stats_dtype)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a spec's dtype name; bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def needs_counter(spec: BatchNormSpec) -> bool:
    """Whether the averages depend on the number of updates, so that the counter must be carried."""
    return spec.decay == "cumulative" or spec.zero_debias != "none"


def _behind(held: Mapping[str, np.ndarray[Any, Any]], spec: BatchNormSpec, counter: int) -> dict[str, Any]:
    """What a plain state's moving statistics say about the averages behind them.

    zero_debias divides the hidden averages by 1 - decay**t, so they are the moving ones times that. renorm's averages
    take the moving mean, and sqrt(moving_variance + epsilon) for the standard deviation.
    """
    if "moving_mean" not in held or "moving_variance" not in held:
        return {}
    mean, variance = held["moving_mean"].astype(np.float64), held["moving_variance"].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # statistics may be NaN, and stay so
        seen = 0.0 if spec.decay == "cumulative" else 1.0 - float(spec.decay) ** counter
        stddev = np.sqrt(variance + spec.epsilon)
        behind = {
            "hidden_mean": mean * seen,
            "hidden_variance": variance * seen,
            "renorm_mean": mean,
            "renorm_stddev": stddev,
            "moving_stddev": stddev,
        }
        return {n: behind[n].astype(array_dtype(spec, n)) for n in array_names(spec) if n in behind}


def _checked_array(name: str, value: Any, spec: BatchNormSpec) -> np.ndarray[Any, Any]:
    array, shape, dtype = np.array(value), (spec.num_features,), array_dtype(spec, name)
    array = array.astype(array.dtype.newbyteorder("="))
    if array.shape != shape:
        raise StateError(f"{name} must have shape {shape}; got {array.shape}.")
    if array.dtype != dtype:
        raise StateError(f"{name} must be {dtype.name}; got {array.dtype.name}. Convert it with state.astype(spec).")
    if name in _NOT_NEGATIVE and bool((array < 0).any()):
        channel = int(np.flatnonzero(array < 0)[0])
        raise StateError(f"{name} must not be negative; channel {channel} has {array[channel]!s}.")
    return array


def _checked_counter(value: Any, spec: BatchNormSpec) -> int:
    if value is None:
        if needs_counter(spec):
            raise StateError("num_updates is unknown, and this spec's averages depend on it; give num_updates.")
        return 0
    return checked_count(value)


def checked_count(value: Any) -> int:
    """A counter as a Python integer, or StateError."""
    array = np.asarray(value)
    if array.shape != () or array.dtype.kind not in "iu" or not 0 <= int(array) <= MAX_COUNTER:
        raise StateError(f"num_updates must be an integer from 0 to {MAX_COUNTER}; got {value!r}.")
    return int(array)


def _listed(names: Any) -> str:
    return ", ".join(names) or "nothing"
