"""How a case is written down, and how it becomes a vector.

A case names a spec, a starting state and steps; data that it does not give is drawn by the case's own id. `vector`
asks the oracle what must come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_UP, Context
from math import isfinite, isnan
from typing import Any

import ml_dtypes
import numpy as np
from mpmath import mp, mpf

from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_dtype, array_names

from .. import oracle
from . import draw

NDArray = np.ndarray[Any, np.dtype[Any]]
Data = Any  # nested lists or an array


@dataclass(frozen=True)
class CallCase:
    """One call. What is None is drawn (x, dy) or absent (weights).

    Attributes:
        shape, dtype, mean, std: of a drawn x; mean and std may be one number per channel.
        x, dy, weights: given data. dy=False asks for no gradients.
        poison: places of x (index tuples) and what to put there.
        adjustment: scale and bias, of x's dtype.
        masked_dy: dy is 0 wherever the weights are 0.
        direction: True: also ask for the second order, along a drawn direction of standard deviation `direction_std`.
    """

    shape: tuple[int, ...] = (8, 3)
    dtype: str = "float32"
    mean: Any = 0.5
    std: Any = 1.5
    x: Data = None
    dy: Data = None
    weights: Data = None
    weights_dtype: str = "bool"
    adjustment: tuple[Data, Data] | None = None
    view: str = "contiguous"
    dy_view: str = "contiguous"
    poison: Mapping[tuple[Any, ...], float] = field(default_factory=dict)
    masked_dy: bool = False
    direction: Any = None
    direction_std: float = 1.0


@dataclass(frozen=True)
class StepCase:
    """One step: "train", "eval", "call_twice", "set" or "rebuild"."""

    do: str
    calls: tuple[CallCase, ...] = ()
    update_stats: bool = True
    frozen_statistics: bool = False
    renorm_clips: Mapping[str, float | None] | None = None
    shards: tuple[int, ...] | None = None
    state: Mapping[str, Data] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One case; see `valid` and `invalid`."""

    name: str
    comment: str
    spec: Mapping[str, Any]
    steps: tuple[StepCase, ...]
    state: Mapping[str, Data] | str = "drawn"
    result: str = "valid"
    refusal: tuple[str, str | int] | None = None


def train(**options: Any) -> StepCase:
    """A training step of one call; options of the step and of the call together."""
    return _one("train", options)


def evaluate(**options: Any) -> StepCase:
    """An eval step of one call; options of the step and of the call together."""
    return _one("eval", options)


def _one(do: str, options: dict[str, Any]) -> StepCase:
    step = {n: options.pop(n) for n in ("update_stats", "frozen_statistics", "renorm_clips", "shards") if n in options}
    return StepCase(do, (CallCase(**options),), **step)


def call_twice(first: Mapping[str, Any], second: Mapping[str, Any], **options: Any) -> StepCase:
    """Two training calls of the same layer, then one backward pass through both."""
    return StepCase("call_twice", (CallCase(**first), CallCase(**second)), **options)


def set_state(**state: Data) -> StepCase:
    """Change parameters or statistics between steps."""
    return StepCase("set", state=state)


def rebuild() -> StepCase:
    """Export the state, build a new layer from it, go on there."""
    return StepCase("rebuild")


def valid(name: str, comment: str, spec: Mapping[str, Any], *steps: StepCase, state: Any = "drawn") -> Case:
    """A case that every backend must get right.

    `spec` holds the fields that differ from `BASE`. `state` is "drawn", "initial", or arrays to put over drawn ones.
    """
    return Case(name, comment, spec, steps, state)


def invalid(
    name: str,
    comment: str,
    spec: Mapping[str, Any],
    *steps: StepCase,
    error: str,
    at: str | int,
    state: Any = "initial",
) -> Case:
    """A case that every backend must refuse with `error`, at "spec", "state" or the step of that number."""
    return Case(name, comment, spec, steps, state, "invalid", (error, at))


BASE: Mapping[str, Any] = BatchNormSpec(
    3, axis=-1, epsilon=1e-3, decay=0.9, moving_variance_estimator="biased", single_value="raise"
).to_dict()


def vector(group: str, case: Case) -> dict[str, Any]:
    """The vector of a case: its inputs, and for a valid one everything that must come out."""
    name = f"{group}/{case.name}"
    document: dict[str, Any] = {"id": name, "comment": case.comment, "result": case.result}
    spec_fields = {**BASE, **case.spec}
    document["spec"] = spec_fields
    spec = _spec(spec_fields, case)
    state = _starting_state(name, spec, case)
    document["state"] = None if state is None else _state_document(state)
    if case.refusal is not None:
        document["refusal"] = {"error": case.refusal[0], "at": case.refusal[1]}
    # A state that must be refused leads nowhere; the spec's initial one stands in for it.
    leads = state is not None and (case.refusal is None or case.refusal[1] != "state")
    truth = _oracle_state(state if leads and state else _fields(BatchNormState.initial(spec)), spec)
    document["steps"] = []
    for index, step in enumerate(case.steps):
        refused = case.refusal is not None and case.refusal[1] in ("spec", "state", index)
        entry, truth = _step(f"{name}/{index}", spec, truth, step, refused=refused)
        document["steps"].append(entry)
        if refused:
            break
    return document


def _spec(fields: Mapping[str, Any], case: Case) -> BatchNormSpec:
    """The case's spec; where the spec itself is what is invalid, any spec serves to draw data for."""
    if case.refusal is not None and case.refusal[1] == "spec":
        return BatchNormSpec.from_dict(BASE)
    return BatchNormSpec.from_dict(fields)


def _starting_state(name: str, spec: BatchNormSpec, case: Case) -> dict[str, Any] | None:
    if case.state == "initial":
        return None
    c = spec.num_features
    drawn: dict[str, Any] = {
        "gamma": draw.uniform(f"{name}/gamma", (c,), "float64", 0.5, 1.5),
        "beta": draw.normal(f"{name}/beta", (c,), "float64"),
        "moving_mean": draw.normal(f"{name}/moving_mean", (c,), "float64"),
        "moving_variance": draw.uniform(f"{name}/moving_variance", (c,), "float64", 0.5, 2.0),
        "hidden_mean": np.zeros(c),
        "hidden_variance": np.zeros(c),
        "renorm_mean": draw.normal(f"{name}/renorm_mean", (c,), "float64", mean=0.5, std=0.5),
        "renorm_stddev": draw.uniform(f"{name}/renorm_stddev", (c,), "float64", 1.0, 2.0),
        "moving_stddev": draw.uniform(f"{name}/moving_stddev", (c,), "float64", 0.75, 1.5),
    }
    state = {n: drawn[n].astype(array_dtype(spec, n)) for n in array_names(spec)}
    state["num_updates"] = 0
    for key, given in case.state.items() if isinstance(case.state, Mapping) else ():
        if key == "num_updates":
            state[key] = given
        elif given is None:
            state.pop(key)  # an invalid case: the array is missing
        else:
            state[key] = _given(given, array_dtype(spec, key))
    return state


def _given(data: Data, dtype: np.dtype[Any]) -> NDArray:
    return data if isinstance(data, np.ndarray) else np.array(data, np.float64).astype(dtype)


def _fields(state: BatchNormState[Any]) -> dict[str, Any]:
    return {**state.arrays(), "num_updates": state.num_updates}


def _oracle_state(state: Mapping[str, Any], spec: BatchNormSpec) -> oracle.State:
    def numbers(name: str) -> list[Any] | None:
        return None if state.get(name) is None else exact(state[name])

    names = _averages(spec)
    averages = None
    if names:
        columns = [numbers(name) or [] for name in names]
        averages = [
            {n: oracle.Tracked(v) for n, v in zip(names, channel, strict=True)}
            for channel in zip(*columns, strict=True)
        ]
    counter = state["num_updates"]
    return oracle.State(numbers("gamma"), numbers("beta"), averages, 0 if counter is None else counter)


def _averages(spec: BatchNormSpec) -> list[str]:
    return [name for name in array_names(spec) if name not in ("gamma", "beta")]


def _step(
    name: str, spec: BatchNormSpec, truth: oracle.State, step: StepCase, *, refused: bool
) -> tuple[dict[str, Any], oracle.State]:
    entry: dict[str, Any] = {"do": step.do}
    if step.do == "set":
        new = {k: v if k == "num_updates" else _given(v, array_dtype(spec, k)) for k, v in step.state.items()}
        entry["state"] = _state_document(new)
        return entry, truth if refused else _overlaid(truth, new, spec)
    if step.do == "rebuild":
        return entry, truth
    if not step.update_stats:
        entry["update_stats"] = False
    if step.frozen_statistics:
        entry["frozen_statistics"] = True
    if step.renorm_clips is not None:
        entry["renorm_clips"] = dict(step.renorm_clips)
    if step.shards is not None:
        entry["shards"] = list(step.shards)
    drawn = [_drawn(f"{name}/{i}", spec, call) for i, call in enumerate(step.calls)]
    entry["calls"] = [_call_document(call) for call in drawn]
    if refused:
        return entry, truth
    results, after = oracle.step(
        spec.to_dict(),
        truth,
        [_one_call(spec, call) for call in drawn],
        training=step.do != "eval",
        update_stats=step.update_stats,
        frozen_statistics=step.frozen_statistics,
        renorm_clips=None if step.renorm_clips is None else dict(step.renorm_clips),
    )
    digits = 17 if any(call.dtype == "float64" for call in drawn) else 12
    for document, call, result in zip(entry["calls"], drawn, results, strict=True):
        assert call.x is not None
        expect = {"y": _expected(result.y, call.dtype, call.x.shape, digits)}
        if result.dx is not None:
            expect["dx"] = _expected(result.dx, call.dtype, call.x.shape, digits)
        if result.dweights is not None:
            expect["dweights"] = _expected(result.dweights, call.weights_dtype, call.weights.shape, digits)
        if result.hvp is not None:
            expect["hvp"] = _expected(result.hvp, call.dtype, call.x.shape, digits)
        document["expect"] = expect
    expect = {}
    for key in ("dgamma", "dbeta"):
        parts = [part for result in results if (part := getattr(result, key)) is not None]
        if parts:
            expect[key] = _expected(_summed(parts), spec.param_dtype, (spec.num_features,), digits)
    expect.update(_state_expected(after, spec, digits))
    entry["expect"] = expect
    return entry, after


def _drawn(name: str, spec: BatchNormSpec, call: CallCase) -> CallCase:
    """The call with all its data."""
    if call.x is None:
        x = draw.normal(f"{name}/x", call.shape, call.dtype, mean=call.mean, std=call.std, axis=spec.axis)
    else:
        x = call.x if isinstance(call.x, np.ndarray) else np.array(call.x).astype(_dtype(call.dtype))
    for place, value in call.poison.items():
        x[place] = value
    weights = call.weights
    if weights is not None and not isinstance(weights, np.ndarray):
        weights = np.array(weights).astype(_dtype(call.weights_dtype))
    dy: Any = call.dy
    if dy is None:
        dy = draw.normal(f"{name}/dy", x.shape, call.dtype)
        if call.masked_dy and weights is not None:
            dy = np.where(_spread(spec, x.shape, weights) > 0, dy, np.zeros((), dy.dtype))
    elif dy is False:
        dy = None
    elif not isinstance(dy, np.ndarray):
        dy = np.array(dy).astype(_dtype(call.dtype))
    if weights is not None:
        call = replace(call, weights_dtype=weights.dtype.name)
    if call.adjustment is not None:
        scale, bias = (np.array(part).astype(x.dtype) for part in call.adjustment)
        call = replace(call, adjustment=(scale, bias))
    direction = call.direction
    if direction is True:
        direction = draw.normal(f"{name}/direction", x.shape, call.dtype, std=call.direction_std)
    elif direction is not None:
        direction = np.array(direction).astype(x.dtype)
    return replace(call, x=x, dy=dy, weights=weights, dtype=x.dtype.name, direction=direction)


def _one_call(spec: BatchNormSpec, call: CallCase) -> oracle.OneCall:
    w = weight_of = None
    real: int | None = None
    if call.weights is not None:
        spread = np.moveaxis(_spread(spec, call.x.shape, call.weights), spec.axis, 0)[0]
        index = np.arange(call.weights.size).reshape(call.weights.shape)
        weight_of = [int(i) for i in np.moveaxis(_spread(spec, call.x.shape, index), spec.axis, 0)[0].reshape(-1)]
        w = exact(spread.reshape(-1))
        real = call.weights.size if call.weights.dtype.kind not in "biu" else None
    return oracle.OneCall(
        x=exact(call.x),
        shape=call.x.shape,
        dtype=call.dtype,
        dy=None if call.dy is None else exact(call.dy),
        weights=w,
        weight_of=weight_of,
        real_weights=real,
        weights_dtype=call.weights_dtype,
        adjustment=_spread_adjustment(call),
        direction=None if call.direction is None else exact(call.direction),
    )


def _spread_adjustment(call: CallCase) -> tuple[list[Any], list[Any]] | None:
    if call.adjustment is None:
        return None
    scale, bias = (exact(np.broadcast_to(part, call.x.shape)) for part in call.adjustment)
    return scale, bias


def _spread(spec: BatchNormSpec, shape: tuple[int, ...], weights: NDArray) -> NDArray:
    """The weights at every position of x, by the design's rule on their shape, stated here on its own."""
    axis = spec.axis % len(shape)
    if weights.ndim == len(shape):
        full = weights
    elif weights.ndim == len(shape) - 1:
        full = np.expand_dims(weights, axis)
    else:
        full = weights.reshape(-1, *[1] * (len(shape) - 1))
    return np.broadcast_to(full, shape)


def exact(array: NDArray) -> list[Any]:
    """The array's numbers, flat, as the oracle's exact ones."""
    return [mpf(float(n)) for n in array.astype(np.float64).reshape(-1)]


def _overlaid(truth: oracle.State, new: Mapping[str, Any], spec: BatchNormSpec) -> oracle.State:
    def numbers(name: str, old: Any) -> Any:
        return exact(new[name]) if name in new else old

    averages = None if truth.averages is None else [dict(channel) for channel in truth.averages]
    for name in _averages(spec):
        for channel, value in zip(averages or [], numbers(name, []), strict=False):
            channel[name] = oracle.Tracked(value)
    counter = new.get("num_updates", truth.num_updates)
    return oracle.State(numbers("gamma", truth.gamma), numbers("beta", truth.beta), averages, counter)


def _summed(parts: Sequence[oracle.Bounded]) -> oracle.Bounded:
    return oracle.Bounded(
        [mp.fsum(values) for values in zip(*(p.values for p in parts), strict=True)],
        [sum(errors) for errors in zip(*(p.tolerance for p in parts), strict=True)],
    )


def _state_expected(state: oracle.State, spec: BatchNormSpec, digits: int) -> dict[str, Any]:
    c = spec.num_features
    parts: dict[str, oracle.Bounded] = {}
    if state.gamma is not None:
        parts["gamma"] = oracle.Bounded(state.gamma, [0.0] * c)  # nothing but the optimizer moves a parameter
    if state.beta is not None:
        parts["beta"] = oracle.Bounded(state.beta, [0.0] * c)
    for name in _averages(spec) if state.averages is not None else ():
        tracked = [channel[name] for channel in state.averages or []]
        parts[name] = oracle.Bounded([t.value for t in tracked], [t.error for t in tracked])
    expected: dict[str, Any] = {
        name: _expected(part, array_dtype(spec, name).name, (c,), 17 if name in ("gamma", "beta") else digits)
        for name, part in parts.items()
    }
    return {**expected, "num_updates": state.num_updates}


def _expected(part: oracle.Bounded, dtype: str, shape: tuple[int, ...], digits: int) -> dict[str, Any]:
    tolerance: Any = [_rounded_up(t) for t in part.tolerance]
    if len(set(tolerance)) <= 1:
        tolerance = tolerance[0] if tolerance else 0
    exact_ones = [t == 0.0 for t in part.tolerance]
    data = [_number(v, 17 if e else digits) for v, e in zip(part.values, exact_ones, strict=True)]
    return {"dtype": dtype, "shape": list(shape), "data": data, "tolerance": tolerance}


def _number(value: Any, digits: int) -> Any:
    """A result for the document. Where the definition gives NaN or an infinity, rounding decides which of the two an
    implementation reaches first, so either will do."""
    number = float(value)
    return _plain(float(f"{number:.{digits}g}")) if isfinite(number) else "nonfinite"


def _rounded_up(tolerance: float) -> float | int:
    """Three significant digits, never below."""
    return _plain(float(Context(prec=3, rounding=ROUND_UP).create_decimal_from_float(tolerance)))


def _call_document(call: CallCase) -> dict[str, Any]:
    document: dict[str, Any] = {"x": array_document(call.x)}
    if call.view != "contiguous":
        document["view"] = call.view
    if call.dy is not None:
        document["dy"] = array_document(call.dy)
        if call.dy_view != "contiguous":
            document["dy_view"] = call.dy_view
    if call.weights is not None:
        document["weights"] = array_document(call.weights)
    if call.adjustment is not None:
        scale, bias = call.adjustment
        document["adjustment"] = {"scale": array_document(scale), "bias": array_document(bias)}
    if call.direction is not None:
        document["direction"] = array_document(call.direction)
    return document


def _state_document(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v if name == "num_updates" else array_document(v) for name, v in state.items()}


def array_document(array: NDArray) -> dict[str, Any]:
    """An array as the document holds it: the shortest decimals that give its dtype back."""
    if array.dtype.kind in "biu":
        data: list[Any] = [n.item() for n in array.reshape(-1)]
    else:
        data = [_shortest(n) for n in array.reshape(-1)]
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def _shortest(number: Any) -> Any:
    value = float(number)
    if isnan(value):
        return "nan"
    if not isfinite(value):
        return "inf" if value > 0 else "-inf"
    if number.dtype == ml_dtypes.bfloat16:
        return _plain(value)
    return _plain(float(str(number)))


def _plain(value: float) -> float | int:
    """Whole numbers without a decimal point: shorter, and the same number."""
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
