"""Checks without expected numbers: relations that every batch norm keeps, on random cases.

They guard against what vectors cannot: an expectation and an implementation wrong in the same way. Tolerances are the
bounds of the two sides added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Final, Literal

import numpy as np

from bnlayer.contract import Backend, Call, Outcome, Request
from bnlayer.errors import SpecError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from . import bounds
from .compare import Finding, compare, compare_counter
from .runner import Result, Target, broken, lacking, verdict
from .vector import Expected

NDArray = np.ndarray[Any, np.dtype[Any]]
GROUP: Final = "metamorphic"


@dataclass(frozen=True)
class Setting:
    """A layer that a check may be tried on: a layout of x, always with four channels, and what layers choose among."""

    shape: tuple[int, ...]
    axis: int
    estimator: Literal["biased", "unbiased"]
    zero_debias: Literal["none", "all"]


_ANY: Final = (((6, 4, 2, 1), 1), ((6, 2, 1, 4), -1))  # a layer may take nothing but images
# The layouts of each seed's case, in the order in which they are tried.
_LAYOUTS: Final = (
    (((12, 4), -1), ((12, 4), 1), *_ANY),
    (((3, 4, 2, 5), 1), ((3, 2, 5, 4), -1)),
    (((4, 3, 4), 2), ((4, 4, 3), 1), *_ANY),
)


def settings(seed: int) -> Iterator[Setting]:
    """The settings of a seed's case: a framework's own layer may have words for one of them only."""
    for zero_debias, estimator, (shape, axis) in product(("none", "all"), ("biased", "unbiased"), _LAYOUTS[seed]):
        yield Setting(shape, axis, estimator, zero_debias)  # type: ignore[arg-type]


class CannotSay(Exception):
    """The backend has no words for what a check asks for in this setting.

    Attributes:
        asked: True: it is what the check asks for, and not the setting.
    """

    def __init__(self, reason: str, *, asked: bool) -> None:
        super().__init__(reason)
        self.asked = asked


class Bench:
    """One backend with one random case: x on a grid of 2**-8, so that shifting and scaling it are exact."""

    def __init__(self, backend: Backend, device: Any, seed: int, setting: Setting) -> None:
        self.backend, self.device, self.lacks = backend, device, lacking(backend)
        self.random = np.random.default_rng(seed)
        self.axis = setting.axis
        self.x = (np.round(self.random.normal(0.25, 1.5, setting.shape) * 256) / 256).astype(np.float32)
        self.dy = self.normal()
        self.channels = setting.shape[self.axis]
        self.count = self.x.size // self.channels
        self.unbiased = setting.estimator == "unbiased"
        self.spec = BatchNormSpec(
            self.channels, axis=self.axis, epsilon=1e-3, decay=0.75, moving_variance_estimator=setting.estimator,
            zero_debias=setting.zero_debias,
        )  # fmt: skip
        gamma = self.random.uniform(-1.5, 1.5, self.channels)
        self.state = BatchNormState.initial(self.spec).replace(
            gamma=gamma.astype(np.float32), beta=self.random.normal(size=self.channels).astype(np.float32)
        )

    def normal(self) -> NDArray:
        """Random numbers of x's shape."""
        return self.random.normal(size=self.x.shape).astype(np.float32)

    def run(self, x: NDArray | None = None, dy: NDArray | None = None, **changes: Any) -> Outcome:
        """One step of a new layer; `changes` go to the spec, the state, the call or the request by their names.

        Raises:
            CannotSay: the backend does not support it.
        """
        fields = {k: changes.pop(k) for k in ("epsilon", "decay", "synchronized") if k in changes}
        state = changes.pop("state", self.state)
        weights, direction = changes.pop("weights", None), changes.pop("direction", None)
        x = self.x if x is None else x
        dy = None if "dx" in self.lacks else self.dy if dy is None else dy
        call = Call(x, dy=dy, weights=weights, direction=direction)
        modes = changes.pop("modes", (True,))
        requests = [Request((call,), training=mode, **changes) for mode in modes]
        try:
            spec = self.spec.replace(**fields)
        except SpecError as error:
            raise CannotSay(str(error), asked=True) from error
        for request in (None, *requests):
            reason = self.backend.unsupported(spec, request)
            if reason is not None:
                plain = Request((Call(self.x),), training=True)
                asked = self.backend.unsupported(self.spec, plain) is None
                raise CannotSay(reason, asked=asked)
        layer, outcomes = self.backend.build(spec, state, device=self.device), []
        for request in requests:
            layer, outcome = self.backend.step(layer, request)
            outcomes.append(outcome)
        return outcomes[-1]

    def need(self, observable: str) -> None:
        """Give up where the layer does not have what the check is about.

        Raises:
            CannotSay: it lacks this observable.
        """
        for name in ("dx", observable):
            if name in self.lacks:
                raise CannotSay(f"{observable}: {self.lacks[name]}", asked=True)

    def held(self, *observables: str) -> list[str]:
        """Those of the observables that the layer has; without dx it has no gradient."""
        return [
            name
            for name in observables
            if name not in self.lacks and ("dx" not in self.lacks or name not in ("dx", "dgamma", "dbeta"))
        ]

    def compare(self, name: str, got: Any, want: NDArray, tolerance: Any) -> Iterator[Finding]:
        """One side, given the other: to twice the bound, as both sides round."""
        if name not in self.lacks:
            bound = np.broadcast_to(2 * np.asarray(tolerance, np.float64), want.shape)
            yield compare(name, got, Expected("float32", want.astype(np.float64), bound, np.zeros(want.shape, bool)))

    def bessel(self, count: float) -> float:
        """What a variance over so many values is multiplied with before it enters the moving one."""
        return count / (count - 1) if self.unbiased else 1.0

    def bound(
        self, x: NDArray | None = None, dy: NDArray | None = None, direction: NDArray | None = None
    ) -> dict[str, NDArray]:
        """The error bounds of training on x, by observable, in float64; statistics for a decay of 0."""
        x, dy = (self.x if x is None else x), (self.dy if dy is None else dy)
        rounding = bounds.Rounding("float32", "float32", "float32")
        xs, dys = self.rows(x), self.rows(dy)
        ts = self.rows(np.zeros_like(x) if direction is None else direction)
        n = xs.shape[1]
        eps, p = self.spec.epsilon, 1.0 / n
        y, dx, hvp = np.empty_like(xs), np.empty_like(xs), np.empty_like(xs)
        mean, variance, dgamma = (np.empty(self.channels) for _ in range(3))
        assert self.state.gamma is not None and self.state.beta is not None
        for c in range(self.channels):
            m, v = float(xs[c].mean()), float(xs[c].var())
            u = v * self.bessel(n)
            errors = bounds.batch_errors(rounding, n, m, v, u, p, eps)
            sd = float(np.sqrt(v + eps))
            xhat = (xs[c] - m) / sd
            gamma, beta = float(self.state.gamma[c]), float(self.state.beta[c])
            sums = bounds.gradient_sums(errors, list(dys[c]), list(xhat))
            s1, s2 = float(dys[c].sum()), float((dys[c] * xhat).sum())
            factor = gamma / sd
            out = factor * (dys[c] - p * (s1 + xhat * s2))
            for i, (h, d) in enumerate(zip(xhat, dys[c], strict=True)):
                y[c, i] = bounds.output_error(rounding, gamma, beta, bounds.xhat_error(errors, h), gamma * h + beta)
                dx[c, i] = bounds.dx_error(errors, rounding, sums, factor, 0.0, d, h, p, s2, out[i])
            t_mean, q = float(ts[c].mean()), float((xhat * ts[c]).mean())
            moved = (ts[c] - t_mean - xhat * q) / sd
            s2_moved = float((dys[c] * moved).sum())
            second = -out * q / sd - factor * p * (moved * s2 + xhat * s2_moved)
            hvp[c] = bounds.second_order_errors(
                errors, rounding, sums, factor, 0.0, sd, list(dys[c]), list(xhat), [p] * n, list(ts[c]), t_mean, q,
                list(moved), s2, s2_moved, list(out), list(dx[c]), list(second),
            )  # fmt: skip
            mean[c] = errors.mean + rounding.u * abs(m)
            variance[c] = (errors.unbiased if self.unbiased else errors.variance) + rounding.u * u
            dgamma[c] = bounds.rounded(rounding.param, rounding.param_floor, sums.s2_error, s2)
        dbeta = np.array([bounds.dbeta_error(rounding, list(of_channel)) for of_channel in dys])
        return {"y": self._back(y, x.shape), "dx": self._back(dx, x.shape), "hvp": self._back(hvp, x.shape),
                "moving_mean": mean, "moving_variance": variance, "dgamma": dgamma, "dbeta": dbeta}  # fmt: skip

    def rows(self, x: NDArray) -> NDArray:
        """x as channels by values."""
        return np.moveaxis(x, self.axis, 0).reshape(self.channels, -1).astype(np.float64)

    def along(self, values: NDArray) -> NDArray:
        """One number per channel, to broadcast against x."""
        return np.reshape(values, [-1 if i == self.axis % self.x.ndim else 1 for i in range(self.x.ndim)])

    def _back(self, rows: NDArray, shape: tuple[int, ...]) -> NDArray:
        moved = np.moveaxis(np.empty(shape), self.axis, 0).shape
        return np.moveaxis(rows.reshape(moved), 0, self.axis)


Check = Callable[[Bench], Iterator[Finding]]


def names(pattern: str = "*") -> list[str]:
    """The ids of the checks that match a glob pattern."""
    return [name for name in _CHECKS if fnmatchcase(name, pattern)]


def run(checks: Sequence[str], target: Target, device: Any = None) -> Iterator[Result]:
    """Every check on one target, on three random cases each; one result a check.

    A check that a target has no words for, in any setting of a case, is left out there; in every case: unsupported.
    """
    assert target.backend is not None
    for name in checks:
        result = Result(name, GROUP, target.name, "pass")
        found: list[Finding] = []
        told: list[CannotSay] = []
        ran = False
        try:
            for seed in range(len(_LAYOUTS)):
                findings = _tried(_CHECKS[name], target.backend, device, seed, told)
                ran = ran or findings is not None
                found += findings or []
        except Exception as error:  # a finding about the backend, never the end of the run
            yield broken(result, error)
            continue
        if ran:
            yield verdict(result, found)
        else:  # a reason about what is asked for says more than one about a setting
            yield replace(result, status="unsupported", reason=str(max(told, key=lambda reason: reason.asked)))


def _tried(check: Check, backend: Backend, device: Any, seed: int, told: list[CannotSay]) -> list[Finding] | None:
    """What the check finds in the first setting that the backend has words for; None where it has for none."""
    for setting in settings(seed):
        try:
            return list(check(Bench(backend, device, seed, setting)))
        except CannotSay as reason:
            told.append(reason)
    return None


def gradient_sums_to_zero(bench: Bench) -> Iterator[Finding]:
    """Sum of dx over a channel is 0 in training: adding a constant to x changes nothing."""
    bench.need("dx")
    dx = bench.run().calls[0].dx
    yield from _sums_to_zero(bench, "dx", dx, bench.bound()["dx"])


def hvp_sums_to_zero(bench: Bench) -> Iterator[Finding]:
    """Sum of hvp over a channel is 0 in training, along any direction."""
    bench.need("hvp")
    direction = bench.normal()
    hvp = bench.run(direction=direction).calls[0].hvp
    yield from _sums_to_zero(bench, "hvp", hvp, bench.bound(direction=direction)["hvp"])


def hvp_is_symmetric(bench: Bench) -> Iterator[Finding]:
    """u · H v = v · H u: the second derivative does not ask which direction came first."""
    bench.need("hvp")
    u, v = bench.normal(), bench.normal()
    of_u, of_v = (bench.run(direction=direction).calls[0].hvp for direction in (u, v))
    if of_u is None or of_v is None:
        yield from bench.compare("hvp", None, u, 0.0)
        return
    one, other = bench.rows(u * of_v.astype(np.float64)), bench.rows(v * of_u.astype(np.float64))
    bound = bench.rows(np.abs(u) * bench.bound(direction=v)["hvp"] + np.abs(v) * bench.bound(direction=u)["hvp"])
    yield from bench.compare(
        "hvp", (one - other).sum(axis=1).astype(np.float32), np.zeros(bench.channels), bound.sum(axis=1)
    )


def shards_are_the_whole(bench: Bench) -> Iterator[Finding]:
    """A synchronized layer on three replicas, the rows cut at random: everything as of the whole batch on one."""
    rows = bench.x.shape[0]
    first, second = sorted(int(cut) for cut in bench.random.integers(0, rows + 1, 2))
    shards = (first, second - first, rows - second)
    sharded = bench.run(decay=0.0, synchronized=True, shards=shards)
    names = ("y", "dx", "dgamma", "dbeta", "moving_mean", "moving_variance")
    yield from _same(bench, bench.run(decay=0.0), sharded, bench.bound(), names)


def shift(bench: Bench) -> Iterator[Finding]:
    """x + 8: the same y and dx, moving mean up by (1 - decay) 8, the same moving variance."""
    base, moved = bench.run(decay=0.0), bench.run(bench.x + np.float32(8), decay=0.0)
    bound = bench.bound(bench.x + np.float32(8))
    yield from _same(bench, base, moved, bound, ("y", "dx", "moving_variance"))
    assert base.state.moving_mean is not None
    yield from bench.compare("moving_mean", moved.state.moving_mean, base.state.moving_mean + 8.0, bound["moving_mean"])


def scale(bench: Bench) -> Iterator[Finding]:
    """4 x with 16 epsilon: the same y, dx a quarter."""
    base, scaled = bench.run(), bench.run(4 * bench.x, epsilon=16 * bench.spec.epsilon)
    bound = bench.bound()
    yield from _same(bench, base, scaled, bound, ("y", "dgamma"))
    for name in bench.held("dx"):
        want = getattr(base.calls[0], name) / 4
        yield from bench.compare(name, getattr(scaled.calls[0], name), want, bound[name] / 4)


def permute_batch(bench: Bench) -> Iterator[Finding]:
    """Rows in another order: y and dx in that order, the same statistics."""
    order = bench.random.permutation(bench.x.shape[0])
    base, moved = bench.run(decay=0.0), bench.run(bench.x[order], bench.dy[order], decay=0.0)
    bound = bench.bound()
    yield from _same(bench, base, moved, bound, ("moving_mean", "moving_variance", "dgamma"))
    for name in bench.held("y", "dx"):
        want = getattr(base.calls[0], name)[order]
        yield from bench.compare(name, getattr(moved.calls[0], name), want, bound[name][order])


def permute_channels(bench: Bench) -> Iterator[Finding]:
    """Channels in another order, with their parameters: everything in that order."""
    order = bench.random.permutation(bench.channels)
    state = bench.state.replace(**{name: array[order] for name, array in bench.state.arrays().items()})
    take = [slice(None)] * bench.x.ndim
    take[bench.axis] = order  # type: ignore[call-overload]
    at = tuple(take)
    base, moved = bench.run(decay=0.0), bench.run(bench.x[at], bench.dy[at], decay=0.0, state=state)
    bound = bench.bound()
    for name in bench.held("y", "dx"):
        want = getattr(base.calls[0], name)[at]
        yield from bench.compare(name, getattr(moved.calls[0], name), want, bound[name][at])
    for name in ("moving_mean", "moving_variance"):
        want = getattr(base.state, name)[order]
        yield from bench.compare(name, getattr(moved.state, name), want, bound[name][order])


def decay_one(bench: Bench) -> Iterator[Finding]:
    """decay 1: the statistics stay, to the bit, and the counter counts."""
    state = bench.state.replace(
        moving_mean=bench.random.normal(size=bench.channels).astype(np.float32),
        moving_variance=bench.random.uniform(0.5, 2, bench.channels).astype(np.float32),
    )
    after = bench.run(decay=1.0, state=state).state
    for name in ("moving_mean", "moving_variance"):
        yield from bench.compare(name, getattr(after, name), getattr(state, name), 0.0)
    if "num_updates" not in bench.lacks:
        yield compare_counter(after.num_updates, 1)


def decay_zero_then_eval(bench: Bench) -> Iterator[Finding]:
    """decay 0: eval of the batch that was just trained on gives what training gave, but for Bessel's factor."""
    trained, evaluated = bench.run(decay=0.0), bench.run(decay=0.0, modes=(True, False))
    assert trained.state.moving_variance is not None and bench.state.beta is not None
    moving = trained.state.moving_variance.astype(np.float64)
    batch = moving / bench.bessel(bench.count)
    factor = bench.along(np.sqrt((batch + bench.spec.epsilon) / (moving + bench.spec.epsilon)))
    beta = bench.along(bench.state.beta).astype(np.float64)
    want = beta + (trained.calls[0].y.astype(np.float64) - beta) * factor
    yield from bench.compare("y", evaluated.calls[0].y, want, bench.bound()["y"])


def batch_twice(bench: Bench) -> Iterator[Finding]:
    """The batch with itself below: the same y twice, the same statistics, but that Bessel counts twice as many."""
    base = bench.run(decay=0.0)
    twice = bench.run(np.concatenate([bench.x] * 2), np.concatenate([bench.dy] * 2), decay=0.0)
    bound = bench.bound()
    factor = bench.bessel(2 * bench.count) / bench.bessel(bench.count)
    yield from _same_statistics(bench, base, twice, bound, factor)
    rows = bench.x.shape[0]
    yield from bench.compare("y", twice.calls[0].y[rows:], base.calls[0].y, bound["y"])


def mask_drops_rows(bench: Bench) -> Iterator[Finding]:
    """Masked rows have no say: statistics and the other rows as if they were not there."""
    mask = np.ones(bench.x.shape[0], bool)
    mask[:: 3 if mask.size > 4 else 2] = False
    masked = bench.run(decay=0.0, weights=mask)
    dropped = bench.run(bench.x[mask], bench.dy[mask], decay=0.0)
    bound = bench.bound(bench.x[mask], bench.dy[mask])
    yield from _same(bench, dropped, masked, bound, ("moving_mean", "moving_variance"))
    yield from bench.compare("y", masked.calls[0].y[mask], dropped.calls[0].y, bound["y"])


def weights_repeat_rows(bench: Bench) -> Iterator[Finding]:
    """A weight of 2 is the row twice, but for Bessel's n, which is W^2/Q; the total weight has no say."""
    weights = bench.random.integers(1, 4, bench.x.shape[0])
    repeated = bench.run(np.repeat(bench.x, weights, 0), np.repeat(bench.dy, weights, 0), decay=0.0)
    weighted = bench.run(decay=0.0, weights=(weights * 0.25).astype(np.float32))
    bound = bench.bound(np.repeat(bench.x, weights, 0), np.repeat(bench.dy, weights, 0))
    inner = bench.count / bench.x.shape[0]
    n = float(weights.sum()) ** 2 / float(np.square(weights).sum()) * inner
    factor = bench.bessel(n) / bench.bessel(float(weights.sum()) * inner)
    yield from _same_statistics(bench, repeated, weighted, bound, factor)
    first = np.concatenate([[0], np.cumsum(weights)[:-1]])
    want = repeated.calls[0].y[first]
    yield from bench.compare("y", weighted.calls[0].y, want, bound["y"][first])


def no_update_changes_only_state(bench: Bench) -> Iterator[Finding]:
    """update_stats=False: the same y and gradients, the state untouched."""
    base, still = bench.run(), bench.run(update_stats=False)
    yield from _same(bench, base, still, bench.bound(), ("y", "dx", "dgamma"))
    for name, array in bench.state.arrays().items():
        yield from bench.compare(name, getattr(still.state, name), array, 0.0)


def _sums_to_zero(bench: Bench, name: str, got: NDArray | None, bound: NDArray) -> Iterator[Finding]:
    sums = None if got is None else bench.rows(got).sum(axis=1).astype(np.float32)
    yield from bench.compare(name, sums, np.zeros(bench.channels), bench.rows(bound).sum(axis=1))


def _same(
    bench: Bench, want: Outcome, got: Outcome, bound: dict[str, NDArray], observables: Sequence[str]
) -> Iterator[Finding]:
    for name in bench.held(*observables):
        one, other = (_observable(outcome, name) for outcome in (want, got))
        yield from bench.compare(name, other, one, bound[name])


def _same_statistics(
    bench: Bench, want: Outcome, got: Outcome, bound: dict[str, NDArray], factor: float
) -> Iterator[Finding]:
    """The same moving mean, and the moving variance times a factor."""
    yield from _same(bench, want, got, bound, ("moving_mean",))
    assert want.state.moving_variance is not None
    variance = want.state.moving_variance * factor
    yield from bench.compare(
        "moving_variance", got.state.moving_variance, variance, bound["moving_variance"] * max(factor, 1.0)
    )


def _observable(outcome: Outcome, name: str) -> Any:
    if name in ("y", "dx"):
        return getattr(outcome.calls[0], name)
    return getattr(outcome if name in ("dgamma", "dbeta") else outcome.state, name)


_CHECKS: Final[dict[str, Check]] = {
    f"{GROUP}/{check.__name__.replace('_', '-')}": check
    for check in (
        gradient_sums_to_zero,
        hvp_sums_to_zero,
        hvp_is_symmetric,
        shards_are_the_whole,
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
