"""Checks without expected numbers: relations that every batch norm keeps, on random cases.

They guard against what vectors cannot: an expectation and an implementation wrong in the same way. Tolerances are the
bounds of the two sides added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np

from bnlayer.contract import Backend, Call, Outcome, Request
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from . import bounds
from .compare import Finding, compare, compare_counter
from .runner import Result, Target, broken, verdict
from .vector import Expected

NDArray = np.ndarray[Any, np.dtype[Any]]
GROUP: Final = "metamorphic"
_CASES: Final = (((12, 4), -1), ((3, 4, 2, 5), 1), ((4, 3, 4), 2))


class Bench:
    """One backend with one random case: x on a grid of 2**-8, so that shifting and scaling it are exact."""

    def __init__(self, backend: Backend, device: Any, seed: int) -> None:
        self.backend, self.device = backend, device
        self.random = np.random.default_rng(seed)
        shape, self.axis = _CASES[seed % len(_CASES)]
        self.x = (np.round(self.random.normal(0.25, 1.5, shape) * 256) / 256).astype(np.float32)
        self.dy = self.random.normal(size=shape).astype(np.float32)
        self.channels = shape[self.axis]
        self.spec = BatchNormSpec(self.channels, axis=self.axis, epsilon=1e-3, decay=0.75)
        gamma = self.random.uniform(-1.5, 1.5, self.channels)
        self.state = BatchNormState.initial(self.spec).replace(
            gamma=gamma.astype(np.float32), beta=self.random.normal(size=self.channels).astype(np.float32)
        )

    def run(self, x: NDArray | None = None, dy: NDArray | None = None, **changes: Any) -> Outcome:
        """One step of a new layer; `changes` go to the spec, the state or the call by their names."""
        spec = self.spec.replace(**{k: changes.pop(k) for k in ("epsilon", "decay") if k in changes})
        state = changes.pop("state", self.state)
        weights = changes.pop("weights", None)
        x = self.x if x is None else x
        call = Call(x, dy=self.dy if dy is None else dy, weights=weights)
        layer, outcomes = self.backend.build(spec, state, device=self.device), []
        for training in changes.pop("modes", (True,)):
            layer, outcome = self.backend.step(layer, Request((call,), training=training, **changes))
            outcomes.append(outcome)
        return outcomes[-1]

    def expect(self, name: str, values: NDArray, tolerance: NDArray) -> Expected:
        """What one side must be, given the other: twice the bound, as both sides round."""
        shape = values.shape
        return Expected(
            "float32", values.astype(np.float64), np.broadcast_to(2 * tolerance, shape), np.zeros(shape, bool)
        )

    def bound(self, x: NDArray | None = None, dy: NDArray | None = None) -> dict[str, NDArray]:
        """The error bounds of training on x, by observable, in float64; statistics for a decay of 0."""
        x, dy = (self.x if x is None else x), (self.dy if dy is None else dy)
        rounding = bounds.Rounding("float32", "float32", "float32")
        xs, dys = self._rows(x), self._rows(dy)
        eps, p = self.spec.epsilon, 1.0 / xs.shape[1]
        y, dx = np.empty_like(xs), np.empty_like(xs)
        mean, variance, dgamma = (np.empty(self.channels) for _ in range(3))
        assert self.state.gamma is not None and self.state.beta is not None
        for c in range(self.channels):
            m, v = float(xs[c].mean()), float(xs[c].var())
            errors = bounds.batch_errors(rounding, xs.shape[1], m, v, v, p, eps)
            xhat = (xs[c] - m) / np.sqrt(v + eps)
            gamma, beta = float(self.state.gamma[c]), float(self.state.beta[c])
            sums = bounds.gradient_sums(errors, list(dys[c]), list(xhat))
            s1, s2 = float(dys[c].sum()), float((dys[c] * xhat).sum())
            factor = gamma / np.sqrt(v + eps)
            for i, (h, d) in enumerate(zip(xhat, dys[c], strict=True)):
                y[c, i] = bounds.output_error(rounding, gamma, beta, bounds.xhat_error(errors, h), gamma * h + beta)
                out = factor * (d - p * (s1 + h * s2))
                dx[c, i] = bounds.dx_error(errors, rounding, sums, factor, 0.0, d, h, p, s2, out)
            mean[c], variance[c] = errors.mean + rounding.u * abs(m), errors.variance + rounding.u * v
            dgamma[c] = bounds.rounded(rounding.param, rounding.param_floor, sums.s2_error, s2)
        return {"y": self._back(y, x.shape), "dx": self._back(dx, x.shape), "moving_mean": mean,
                "moving_variance": variance, "dgamma": dgamma}  # fmt: skip

    def _rows(self, x: NDArray) -> NDArray:
        return np.moveaxis(x, self.axis, 0).reshape(self.channels, -1).astype(np.float64)

    def _back(self, rows: NDArray, shape: tuple[int, ...]) -> NDArray:
        moved = np.moveaxis(np.empty(shape), self.axis, 0).shape
        return np.moveaxis(rows.reshape(moved), 0, self.axis)


Check = Callable[[Bench], Iterator[Finding]]


def names(pattern: str = "*") -> list[str]:
    """The ids of the checks that match a glob pattern."""
    return [name for name in _CHECKS if fnmatchcase(name, pattern)]


def run(checks: Sequence[str], target: Target, device: Any = None) -> Iterator[Result]:
    """Every check on one target, on three random cases each; one result a check."""
    assert target.backend is not None
    for name in checks:
        result = Result(name, GROUP, target.name, "pass")
        try:
            reason = target.backend.unsupported(Bench(target.backend, device, 0).spec)
            if reason is not None:
                yield replace(result, status="unsupported", reason=reason)
                continue
            found = [f for seed in range(len(_CASES)) for f in _CHECKS[name](Bench(target.backend, device, seed))]
        except Exception as error:  # a finding about the backend, never the end of the run
            yield broken(result, error)
            continue
        yield verdict(result, found)


def gradient_sums_to_zero(bench: Bench) -> Iterator[Finding]:
    """Sum of dx over a channel is 0 in training: adding a constant to x changes nothing."""
    dx = bench.run().calls[0].dx
    if dx is None:
        yield compare("dx", None, bench.expect("dx", bench.x, bench.x))
        return
    sums = bench._rows(dx).sum(axis=1)
    tolerance = bench._rows(bench.bound()["dx"]).sum(axis=1)
    yield compare("dx", sums.astype(np.float32), bench.expect("dx", np.zeros(bench.channels), tolerance))


def shift(bench: Bench) -> Iterator[Finding]:
    """x + 8: the same y and dx, moving mean up by (1 - decay) 8, the same moving variance."""
    base, moved = bench.run(decay=0.0), bench.run(bench.x + np.float32(8), decay=0.0)
    bound = bench.bound(bench.x + np.float32(8))
    yield from _same(bench, base, moved, bound, ("y", "dx", "moving_variance"))
    assert base.state.moving_mean is not None
    yield compare(
        "moving_mean",
        moved.state.moving_mean,
        bench.expect("moving_mean", base.state.moving_mean + 8.0, bound["moving_mean"]),
    )


def scale(bench: Bench) -> Iterator[Finding]:
    """4 x with 16 epsilon: the same y, dx a quarter."""
    base, scaled = bench.run(), bench.run(4 * bench.x, epsilon=16 * bench.spec.epsilon)
    bound = bench.bound()
    yield from _same(bench, base, scaled, bound, ("y", "dgamma"))
    assert base.calls[0].dx is not None
    yield compare("dx", scaled.calls[0].dx, bench.expect("dx", base.calls[0].dx / 4, bound["dx"] / 4))


def permute_batch(bench: Bench) -> Iterator[Finding]:
    """Rows in another order: y and dx in that order, the same statistics."""
    order = bench.random.permutation(bench.x.shape[0])
    base, moved = bench.run(decay=0.0), bench.run(bench.x[order], bench.dy[order], decay=0.0)
    bound = bench.bound()
    yield from _same(bench, base, moved, bound, ("moving_mean", "moving_variance", "dgamma"))
    for name in ("y", "dx"):
        want = getattr(base.calls[0], name)[order]
        yield compare(name, getattr(moved.calls[0], name), bench.expect(name, want, bound[name][order]))


def permute_channels(bench: Bench) -> Iterator[Finding]:
    """Channels in another order, with their parameters: everything in that order."""
    order = bench.random.permutation(bench.channels)
    state = bench.state.replace(**{name: array[order] for name, array in bench.state.arrays().items()})
    take = [slice(None)] * bench.x.ndim
    take[bench.axis] = order  # type: ignore[call-overload]
    at = tuple(take)
    base, moved = bench.run(decay=0.0), bench.run(bench.x[at], bench.dy[at], decay=0.0, state=state)
    bound = bench.bound()
    for name in ("y", "dx"):
        want = getattr(base.calls[0], name)[at]
        yield compare(name, getattr(moved.calls[0], name), bench.expect(name, want, bound[name][at]))
    for name in ("moving_mean", "moving_variance"):
        want = getattr(base.state, name)[order]
        yield compare(name, getattr(moved.state, name), bench.expect(name, want, bound[name][order]))


def decay_one(bench: Bench) -> Iterator[Finding]:
    """decay 1: the statistics stay, to the bit, and the counter counts."""
    state = bench.state.replace(
        moving_mean=bench.random.normal(size=bench.channels).astype(np.float32),
        moving_variance=bench.random.uniform(0.5, 2, bench.channels).astype(np.float32),
    )
    after = bench.run(decay=1.0, state=state).state
    for name in ("moving_mean", "moving_variance"):
        want = getattr(state, name)
        yield compare(name, getattr(after, name), bench.expect(name, want, np.zeros(bench.channels)))
    yield compare_counter(after.num_updates, 1)


def decay_zero_then_eval(bench: Bench) -> Iterator[Finding]:
    """decay 0, biased: eval of the batch that was just trained on gives what training gave."""
    trained, evaluated = bench.run(decay=0.0), bench.run(decay=0.0, modes=(True, False))
    yield from _same(bench, trained, evaluated, bench.bound(), ("y",))


def batch_twice(bench: Bench) -> Iterator[Finding]:
    """The batch with itself below: the same y twice, the same biased statistics."""
    base = bench.run(decay=0.0)
    twice = bench.run(np.concatenate([bench.x] * 2), np.concatenate([bench.dy] * 2), decay=0.0)
    bound = bench.bound()
    yield from _same(bench, base, twice, bound, ("moving_mean", "moving_variance"))
    rows = bench.x.shape[0]
    yield compare("y", twice.calls[0].y[rows:], bench.expect("y", base.calls[0].y, bound["y"]))


def mask_drops_rows(bench: Bench) -> Iterator[Finding]:
    """Masked rows have no say: statistics and the other rows as if they were not there."""
    mask = np.ones(bench.x.shape[0], bool)
    mask[:: 3 if mask.size > 4 else 2] = False
    masked = bench.run(decay=0.0, weights=mask)
    dropped = bench.run(bench.x[mask], bench.dy[mask], decay=0.0)
    bound = bench.bound(bench.x[mask], bench.dy[mask])
    yield from _same(bench, dropped, masked, bound, ("moving_mean", "moving_variance"))
    yield compare("y", masked.calls[0].y[mask], bench.expect("y", dropped.calls[0].y, bound["y"]))


def weights_repeat_rows(bench: Bench) -> Iterator[Finding]:
    """A weight of 2 is the row twice, for y and the biased statistics; the total weight has no say."""
    weights = bench.random.integers(1, 4, bench.x.shape[0])
    repeated = bench.run(np.repeat(bench.x, weights, 0), np.repeat(bench.dy, weights, 0), decay=0.0)
    weighted = bench.run(decay=0.0, weights=(weights * 0.25).astype(np.float32))
    bound = bench.bound(np.repeat(bench.x, weights, 0), np.repeat(bench.dy, weights, 0))
    yield from _same(bench, repeated, weighted, bound, ("moving_mean", "moving_variance"))
    first = np.concatenate([[0], np.cumsum(weights)[:-1]])
    want = repeated.calls[0].y[first]
    yield compare("y", weighted.calls[0].y, bench.expect("y", want, bound["y"][first]))


def no_update_changes_only_state(bench: Bench) -> Iterator[Finding]:
    """update_stats=False: the same y and gradients, the state untouched."""
    base, still = bench.run(), bench.run(update_stats=False)
    yield from _same(bench, base, still, bench.bound(), ("y", "dx", "dgamma"))
    for name, array in bench.state.arrays().items():
        yield compare(name, getattr(still.state, name), bench.expect(name, array, np.zeros(bench.channels)))


def _same(
    bench: Bench, want: Outcome, got: Outcome, bound: dict[str, NDArray], observables: Sequence[str]
) -> Iterator[Finding]:
    for name in observables:
        one, other = (_observable(outcome, name) for outcome in (want, got))
        yield compare(name, other, bench.expect(name, one, bound[name]))


def _observable(outcome: Outcome, name: str) -> Any:
    if name in ("y", "dx"):
        return getattr(outcome.calls[0], name)
    return getattr(outcome if name == "dgamma" else outcome.state, name)


_CHECKS: Final[dict[str, Check]] = {
    f"{GROUP}/{check.__name__.replace('_', '-')}": check
    for check in (
        gradient_sums_to_zero,
        shift,
        scale,
        permute_batch,
        permute_channels,
        decay_one,
        decay_zero_then_eval,
        batch_twice,
        mask_drops_rows,
        weights_repeat_rows,
        no_update_changes_only_state,
    )
}
