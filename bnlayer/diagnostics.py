"""What is wrong with these batch norms? Rules over specs and statistics, of a checkpoint or of a live model.

A rule speaks only where a healthy model would not: a freshly made one is "never trained" and nothing else, whatever its
gammas were started with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from .contract import LayerRecord
from .spec import BatchNormSpec
from .state import BatchNormState

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .checkpoint.batch_norms import StoredBatchNorm

NDArray = np.ndarray[Any, np.dtype[Any]]
Severity = Literal["error", "warning", "note"]

# Below this share of the layer's usual size a gamma or a variance carries nothing on.
_NOTHING: Final = 1e-7
_SMALLEST_NORMAL_HALF: Final = 2.0**-14
_LARGEST_HALF: Final = 65504.0
# A channel's mean is as often below 0 as above; so many positive ones are no chance.
_ENOUGH: Final = 8
_STATISTICS: Final = {"var", "running_var", "moving_variance", "batch_hidden_variance", "ema_variance"}
_NAMED_LIKE_ONE: Final = re.compile(r"(batch_?norm(alization)?|(^|[._/])bn)(_?\d+)?([a-z])?$", re.IGNORECASE)
# An optimizer's averages of the parameters are named as these are, below a name of its own.
_OPTIMIZERS: Final = re.compile(r"(^|[./])(opt_state|optimizer)[./]")


@dataclass(frozen=True)
class Diagnosis:
    """One finding.

    Attributes:
        layer: the batch norm's name, or "" where it is about all of them.
        code: the rule, such as "never-trained"; stable, for programs.
        severity: "error": the numbers are wrong or will be; "warning": they may be; "note": worth knowing.
        message: what was found, and what it means.
        remedy: what to do.
    """

    layer: str
    code: str
    severity: Severity
    message: str
    remedy: str


@dataclass(frozen=True, eq=False)
class _Patient:
    """One batch norm, its arrays in float64."""

    name: str
    spec: BatchNormSpec
    decay_is_told: bool
    state: BatchNormState[NDArray]
    gamma: NDArray | None
    beta: NDArray | None
    mean: NDArray
    variance: NDArray

    @property
    def at_start(self) -> bool:
        """The moving statistics are what a new layer has."""
        return bool((self.mean == 0).all() and ((self.variance == 1).all() or (self.variance == 0).all()))

    @property
    def counter(self) -> int | None:
        return None if self.state.num_updates is None else int(self.state.num_updates)


def diagnose(
    batch_norms: Iterable[StoredBatchNorm | LayerRecord], checkpoint: Checkpoint | None = None
) -> list[Diagnosis]:
    """Every finding about these batch norms, errors first, then in their order.

    Args:
        batch_norms: of a checkpoint (`Checkpoint.batch_norms`) or of a live model (`bnlayer.batch_norms`).
        checkpoint: where they are from, to see what it lacks.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    patients = [_patient(one) for one in batch_norms if one.spec is not None]
    findings = [finding for patient in patients for rule in _RULES for finding in rule(patient)]
    findings += _together(patients)
    if checkpoint is not None:
        findings += _absent(checkpoint, {patient.name for patient in patients})
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _patient(one: StoredBatchNorm | LayerRecord) -> _Patient:
    state = one.state if isinstance(one, LayerRecord) else one.state()
    spec = one.spec
    assert spec is not None and state is not None

    def wide(array: NDArray | None, default: float = 0.0) -> NDArray:
        return np.full(1, default) if array is None else np.asarray(array).astype(np.float64)

    told = isinstance(one, LayerRecord) or one.sources["decay"] != "assumed"
    gamma, beta = (None if a is None else wide(a) for a in (state.gamma, state.beta))
    mean, variance = wide(state.moving_mean, 0.5), wide(state.moving_variance, 0.5)  # untracked: neither new nor odd
    return _Patient(one.name, spec, told, state, gamma, beta, mean, variance)


def _not_finite(p: _Patient) -> Iterator[Diagnosis]:
    """NaN and infinities; in float16, what became too large for it."""
    for name, array in p.state.arrays().items():
        bad = int((~np.isfinite(np.asarray(array).astype(np.float64))).sum())
        if not bad:
            continue
        if np.asarray(array).dtype == np.float16 and not np.isnan(np.asarray(array)).any():
            yield Diagnosis(
                p.name, "float16-overflow", "error",
                f"{bad} of {array.size} values of {name} are infinite in float16, which ends at 65504.",
                "Keep batch norm's statistics in float32, and save the checkpoint again.",
            )  # fmt: skip
        else:
            yield Diagnosis(
                p.name, "not-finite", "error",
                f"{bad} of {array.size} values of {name} are NaN or infinite; an average keeps them for good.",
                "Go back to a checkpoint from before, or recalibrate the statistics; train with nonfinite='keep'.",
            )  # fmt: skip


def _variance_below_zero(p: _Patient) -> Iterator[Diagnosis]:
    """Negative variances; with means that are all positive, the two are swapped."""
    negative = int((p.variance < 0).sum())
    if not negative:
        return
    if bool((p.mean >= 0).all()) and bool((p.mean > 0).any()):
        yield Diagnosis(
            p.name, "mean-and-variance-swapped", "error",
            f"{negative} of {p.variance.size} variances are negative, and no mean: the two were read for each other.",
            "Swap the two where the file was written, and check the order of the other layers.",
        )  # fmt: skip
    else:
        yield Diagnosis(
            p.name, "negative-variance", "error",
            f"{negative} of {p.variance.size} variances are negative, down to {p.variance.min():.3g}: eval"
            " gives NaN where"
            " epsilon does not cover it.",
            "Find what wrote it (a shifted epsilon, E[x^2]-E[x]^2 in low precision); recalibrate the statistics.",
        )  # fmt: skip


def _half_underflow(p: _Patient) -> Iterator[Diagnosis]:
    """Statistics stored in float16 at the ends of its range."""
    stored = p.state.moving_variance
    if stored is None or np.asarray(stored).dtype != np.float16 or p.at_start:
        return
    small = int((np.abs(p.variance) < _SMALLEST_NORMAL_HALF).sum())
    if small:
        yield Diagnosis(
            p.name, "float16-underflow", "warning",
            f"{small} of {p.variance.size} variances are below {_SMALLEST_NORMAL_HALF:.2g}: float16 has few"
            " digits there.",
            "Keep batch norm's statistics in float32, and save the checkpoint again.",
        )  # fmt: skip
    large = int((np.maximum(np.abs(p.mean), p.variance) == _LARGEST_HALF).sum())
    if large:
        yield Diagnosis(
            p.name, "float16-overflow", "error",
            f"{large} statistics are 65504, the largest number of float16: they were cut off there.",
            "Keep batch norm's statistics in float32, and save the checkpoint again.",
        )  # fmt: skip


def _inverted_momentum(p: _Patient) -> Iterator[Diagnosis]:
    """An average that mostly forgets."""
    decay = p.spec.decay
    if p.decay_is_told and decay != "cumulative" and decay < 0.5:
        yield Diagnosis(
            p.name, "momentum-inverted", "warning",
            f"the old statistics weigh {decay:g} and the new batch {1 - decay:g}, so eval follows the last"
            " batch. Momentum"
            " is the weight of the old in Keras and JAX, and of the new in torch.",
            f"If that is not meant, set the decay to {1 - decay:g} (torch's momentum {decay:g}).",
        )  # fmt: skip


def _dead_channels(p: _Patient) -> Iterator[Diagnosis]:
    """Channels that carry nothing: constant inputs, gammas of 0."""
    if p.at_start:
        return
    constant = p.variance == 0
    usual = float(np.median(p.variance))
    if usual > 0:
        constant |= (p.variance >= 0) & (p.variance < _NOTHING * usual)
    if constant.any():
        yield Diagnosis(
            p.name, "dead-channels", "warning" if bool((p.variance == 0).all()) else "note",
            f"{int(constant.sum())} of {constant.size} channels have a variance of 0 or nearly: their input does not"
            " vary, and eval divides what there is by sqrt(epsilon).",
            "Look at the layer before (dead units, a pruned channel); nothing to do if it was pruned.",
        )  # fmt: skip
    if p.gamma is not None and bool((p.gamma != 0).any()):
        usual = float(np.median(np.abs(p.gamma)))
        dead = np.abs(p.gamma) <= _NOTHING * usual if usual > 0 else p.gamma == 0
        if dead.any():
            yield Diagnosis(
                p.name, "dead-channels", "note",
                f"{int(dead.sum())} of {dead.size} gammas are 0 or nearly: these channels carry beta and nothing else.",
                "Nothing, if weight decay or pruning did it on purpose; else look at the learning rate.",
            )  # fmt: skip


def _beta_as_gamma(p: _Patient) -> Iterator[Diagnosis]:
    """A gamma starts at 1 and seldom changes its sign; a beta starts at 0 and is about as often negative."""
    if p.gamma is None or p.beta is not None or p.gamma.size < _ENOUGH:
        return
    negative = float((p.gamma < 0).mean())
    if negative >= 0.25 or bool((p.gamma == 0).all()):
        yield Diagnosis(
            p.name, "beta-as-gamma", "warning",
            f"it has a gamma and no beta, and the gamma looks like a beta ({negative:.0%} negative, mean"
            f" {p.gamma.mean():.2g}): a layer with scale=False stores beta in gamma's place.",
            "If the layer was built with scale=False, read its first array as beta (--names, or the .keras file).",
        )  # fmt: skip


def _counter_against_statistics(p: _Patient) -> Iterator[Diagnosis]:
    """A counter that contradicts the statistics beside it."""
    if p.counter is None:
        return
    if p.counter == 0 and not p.at_start:
        yield Diagnosis(
            p.name, "counter-inconsistent", "warning",
            "the counter says that nothing entered the statistics, and they are not a new layer's: the counter was"
            " lost, or the statistics came from elsewhere.",
            "It matters to cumulative averages and zero-debias only; give the right count there.",
        )  # fmt: skip
    elif p.counter > 0 and p.at_start:
        yield Diagnosis(
            p.name, "counter-inconsistent", "error",
            f"the counter says {p.counter} updates, and the statistics are a new layer's: they were lost on the way.",
            "Take them from the checkpoint that this one was made of, or recalibrate.",
        )  # fmt: skip


_RULES: Final = (
    _not_finite,
    _variance_below_zero,
    _half_underflow,
    _inverted_momentum,
    _dead_channels,
    _beta_as_gamma,
    _counter_against_statistics,
)


def _together(patients: Sequence[_Patient]) -> Iterator[Diagnosis]:
    """What only shows beside the other layers."""
    tracking = [p for p in patients if p.spec.track_moving_stats]
    new = [p for p in tracking if p.at_start]
    if new and len(new) == len(tracking):
        yield Diagnosis(
            "", "never-trained", "error",
            f"the moving statistics of all {len(new)} batch norms are a new layer's (0 and 1): never trained, trained"
            " without the update ops (TensorFlow 1's UPDATE_OPS), or lost when the checkpoint was made.",
            "Train, run the update ops, or recalibrate; a model that is meant to be new has no fault.",
        )  # fmt: skip
        return
    for p in new:
        yield Diagnosis(
            p.name, "statistics-at-start", "error",
            f"its moving statistics are a new layer's (0 and 1), unlike those of {len(tracking) - len(new)} other batch"
            " norms: it was never called in training, its updates did not run, or its statistics were lost.",
            "See that it is reached and not frozen in training; recalibrate its statistics.",
        )  # fmt: skip
    counters = {p.name: p.counter for p in tracking if p.counter is not None and not p.at_start}
    most = max((n for n in counters.values() if n is not None), default=0)
    for name, count in counters.items():
        if count is not None and 0 < count < most:
            yield Diagnosis(
                name, "statistics-behind", "warning",
                f"{count} updates entered its statistics, up to {most} others': it was frozen, skipped or added later.",
                "Nothing, if it was frozen on purpose; else recalibrate its statistics.",
            )  # fmt: skip


def _absent(checkpoint: Checkpoint, found: set[str]) -> Iterator[Diagnosis]:
    """Layers with a batch norm's name and parameters, and no statistics in the file."""
    from .checkpoint.naming import split

    owners: dict[str, set[str]] = {}
    for name in checkpoint.tensors:
        owner, leaf = split(name.removesuffix(":0"))
        owners.setdefault(owner, set()).add(leaf)
    for owner, leaves in owners.items():
        named = _NAMED_LIKE_ONE.search(split(owner)[1] or owner) or "num_batches_tracked" in leaves
        if named and owner not in found and not _STATISTICS & leaves and not _OPTIMIZERS.search(owner):
            parameters = leaves & {"weight", "bias", "gamma", "beta", "scale", "offset", "num_batches_tracked"}
            plain = owner.split("params/", 1)[-1]
            if parameters and not any(plain == name.split("/", 1)[-1] or plain == name for name in found):
                yield Diagnosis(
                    owner, "statistics-missing", "error",
                    f"it has {', '.join(sorted(parameters))} and no moving statistics: they were not saved, as where"
                    " only trainable variables are, or one of two collections.",
                    "Save the whole state: state_dict, global variables, batch_stats; or recalibrate after loading.",
                )  # fmt: skip
