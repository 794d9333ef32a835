"""The vectors as the runner sees them: read from JSON, strictly, into plain dataclasses.

The format is defined by `schema.json`; docs/conformance.md explains it. Reading needs numpy only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from math import inf, nan, prod
from typing import Any, Final

import numpy as np

from bnlayer.errors import BatchNormError
from bnlayer.state import numpy_dtype

NDArray = np.ndarray[Any, np.dtype[Any]]

SCHEMA: Final = "bnlayer-vectors/1"
_WORDS: Final = {"nan": nan, "inf": inf, "-inf": -inf}


class VectorError(BatchNormError, ValueError):
    """A vector file does not follow the schema."""


@dataclass(frozen=True, eq=False)
class Expected:
    """An array that must come out.

    Attributes:
        dtype: its dtype by name.
        values: exact results rounded to float64; `nan` where NaN must come out.
        tolerance: allowed absolute error of each element.
        nonfinite: True where NaN or an infinity must come out, whichever.
    """

    dtype: str
    values: NDArray
    tolerance: NDArray
    nonfinite: NDArray


@dataclass(frozen=True, eq=False)
class VectorCall:
    """One call's inputs, already in the memory layout the vector asks for, and what must come out of it."""

    x: NDArray
    dy: NDArray | None
    weights: NDArray | None
    adjustment: tuple[NDArray, NDArray] | None
    direction: NDArray | None
    expect: Mapping[str, Expected]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the scenario.

    Attributes:
        do: "train", "eval", "call_twice", "set" or "rebuild".
        calls: of the first three.
        update_stats, frozen_statistics, renorm_clips, shards: of the first three.
        expect: dgamma, dbeta and the state's arrays after the step.
        num_updates: the counter after the step.
        state: what "set" changes: arrays by name, or num_updates.
    """

    do: str
    calls: tuple[VectorCall, ...]
    update_stats: bool
    frozen_statistics: bool
    renorm_clips: Mapping[str, float | None] | None
    shards: tuple[int, ...] | None
    expect: Mapping[str, Expected]
    num_updates: int | None
    state: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Refusal:
    """What an invalid vector must run into: an error class of `bnlayer.errors`, at "spec", "state" or a step."""

    error: str
    at: str | int


@dataclass(frozen=True, eq=False)
class Vector:
    """A scenario: a spec, a starting state, steps, and everything that must come out.

    `spec` and `state` are the document's own words: an invalid vector may hold what no spec or state can.
    """

    id: str
    group: str
    comment: str
    result: str
    spec: Mapping[str, Any]
    state: Mapping[str, Any] | None
    steps: tuple[Step, ...]
    refusal: Refusal | None


def groups() -> list[str]:
    """The names of the suite's groups, which are its files."""
    return sorted(entry.name.removesuffix(".json") for entry in _folder().iterdir() if entry.name.endswith(".json"))


def load(pattern: str = "*") -> list[Vector]:
    """The suite's vectors whose id (such as "epsilon/tiny-variance-1e-8") matches a glob pattern.

    Raises:
        VectorError: a file does not follow the schema.
    """
    return [vector for group in groups() for vector in read(group) if fnmatchcase(vector.id, pattern)]


def read(group: str) -> Iterator[Vector]:
    """The vectors of one group, in the file's order."""
    document = json.loads((_folder() / f"{group}.json").read_text("utf-8"))
    yield from parse(document, group)


def parse(document: Any, group: str) -> Iterator[Vector]:
    """The vectors of a parsed document.

    Raises:
        VectorError: the document does not follow the schema; the message names the vector and the key.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise VectorError(f"{group}: expected a vector document with schema {SCHEMA!r}.")
    for entry in document["vectors"]:
        try:
            yield _vector(entry, group)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise VectorError(
                f"{group}: vector {entry.get('id', '?')!r} does not follow {SCHEMA}: {error!r}"
            ) from error


def array(entry: Mapping[str, Any]) -> NDArray:
    """An array of the document in its own dtype: shortest decimals, NaN and infinities by name."""
    numbers = np.array([_WORDS[n] if isinstance(n, str) else n for n in entry["data"]], _wide(entry["dtype"]))
    return numbers.reshape(entry["shape"]).astype(_dtype(entry["dtype"]))


def laid_out(values: NDArray, view: str) -> NDArray:
    """The same values in another memory layout: contiguous, transposed, strided, offset or channels_last.

    transposed: axes reversed in memory. strided: every second element of a larger array along the batch axis, filled
    with NaN in between. offset: inside a larger array, starting past its beginning on every axis. channels_last: axis
    1 is the last in memory.
    """
    if view == "contiguous":
        return np.ascontiguousarray(values)
    if view == "transposed":
        return np.ascontiguousarray(values.T).T
    if view == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 1, -1)), -1, 1)
    if view == "strided":
        room = np.full((2 * values.shape[0], *values.shape[1:]), nan, values.dtype)
        inside = room[::2]
    elif view == "offset":
        room = np.full(tuple(length + 2 for length in values.shape), nan, values.dtype)
        inside = room[tuple(slice(1, -1) for _ in values.shape)]
    else:
        raise VectorError(f"unknown view {view!r}.")
    inside[...] = values
    return inside


def _folder() -> Any:
    return files("bnlayer_conformance") / "vectors"


def _vector(entry: Any, group: str) -> Vector:
    refusal = entry.get("refusal")
    return Vector(
        id=entry["id"],
        group=group,
        comment=entry["comment"],
        result=entry["result"],
        spec=entry["spec"],
        state=entry["state"],
        steps=tuple(_step(step) for step in entry["steps"]),
        refusal=None if refusal is None else Refusal(refusal["error"], refusal["at"]),
    )


def _step(entry: Any) -> Step:
    expect = entry.get("expect", {})
    return Step(
        do=entry["do"],
        calls=tuple(_call(call) for call in entry.get("calls", ())),
        update_stats=entry.get("update_stats", True),
        frozen_statistics=entry.get("frozen_statistics", False),
        renorm_clips=entry.get("renorm_clips"),
        shards=None if entry.get("shards") is None else tuple(entry["shards"]),
        expect={name: _expected(value) for name, value in expect.items() if name != "num_updates"},
        num_updates=expect.get("num_updates"),
        state={n: v if n == "num_updates" else array(v) for n, v in entry.get("state", {}).items()},
    )


def _call(entry: Any) -> VectorCall:
    dy, weights, adjustment = entry.get("dy"), entry.get("weights"), entry.get("adjustment")
    direction = entry.get("direction")
    return VectorCall(
        x=laid_out(array(entry["x"]), entry.get("view", "contiguous")),
        dy=None if dy is None else laid_out(array(dy), entry.get("dy_view", "contiguous")),
        weights=None if weights is None else array(weights),
        adjustment=None if adjustment is None else (array(adjustment["scale"]), array(adjustment["bias"])),
        direction=None if direction is None else array(direction),
        expect={name: _expected(value) for name, value in entry.get("expect", {}).items()},
    )


def _expected(entry: Any) -> Expected:
    shape, data, tolerance = tuple(entry["shape"]), entry["data"], entry["tolerance"]
    if not isinstance(tolerance, list):
        tolerance = [tolerance] * prod(shape)
    values = np.array([nan if n == "nonfinite" else _WORDS[n] if isinstance(n, str) else n for n in data], np.float64)
    return Expected(
        dtype=entry["dtype"],
        values=values.reshape(shape),
        tolerance=np.array(tolerance, np.float64).reshape(shape),
        nonfinite=np.array([n == "nonfinite" for n in data], bool).reshape(shape),
    )


def _dtype(name: str) -> np.dtype[Any]:
    return numpy_dtype(name) if name != "bool" else np.dtype(bool)


def _wide(name: str) -> Any:
    """A dtype that holds the document's numbers before they become `name`: integers must not pass through floats."""
    dtype = _dtype(name)
    return dtype if dtype.kind in "biuc" else np.float64
