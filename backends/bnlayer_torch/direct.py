"""A module's training call with weights, renorm or ghost batches, on the module's own tensors.

`batch_norm` is right for every call. What it has to look up, to decide and to return anew takes as long as a batch of
a hundred thousand elements; here is what usual calls need of it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bnlayer.spec import Renorm

from .applied import by_known
from .fused import from_batch, paired, statistics, way_of, weighted_order
from .ghosts import Ghosts, averaged, fold_evenly, pieces_of, unfold_evenly
from .paths import PATHS, can_look
from .pieces import by_pieces
from .renorm import clipped, corrected
from .sums import measured
from .surroundings import around
from .weights import fits, hide_too_much, read_shares

_OF_RENORM: Final = ("renorm_mean", "renorm_stddev", "moving_stddev")


class _Own(NamedTuple):
    """A module's tensors and numbers: parameters and averages of x's dtype, channels on axis 1."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor
    epsilon: float
    momentum: float
    unbiased: bool


def trained(module: Any, x: Tensor, weights: Tensor | None) -> Tensor | None:
    """y, the module's averages moved in place; None, and nothing moved, where `batch_norm` has to look at the call.

    Args:
        module: one of `bnlayer_torch`'s, in training.
        x: its input.
        weights: as its `forward` takes them.

    Raises:
        InputError: a weight is negative, not finite, or not a real number.
    """
    size, renorm = module.virtual_batch_size, module.renorm
    if weights is None and size is None and renorm is None:
        return None
    own = _own(module, x) if around() == "nothing" and module._remembered is not None else None
    if own is None or PATHS.watched:  # the paths are those of `batch_norm`
        return None
    if size is None:
        y = _of_batch(module, own, x, weights, renorm)
    elif weights is None and renorm is None:
        y = _of_ghosts(own, x, size, module.virtual_batch_layout == "strided")
    else:
        return None
    if y is not None:
        module._buffers["num_batches_tracked"].add_(1)
    return y


def _own(module: Any, x: Tensor) -> _Own | None:
    buffers, parameters = module._buffers, module._parameters
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    epsilon, momentum, dtype = module.__dict__["eps"], module.momentum, x.dtype
    unbiased = module.moving_variance_estimator == "unbiased"
    if (
        mean is None
        or variance is None
        or "weight" not in parameters
        or "bias" not in parameters
        or buffers.get("num_batches_tracked") is None
        or not module.track_running_stats
        or module.axis != 1
        or not isinstance(epsilon, float)
        or epsilon <= 0.0
        or not isinstance(momentum, float)
        or module.nonfinite != "propagate"
        or module.zero_debias != "none"
        or module.synchronized
        or not can_look(x)
        or x.dim() < 2
        or x.shape[1] != module.num_features
        or (dtype is not torch.float32 and dtype is not torch.float64)
    ):
        return None
    own = _Own(parameters["weight"], parameters["bias"], mean, variance, epsilon, momentum, unbiased)
    return own if all(t is None or t.dtype is dtype for t in own[:4]) else None


def _of_batch(module: Any, own: _Own, x: Tensor, weights: Tensor | None, renorm: Renorm | None) -> Tensor | None:
    count, epsilon, shares = x.numel() // x.shape[1], own.epsilon, None
    if weights is not None:
        if not fits(weights, x):
            return None
        weights = weights.unsqueeze(1)
        order = weighted_order(x, weights, 1, count, epsilon)
        shares = None if order is None else read_shares(weights, x, 1, order)
        batch = None if shares is None else measured(x, shares.order, count, shares)
        if order is None or shares is None or batch is None or hide_too_much(shares, x):
            return None
        bessel = shares.bessel
    else:
        known = statistics(x, 1, count, epsilon) if count > 1 else None
        if known is None:
            return None
        (order, batch), bessel = known, count / (count - 1)
    if renorm is None:
        y = by_known(x, paired(own.gamma, own.beta), own.beta, *batch, epsilon, order, shares)
        _enter(own, *batch, bessel if own.unbiased else 1.0)
        return y
    average_mean, average_stddev, moving_stddev = (module._buffers.get(name) for name in _OF_RENORM)
    if average_mean is None or average_stddev is None or moving_stddev is None:
        return None
    mean, variance = batch
    stddev = torch.sqrt(variance + epsilon)
    correction = clipped(mean, stddev, average_mean, average_stddev, epsilon, renorm)
    gamma, beta = corrected(own.gamma, own.beta, correction)
    y = by_known(x, gamma, beta, mean, variance, epsilon, order, shares)
    for average, new, share in (
        (average_mean, mean, 1.0 - renorm.decay),
        (average_stddev, stddev, 1.0 - renorm.decay),
        (own.mean, mean, own.momentum),
        (moving_stddev, stddev, own.momentum),
    ):
        average.mul_(1.0 - share).add_(new, alpha=share)
    torch.mul(moving_stddev, moving_stddev, out=own.variance).sub_(epsilon).clamp_(min=0.0)
    return y


def _of_ghosts(own: _Own, x: Tensor, size: int, strided: bool) -> Tensor | None:
    rows, gamma, beta = x.shape[0], own.gamma, own.beta
    number = -(-rows // size)
    if number <= 1:
        return None
    folded = fold_evenly(x, number, strided)
    if folded is None:
        pieces = pieces_of(x, Ghosts(strided, 1, number, rows // number, rows % number))
        found = None if pieces is None else by_pieces(x, pieces, paired(gamma, beta), beta, own.epsilon)
        if pieces is None or found is None:
            return None
        y, means, variances = found
        batch = averaged(means, variances, pieces)
        _enter(own, batch.mean, batch.unbiased if own.unbiased else batch.variance, 1.0)
        return y
    count = folded.numel() // folded.shape[1]
    if count <= 1:
        return None
    gamma, beta = (None if t is None else torch.cat([t] * number) for t in (gamma, beta))
    way = way_of(folded, 1, count, own.epsilon, plain=True)
    y, each = from_batch(folded, gamma, beta, own.epsilon, 1, count, way)
    mean, variance = torch.stack(each).view(2, number, -1).mean(1)
    _enter(own, mean, variance, count / (count - 1) if own.unbiased else 1.0)
    return unfold_evenly(y, number, strided)


def _enter(own: _Own, mean: Tensor, variance: Tensor, bessel: float) -> None:
    own.mean.mul_(1.0 - own.momentum).add_(mean, alpha=own.momentum)
    own.variance.mul_(1.0 - own.momentum).add_(variance, alpha=own.momentum * bessel)
