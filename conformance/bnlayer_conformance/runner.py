"""Run vectors against backends. Needs neither pytest nor mpmath, and names no framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

import bnlayer.errors
from bnlayer.contract import Backend, Call, NativeBackend, Outcome, Request
from bnlayer.errors import BackendUnavailable, BatchNormError, UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_names

from .compare import Finding, compare, compare_counter, worst
from .vector import Expected, Step, Vector, VectorCall, array

Status = Literal["pass", "fail", "deviation", "unsupported", "error"]
CALLS = ("train", "eval", "call_twice")


@dataclass(frozen=True)
class Result:
    """One vector on one target. `observable`, `error` and `tolerance` are those of the worst element; `ratio` is that
    error in tolerances. `failures` has the worst finding of each observable that failed, worst first; `lines` has, for
    each of a native layer's, the number of the line of its deviations that explains it, or None."""

    vector: str
    group: str
    target: str
    status: Status
    observable: str = ""
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""
    ratio: float = 0.0
    failures: tuple[Finding, ...] = ()
    lines: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Target:
    """A backend as the runner found it: its version, or why it is absent."""

    name: str
    backend: Backend | None
    version: str = ""
    reason: str = ""

    @property
    def ready(self) -> bool:
        """Whether vectors can run on it."""
        return self.backend is not None


def find(name: str, load: Callable[[str], Backend], device: Any = None) -> Target:
    """The target of this name; absent with its reason if its framework cannot be imported, or lacks the device."""
    try:
        backend = load(name)
        target = Target(name, backend, version=backend.version())
        if device is not None:
            _try(backend, device)
        return target
    except (BackendUnavailable, UnsupportedError) as error:
        return Target(name, None, reason=str(error))


def _try(backend: Backend, device: Any) -> None:
    """Build one layer there, so that an absent device is said once, and not by every vector."""
    plain = BatchNormSpec(2), BatchNormSpec(2, axis=1, moving_variance_estimator="unbiased")
    spec = next((spec for spec in plain if backend.unsupported(spec) is None), None)
    if spec is None:
        return
    try:
        backend.build(spec, device=device)
    except UnsupportedError:
        raise
    except Exception:  # a stranger's backend may raise anything; that is for the vectors to show
        return


def run(vectors: Sequence[Vector], target: Target, device: Any = None) -> Iterator[Result]:
    """Every vector on one target, one result each, in the order given."""
    assert target.backend is not None
    for vector in vectors:
        yield replace(run_vector(vector, target.backend, device), target=target.name)


def run_vector(vector: Vector, backend: Backend, device: Any = None) -> Result:
    """One vector on one backend: build, then step by step, comparing everything after each."""
    result = Result(vector.id, vector.group, backend.name, "pass")
    try:
        if vector.result == "valid":
            return verdict(result, _findings(vector, backend, device))
        return _refused(result, vector, backend, device)
    except _Unsupported as error:
        return replace(result, status="unsupported", reason=str(error))
    except Exception as error:  # whatever a backend does is a finding about it, never the end of the run
        return broken(result, error)


def verdict(result: Result, findings: Iterable[Finding]) -> Result:
    """The result that the findings lead to."""
    found = list(findings)
    bad = worst(found)
    by_name: dict[str, Finding] = {}
    for finding in found:
        if not finding.passed:
            by_name[finding.observable] = worst([by_name.get(finding.observable, finding), finding])
    return replace(
        result,
        status="pass" if bad.passed else "fail",
        observable=bad.observable,
        error=bad.error,
        tolerance=bad.tolerance,
        reason=bad.reason,
        ratio=bad.ratio,
        failures=tuple(sorted(by_name.values(), key=lambda finding: -finding.ratio)),
    )


def broken(result: Result, error: Exception) -> Result:
    """The result of a backend that raised what it should not."""
    reason = f"{type(error).__name__}: {error}"
    short = "refuses" if isinstance(error, BatchNormError) else f"raises {type(error).__name__}"
    finding = Finding("error", float("inf"), reason=reason, short=short)
    return replace(result, status="error", reason=reason, failures=(finding,))


class _Unsupported(Exception):
    """The backend said by name that it lacks what the vector needs."""


def _refused(result: Result, vector: Vector, backend: Backend, device: Any) -> Result:
    """An invalid vector passes by running into the right error at the right place, everything before being right."""
    assert vector.refusal is not None
    wanted = getattr(bnlayer.errors, vector.refusal.error)
    findings: list[Finding] = []
    progress = _Progress()
    try:
        for finding in _findings(vector, backend, device, progress):
            findings.append(finding)  # noqa: PERF402 - what came before the refusal has to stay
    except BatchNormError as error:
        if isinstance(error, wanted) and progress.at == vector.refusal.at:
            lacks = lacking(backend)
            findings.extend(f for f in _unharmed(backend, progress) if f.observable not in lacks)
            return verdict(result, findings)
        came, short = f"{type(error).__name__} at {progress.at}: {error}", f"{type(error).__name__} instead"
    else:
        if vector.result == "acceptable":
            return verdict(result, findings)
        came, short = "nothing", "accepts"
    reason = f"{vector.refusal.error} at {vector.refusal.at} was expected, got {came}"
    return verdict(result, [*findings, Finding("refusal", float("inf"), reason=reason, short=short)])


@dataclass
class _Progress:
    """How far a vector came: the place, the layer before it, and the state that the layer had there."""

    at: str | int = "spec"
    layer: Any = None
    held: BatchNormState[Any] | None = None


def _findings(vector: Vector, backend: Backend, device: Any, progress: _Progress | None = None) -> Iterator[Finding]:
    progress = progress or _Progress()
    spec = BatchNormSpec.from_dict(vector.spec)
    lacks = lacking(backend)
    requests = [_request(step, lacks) if step.do in CALLS else None for step in vector.steps]
    for request in requests or [None]:
        reason = backend.unsupported(spec, request)
        if reason is not None:
            raise _Unsupported(reason)
    progress.at = "state"
    state = None if vector.state is None else _state(vector.state)
    layer = backend.build(spec, state, device=device)
    held_now = _held(backend, layer, spec, BatchNormState.initial(spec) if state is None else state)
    yield from (finding for finding in held_now if finding.observable not in lacks)
    given = _snapshot({} if state is None else state.arrays(), "state")
    for index, (step, request) in enumerate(zip(vector.steps, requests, strict=True)):
        progress.at, progress.layer, (_, progress.held) = index, layer, backend.extract(layer)
        if request is not None:
            lent = given + _snapshot(progress.held.arrays(), "extracted")
            for call in request.calls:
                arrays = {"x": call.x, "dy": call.dy, "weights": call.weights, "direction": call.direction}
                scale, bias = call.adjustment or (None, None)
                lent += _snapshot({**arrays, "scale": scale, "bias": bias}, "input")
            layer, outcome = backend.step(layer, request)
            compared = _outcome(step, request, outcome, spec)
            yield from _located(index, (finding for finding in compared if finding.observable not in lacks))
            yield from _located(index, _unwritten(lent))
        elif step.do == "set":
            layer = backend.load(layer, progress.held.replace(**step.state))
        else:  # rebuild: what is extracted must be enough to go on from
            held_spec, held = backend.extract(layer)
            layer = backend.build(held_spec, held, device=device)


def lacking(backend: Backend) -> Mapping[str, str]:
    """The observables that a framework's own layer does not have; empty for a backend of the full spec."""
    return backend.lacks if isinstance(backend, NativeBackend) else {}


def _outcome(step: Step, request: Request, outcome: Outcome, spec: BatchNormSpec) -> Iterator[Finding]:
    if not step.expect:
        return  # the step that an invalid vector should not have come through
    if len(outcome.calls) != len(step.calls):
        reason = f"{len(step.calls)} were expected, got {len(outcome.calls)}"
        yield Finding("calls", float("inf"), reason=reason, short=f"{len(outcome.calls)} for {len(step.calls)}")
        return
    for call, asked, got in zip(step.calls, request.calls, outcome.calls, strict=True):
        yield compare("y", got.y, call.expect["y"])
        if asked.dy is not None:
            yield compare("dx", got.dx, call.expect["dx"])
            yield compare("dweights", got.dweights, call.expect.get("dweights"))
        if asked.direction is not None:
            yield compare("hvp", got.hvp, call.expect["hvp"])
    if any(asked.dy is not None for asked in request.calls):
        yield compare("dgamma", outcome.dgamma, step.expect.get("dgamma"))
        yield compare("dbeta", outcome.dbeta, step.expect.get("dbeta"))
    for name in array_names(spec):
        yield compare(name, getattr(outcome.state, name), step.expect[name])
    yield compare_counter(outcome.state.num_updates, step.num_updates)


def _held(backend: Backend, layer: Any, spec: BatchNormSpec, state: BatchNormState[Any]) -> Iterator[Finding]:
    """A layer just built must give back exactly the spec and state that went in."""
    held_spec, held = backend.extract(layer)
    if held_spec != spec:
        differs = [n for n, v in spec.to_dict().items() if held_spec.to_dict()[n] != v]
        reason = f"the layer's spec differs in {', '.join(differs)} after build"
        yield Finding("spec", float("inf"), reason=reason, short=f"another {', '.join(differs)}")
    for name, values in state.arrays().items():
        yield from _located("build", [compare(name, getattr(held, name), _exactly(values))])
    yield from _located("build", [compare_counter(held.num_updates, state.num_updates)])


def _unharmed(backend: Backend, progress: _Progress) -> Iterator[Finding]:
    """A refused step must leave the layer as it was."""
    if progress.held is None:
        return
    _, held = backend.extract(progress.layer)
    for name, values in progress.held.arrays().items():
        yield from _located("after the refusal", [compare(name, getattr(held, name), _exactly(values))])
    yield from _located("after the refusal", [compare_counter(held.num_updates, progress.held.num_updates)])


_Lent = tuple[str, Any, bytes]


def _snapshot(arrays: Mapping[str, Any], label: str) -> list[_Lent]:
    """What arrays hold now, to find out later whether a backend wrote to what it does not own."""
    return [(f"{label} {name}", a, a.tobytes()) for name, a in arrays.items() if a is not None]


def _unwritten(lent: Sequence[_Lent]) -> Iterator[Finding]:
    for name, values, before in lent:
        if values.tobytes() != before:
            reason = "the array was written to; copy it before changing it"
            yield Finding(name, float("inf"), reason=reason, short="written to")


def _exactly(values: Any) -> Expected:
    return Expected(values.dtype.name, values.astype(np.float64), np.zeros(values.shape), np.zeros(values.shape, bool))


def _located(where: object, findings: Iterable[Finding]) -> Iterator[Finding]:
    for finding in findings:
        step = f"step {where}" if isinstance(where, int) else str(where)
        yield replace(finding, reason=f"{step}, {finding.reason}") if finding.reason else finding


def _request(step: Step, lacks: Mapping[str, str]) -> Request:
    def call(given: VectorCall) -> Call:
        return Call(
            given.x,
            dy=None if "dx" in lacks else given.dy,
            weights=given.weights,
            adjustment=given.adjustment,
            direction=None if "dx" in lacks or "hvp" in lacks else given.direction,
        )

    return Request(
        tuple(call(given) for given in step.calls),
        training=step.do != "eval",
        update_stats=step.update_stats,
        frozen_statistics=step.frozen_statistics,
        renorm_clips=step.renorm_clips,
        shards=step.shards,
    )


def _state(document: Any) -> BatchNormState[Any]:
    return BatchNormState(**{name: v if name == "num_updates" else array(v) for name, v in document.items()})
