"""What the runner says of backends that misbehave: each status, and never the end of the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from bnlayer.contract import Outcome, Request
from bnlayer.errors import BackendUnavailable, StateError
from bnlayer_conformance import deviations, metamorphic, report, runner, vector
from bnlayer_conformance.compare import Finding, compare, compare_counter
from bnlayer_conformance.mutants.base import Base, Layer
from bnlayer_conformance.vector import Expected

(PLAIN,) = vector.load("gradients/random")
(NEGATIVE,) = vector.load("refusals/state-negative-variance")
(ONE_VALUE,) = vector.load("refusals/input-one-value")


class _Changed(Base):
    """The base with its outcome changed."""

    def change(self, outcome: Outcome) -> Outcome:
        raise NotImplementedError

    def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
        layer, outcome = super().step(layer, request)
        return layer, self.change(outcome)


def _with_call(outcome: Outcome, **changes: Any) -> Outcome:
    return replace(outcome, calls=tuple(replace(call, **changes) for call in outcome.calls))


@pytest.mark.parametrize(
    ("change", "observable", "reason"),
    [
        (lambda o: _with_call(o, y=o.calls[0].y + np.float32(1e-3)), "y", "element"),
        (lambda o: _with_call(o, y=o.calls[0].y.astype(np.float64)), "y", "float32 was expected, got float64"),
        (lambda o: _with_call(o, y=o.calls[0].y.tolist()), "y", "got a list"),
        (lambda o: _with_call(o, y=o.calls[0].y[:-1]), "y", "shape"),
        (lambda o: _with_call(o, dx=None), "dx", "got nothing"),
        (lambda o: _with_call(o, dx=o.calls[0].dx * np.nan), "dx", "got nan"),
        (lambda o: _with_call(o, dweights=np.ones(3, np.float32)), "dweights", "nothing was expected"),
        (lambda o: replace(o, dgamma=None), "dgamma", "got nothing"),
        (lambda o: replace(o, dbeta=o.dbeta * 2), "dbeta", "element"),
        (lambda o: replace(o, calls=()), "calls", "1 were expected, got 0"),
        (lambda o: replace(o, state=o.state.replace(num_updates=7)), "num_updates", "1 was expected, got 7"),
        (lambda o: replace(o, state=o.state.replace(num_updates=None)), "num_updates", "got None"),
        (lambda o: replace(o, state=o.state.replace(moving_mean=o.state.moving_variance)), "moving_mean", "element"),
        (lambda o: replace(o, state=o.state.replace(gamma=o.state.gamma * 1.0000002)), "gamma", "element"),
    ],
)
def test_every_difference_is_a_failure(change: Any, observable: str, reason: str) -> None:
    backend = _Changed()
    backend.change = change  # type: ignore[method-assign]
    result = runner.run_vector(PLAIN, backend)
    assert (result.status, result.observable) == ("fail", observable)
    assert reason in result.reason


def test_a_crash_is_an_error_and_the_run_goes_on() -> None:
    class Crashes(Base):
        def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
            raise KeyError("weights")

    target = runner.Target("crashes", Crashes(), "1")
    results = list(runner.run([PLAIN, NEGATIVE], target))
    assert [r.status for r in results] == ["error", "pass"]
    assert "KeyError" in results[0].reason
    assert {r.target for r in results} == {"crashes"}


def test_unsupported_is_said_by_name() -> None:
    class Lacks(Base):
        def unsupported(self, spec: Any, request: Request | None = None) -> str | None:
            return "weights: not here" if request is not None and request.calls[0].weights is not None else None

    (masked,) = vector.load("weights/mask-rows")
    result = runner.run_vector(masked, Lacks())
    assert (result.status, result.reason) == ("unsupported", "weights: not here")
    assert runner.run_vector(PLAIN, Lacks()).status == "pass"


def test_an_invalid_vector_wants_the_right_error_at_the_right_place() -> None:
    assert runner.run_vector(NEGATIVE, Base()).status == "pass"

    class Lenient(Base):
        def build(self, spec: Any, state: Any = None, *, device: Any = None) -> Layer:
            return Layer(spec, state)

    accepted = runner.run_vector(NEGATIVE, Lenient())
    assert (accepted.status, accepted.observable) == ("fail", "refusal")
    assert "StateError at state was expected, got nothing" in accepted.reason

    class WrongKind(Base):
        def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
            raise StateError("no")

    wrong = runner.run_vector(ONE_VALUE, WrongKind())
    assert wrong.status == "fail"
    assert "InputError at 0 was expected, got StateError at 0" in wrong.reason


def test_a_layer_must_give_back_what_it_was_built_from() -> None:
    class Forgets(Base):
        def extract(self, layer: Layer) -> Any:
            spec, state = super().extract(layer)
            return spec.replace(epsilon=spec.epsilon * 2), state

    result = runner.run_vector(PLAIN, Forgets())
    assert (result.status, result.observable) == ("fail", "spec")
    assert "epsilon" in result.reason


def test_writing_to_what_is_lent_is_a_failure() -> None:
    class Centers(Base):
        def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
            layer, outcome = super().step(layer, request)
            request.calls[0].x[...] -= 1
            return layer, outcome

    class Shares(Base):
        def extract(self, layer: Layer) -> Any:
            return layer.spec, layer.state

        def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
            held = layer.state
            layer, outcome = super().step(layer, request)
            np.copyto(held.moving_mean, layer.state.moving_mean)
            return layer, outcome

    (fresh,) = vector.load("gradients/random")  # it is written to
    result = runner.run_vector(fresh, Centers())
    assert (result.status, result.observable) == ("fail", "input x")
    assert runner.run_vector(PLAIN, Shares()).observable == "extracted moving_mean"


def test_a_refused_step_must_leave_the_layer_as_it_was() -> None:
    class Harms(Base):
        def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
            layer.state = layer.state.replace(num_updates=layer.state.num_updates + 1)
            return super().step(layer, request)

    result = runner.run_vector(ONE_VALUE, Harms())
    assert (result.status, result.observable) == ("fail", "num_updates")
    assert "after the refusal" in result.reason


def test_find_says_why_a_target_is_absent() -> None:
    class Absent(Base):
        def version(self) -> str:
            raise BackendUnavailable("nowhere is not installed. Run: pip install nowhere")

    target = runner.find("absent", lambda _: Absent())
    assert not target.ready
    assert "pip install nowhere" in target.reason


def _expected(values: list[float], tolerance: list[float], nonfinite: list[bool] | None = None) -> Expected:
    return Expected(
        "float32", np.array(values), np.array(tolerance), np.array(nonfinite or [False] * len(values), bool)
    )


def test_compare_elements() -> None:
    def ratio(got: list[float], want: Expected) -> float:
        return compare("y", np.array(got, np.float32), want).ratio

    assert ratio([1.0, 2.0], _expected([1.0, 2.0], [0.0, 0.0])) == 0
    assert ratio([1.0, 2.5], _expected([1.0, 2.0], [0.1, 1.0])) == 0.5
    assert ratio([1.0, 2.5], _expected([1.0, 2.0], [0.1, 0.0])) == np.inf
    assert ratio([np.nan], _expected([np.nan], [0.0])) == 0
    assert ratio([np.inf], _expected([np.nan], [0.0], [True])) == 0
    assert ratio([3e38], _expected([np.nan], [0.0], [True])) == np.inf
    assert ratio([np.nan], _expected([1.0], [1e9])) == np.inf


def test_compare_counter_takes_integers_only() -> None:
    assert compare_counter(np.int64(3), 3).passed
    for wrong in (None, "x", 4):
        assert not compare_counter(wrong, 3).passed


def test_metamorphic_checks_pass_on_the_base_and_catch_a_detached_mean() -> None:
    from bnlayer_conformance.mutants.build import build
    from bnlayer_conformance.mutants.catalogue import MUTANTS

    names = metamorphic.names()
    assert {r.status for r in metamorphic.run(names, runner.Target("base", Base(), "1"))} == {"pass"}
    (mutant,) = [m for m in MUTANTS if m.name == "mean detached"]
    results = metamorphic.run(names, runner.Target("mutant", build(mutant), "1"))
    assert "metamorphic/gradient-sums-to-zero" in {r.vector for r in results if r.status == "fail"}


@pytest.mark.parametrize(
    "only",
    [
        {"axis": (1,), "moving_variance_estimator": ("unbiased",), "zero_debias": ("none",)},
        {"axis": (-1, 2), "moving_variance_estimator": ("biased",), "zero_debias": ("all",)},
        {"axis": (-1,), "moving_variance_estimator": ("unbiased",), "rank": (4,)},
    ],
)
def test_metamorphic_checks_find_a_setting_that_the_target_has_words_for(only: Any) -> None:
    class Narrow(Base):
        def unsupported(self, spec: Any, request: Request | None = None) -> str | None:
            ranks = only.get("rank", (2, 3, 4))
            if request is not None and request.calls[0].x.ndim not in ranks:
                return "rank: images only"
            if request is not None and request.calls[0].weights is not None:
                return "weights: it takes none"
            fields = {name: values for name, values in only.items() if name != "rank"}
            return next((f"{n}: no choice" for n, values in fields.items() if getattr(spec, n) not in values), None)

    results = {r.vector: r for r in metamorphic.run(metamorphic.names(), runner.Target("narrow", Narrow(), "1"))}
    unsupported = {name: r.reason for name, r in results.items() if r.status == "unsupported"}
    masks = dict.fromkeys(("metamorphic/mask-drops-rows", "metamorphic/weights-repeat-rows"), "weights: it takes none")
    assert {name: unsupported.pop(name) for name in masks} == masks
    # decay 1 goes with no zero-debiased average.
    assert set(unsupported) == ({"metamorphic/decay-one"} if only.get("zero_debias") == ("all",) else set())
    assert [(r.vector, r.reason) for r in results.values() if r.status not in ("pass", "unsupported")] == []


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("the variance's mean is a constant", "hvp-sums-to-zero"),
        ("sum of dy xhat is a constant of the second order", "hvp-is-symmetric"),
        ("variance between replicas ignored", "shards-are-the-whole"),
        ("backward without the all-reduce", "shards-are-the-whole"),
        ("always biased", "weights-repeat-rows"),
    ],
)
def test_metamorphic_checks_of_the_second_order_and_of_shards_catch_mutants(name: str, check: str) -> None:
    from bnlayer_conformance.mutants.build import build
    from bnlayer_conformance.mutants.catalogue import MUTANTS

    (mutant,) = [m for m in MUTANTS if m.name == name]
    backend = build(mutant)
    if name == "always biased":  # it is right where it was asked for biased
        allowed = backend.unsupported
        backend.unsupported = lambda spec, request=None: (
            "estimator" if spec.moving_variance_estimator == "biased" else allowed(spec, request)
        )
    (result,) = metamorphic.run([f"metamorphic/{check}"], runner.Target("mutant", backend, "1"))
    assert result.status == "fail"


def _failed(vector_id: str, *observables: str) -> runner.Result:
    failures = tuple(Finding(name, 10.0, 1.0, 0.1, f"{name} differs") for name in observables)
    return replace(
        runner.Result(vector_id, vector_id.split("/")[0], "t", "fail", observables[0], 1.0, 0.1, "step 0", 10.0),
        failures=failures,
    )


def test_deviations(tmp_path: Any) -> None:
    path = tmp_path / "some.layer.txt"
    path.write_text(
        "# known\n\n"
        "gradients/* | dx, d*a | gradient | rounds twice | example/repo#1\n"
        "gradients/random | y | accuracy | sums in half | -\n"
        "modes/* | y | edge | old | -\n"
    )
    known = deviations.read(path)
    passed = runner.Result("gradients/zero", "gradients", "t", "pass")
    ids = ["gradients/random", "gradients/zero"]
    marked = deviations.apply([_failed("gradients/random", "y", "dx", "dgamma"), passed], known, ids)
    assert [r.status for r in marked] == ["deviation", "pass"]
    assert marked[0].lines == (1, 0, 0)
    assert marked[0].reason == "sums in half; rounds twice: step 0"
    # dbeta is explained by the first line's glob d*a, the counter by none: the whole vector fails, and says which.
    (unknown, *_) = deviations.apply([_failed("gradients/random", "y", "dbeta", "num_updates")], known, ids)
    assert (unknown.status, unknown.observable, unknown.lines) == ("fail", "num_updates", (1, 0, None))
    stale = deviations.apply([_failed("gradients/random", "y"), passed], known, ids)
    assert [r.status for r in stale] == ["deviation", "pass", "error"]
    assert stale[2].reason == "stale deviation: gradients/* | dx, d*a no longer happens; delete the line"


def test_a_crash_is_explained_as_an_error(tmp_path: Any) -> None:
    known = [deviations.Deviation("gradients/*", "error", "refusal", "refuses rank 2", "-")]
    crashed = runner.broken(runner.Result("gradients/random", "gradients", "t", "pass"), StateError("no"))
    assert crashed.failures[0].short == "refuses"
    assert runner.broken(crashed, KeyError("x")).failures[0].short == "raises KeyError"
    assert deviations.mark(crashed, known).status == "deviation"
    assert deviations.mark(crashed, [replace(known[0], observables="y")]).status == "error"


def test_what_a_layer_lacks_is_neither_asked_for_nor_compared() -> None:
    asked: list[Request] = []

    class NoGradients(Base):
        lacks: ClassVar = {"dx": "inference only", "num_updates": "no counter", "moving_variance": "keeps none"}
        deviations = None

        def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
            asked.append(request)
            layer, outcome = super().step(layer, request)
            state = outcome.state.replace(num_updates=99, moving_variance=None)
            return layer, replace(outcome, state=state)

    (second,) = vector.load("second_order/random")
    for one in (PLAIN, second, ONE_VALUE):
        assert runner.run_vector(one, NoGradients()).status == "pass"
    assert all(call.dy is None and call.direction is None for request in asked for call in request.calls)

    class NoSecondOrder(Base):
        lacks: ClassVar = {"hvp": "differentiable once"}
        deviations = None

        def step(self, layer: Layer, request: Request) -> tuple[Layer, Outcome]:
            assert request.calls[0].direction is None and request.calls[0].dy is not None
            return super().step(layer, request)

    assert runner.run_vector(second, NoSecondOrder()).status == "pass"


def test_report_numbers_are_json() -> None:
    results = [replace(runner.Result("a/b", "a", "t", "fail", "y"), error=float("inf"), tolerance=float("nan"))]
    (entry,) = report.document([runner.Target("t", Base(), "1")], results)["results"]
    assert entry["error"] is None
    assert entry["tolerance"] is None
