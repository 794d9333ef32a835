"""From x to y by given or by the batch's statistics, in torch; where its kernels do, by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnlayer.call import CallPlan, RenormClips
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from . import fused
from .applied import by_known
from .dtypes import DTYPES
from .orders import Order
from .renorm import corrected, corrections
from .statistics import Moments, batch_moments
from .sums import measured
from .surroundings import around
from .tensors import held
from .weights import Shares, Weights, hide_too_much


@dataclass(frozen=True, eq=False)
class Channels:
    """The state's arrays as one call reads them: in the arithmetic's dtype, for the channels that it has.

    Attributes:
        state: of the layer; gradients flow to gamma and beta only.
        arithmetic: dtype to compute in.
        device: x's.
        features: the layer's channels.
        times: how often the layer's channels occur: once, or once for each ghost batch.
    """

    state: BatchNormState[Tensor]
    arithmetic: torch.dtype
    device: torch.device
    features: int
    times: int = 1

    @property
    def gamma(self) -> Tensor | None:
        """The scale, if there is one."""
        return None if self.state.gamma is None else self._as_channels(self.state.gamma)

    @property
    def beta(self) -> Tensor | None:
        """The offset, if there is one."""
        return None if self.state.beta is None else self._as_channels(self.state.beta)

    @property
    def moving(self) -> tuple[Tensor, Tensor]:
        """The moving mean and variance; 0 and 1 where none are tracked."""
        mean, variance = self.state.moving_mean, self.state.moving_variance
        if mean is None or variance is None:
            zeros = torch.zeros(self.features * self.times, dtype=self.arithmetic, device=self.device)
            return zeros, torch.ones_like(zeros)
        return self._as_channels(mean.detach()), self._as_channels(variance.detach())

    @property
    def renorm(self) -> tuple[Tensor, Tensor]:
        """The averages of batch renormalization: mean and standard deviation."""
        return self._as_channels(held(self.state, "renorm_mean")), self._as_channels(held(self.state, "renorm_stddev"))

    def _as_channels(self, values: Tensor) -> Tensor:
        values = values.to(self.arithmetic)
        return values if self.times == 1 else values.repeat(self.times)


@dataclass(frozen=True, eq=False)
class Affine:
    """What is done to the normalized values: gamma ((xhat r + d) s + b) + beta, as far as there is such a part.

    Attributes:
        gamma, beta: for each channel, broadcastable to x.
        correction: r and d of batch renormalization, likewise.
        adjustment: the pair s, b, broadcastable to x.
    """

    gamma: Tensor | None = None
    beta: Tensor | None = None
    correction: tuple[Tensor, Tensor] | None = None
    adjustment: tuple[Tensor, Tensor] | None = None

    def __call__(self, xhat: Tensor) -> Tensor:
        """All of it, of xhat of x's shape."""
        y = self.scaled(xhat)
        return y if self.beta is None else y + self.beta

    def scaled(self, xhat: Tensor, *, held: bool = False) -> Tensor:
        """All but beta; `held`: without the gradients into which xhat enters as a factor."""
        if self.correction is not None:
            r, d = self.correction
            xhat = torch.addcmul(d, xhat, r)
        if self.adjustment is not None:
            s, b = self.adjustment
            xhat = torch.addcmul(b, xhat, s.detach() if held else s)
        if self.gamma is None:
            return xhat
        return xhat * (self.gamma.detach() if held else self.gamma)


def by_batch(
    x: Tensor,
    channels: Channels,
    spec: BatchNormSpec,
    plan: CallPlan,
    weights: Weights | None,
    clips: RenormClips,
    adjustment: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Moments]:
    """y by the batch's own statistics, and these; by the eval formula where no weight is."""
    # torch's kernels know no weights, refuse an epsilon of 0, and give NaN for the variance of a single value.
    fusible = weights is None and spec.epsilon > 0 and plan.count != 1
    if fusible and spec.renorm is None and adjustment is None:
        given = x.float() if fused.loses_gradients(x) else x
        y, batch = _fused(given, channels.gamma, channels.beta, spec, plan)
        return y.to(x.dtype), batch
    wide = x.to(DTYPES[plan.arithmetic])  # once, so that a half x's gradients add up in float32
    if fusible and adjustment is None and around() in ("nothing", "recomputation"):
        assert plan.count is not None
        found = known(wide, plan.axis, plan.count, spec.epsilon)
        if found is not None:
            order, batch = found
            gamma, beta = parameters_of(channels, spec, batch, clips)
            y = by_known(wide, gamma, beta, batch.mean, batch.variance, spec.epsilon, order)
            return y.to(x.dtype), batch
    # Of a trace the ONNX exporter keeps the kernel's y only, and renorm needs the statistics.
    if fusible and (spec.renorm is None or around() != "trace"):
        xhat, batch = _fused(wide, None, None, spec, plan)
        return affine_of(channels, spec, plan, batch, clips, adjustment)(xhat).to(x.dtype), batch
    batch = batch_moments(wide, plan, weights)
    mean, variance = batch.mean, batch.variance
    affine = affine_of(channels, spec, plan, batch, clips, adjustment)
    if weights is not None:
        # Without a single weighted element there are no batch statistics: y comes by the eval formula.
        moving_mean, moving_variance = channels.moving
        mean = torch.where(weights.present, mean, moving_mean)
        variance = torch.where(weights.present, variance, moving_variance)
        affine = _where_present(affine, weights, plan)
    return by_statistics(wide, affine, mean, variance, spec.epsilon, plan, weights).to(x.dtype), batch


def by_shares(
    x: Tensor, channels: Channels, spec: BatchNormSpec, plan: CallPlan, shares: Shares, clips: RenormClips
) -> tuple[Tensor, Moments] | None:
    """As `by_batch` of x with these shares; None where what x holds, seen or hidden, is too much for it."""
    assert plan.count is not None
    wide = x.to(DTYPES[plan.arithmetic])  # once, so that a half x's gradients add up in float32
    found = measured(wide, shares.order, plan.count, shares)
    if found is None or hide_too_much(shares, wide):
        return None
    mean, variance = found
    batch = Moments(mean, variance, variance * shares.bessel)
    gamma, beta = parameters_of(channels, spec, batch, clips)
    y = by_known(wide, gamma, beta, mean, variance, spec.epsilon, shares.order, shares)
    return y.to(x.dtype), batch


def parameters_of(
    channels: Channels, spec: BatchNormSpec, batch: Moments, clips: RenormClips
) -> tuple[Tensor | None, Tensor | None]:
    """gamma and beta for what a batch's own statistics normalized; no beta without a gamma."""
    gamma, beta = channels.gamma, channels.beta
    if spec.renorm is not None:
        return corrected(gamma, beta, corrections(batch, *channels.renorm, spec.epsilon, clips))
    return fused.paired(gamma, beta), beta


def known(x: Tensor, axis: int, count: int, epsilon: float) -> tuple[Order, Moments] | None:
    """See `fused.statistics`."""
    found = fused.statistics(x, axis, count, epsilon)
    if found is None:
        return None
    order, (mean, variance) = found
    return order, Moments(mean, variance, variance * (count / (count - 1)))


def _fused(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, spec: BatchNormSpec, plan: CallPlan
) -> tuple[Tensor, Moments]:
    assert plan.count is not None
    way = fused.way_of(x, plan.axis, plan.count, spec.epsilon, plain=around() in ("nothing", "recomputation"))
    y, (mean, variance) = fused.from_batch(x, gamma, beta, spec.epsilon, plan.axis, plan.count, way)
    return y, Moments(mean, variance, variance * (plan.count / (plan.count - 1)))


def by_statistics(
    x: Tensor,
    affine: Affine,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    plan: CallPlan,
    weights: Weights | None = None,
) -> Tensor:
    """The affine of (x - mean) / sqrt(variance + epsilon), at every position; all of the plan's arithmetic."""
    mean, variance = mean.reshape(plan.channel_shape), variance.reshape(plan.channel_shape)
    sd = torch.sqrt(variance + epsilon)
    if weights is None:
        return affine((x - mean) / sd)
    # A masked position may hold anything. What is not finite there shows in y, but takes no part in the gradients
    # of gamma and the variance, where even a dy of 0 times it would be NaN.
    sound = weights.positive | torch.isfinite(x)
    unsound = affine.scaled((x - mean) / sd.detach(), held=True)
    y = torch.where(sound, affine.scaled((torch.where(sound, x, 0.0) - mean) / sd), unsound)
    return y if affine.beta is None else y + affine.beta


def plain_affine(channels: Channels, plan: CallPlan) -> Affine:
    """gamma and beta alone, in the shape that broadcasts against x."""
    gamma, beta = channels.gamma, channels.beta
    return Affine(
        None if gamma is None else gamma.reshape(plan.channel_shape),
        None if beta is None else beta.reshape(plan.channel_shape),
    )


def affine_of(
    channels: Channels,
    spec: BatchNormSpec,
    plan: CallPlan,
    batch: Moments,
    clips: RenormClips,
    adjustment: tuple[Tensor, Tensor] | None,
) -> Affine:
    """All that is done to what a batch's own statistics normalized."""
    plain = plain_affine(channels, plan)
    correction = None
    if spec.renorm is not None:
        r, d = corrections(batch, *channels.renorm, spec.epsilon, clips)
        correction = r.reshape(plan.channel_shape), d.reshape(plan.channel_shape)
    return Affine(plain.gamma, plain.beta, correction, adjustment)


def _where_present(affine: Affine, weights: Weights, plan: CallPlan) -> Affine:
    """The affine, without correction and adjustment where no weight is."""
    present = weights.present.reshape([-1 if i == plan.axis else 1 for i in range(len(plan.channel_shape))])

    def pair(given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        return None if given is None else (torch.where(present, given[0], 1.0), torch.where(present, given[1], 0.0))

    return Affine(affine.gamma, affine.beta, pair(affine.correction), pair(affine.adjustment))
