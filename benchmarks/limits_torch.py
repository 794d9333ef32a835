"""torch: the least that a call takes, whoever makes it: bare operations that give the same y and gradients.

No look at the call, no second order, and where it does not say so no averages and no guard of the sums. What has no
formula in one of torch's operations is a function of its own to autograd, as it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function

from .cases import NDArray

GHOSTS: Final = 4
_BLOCK: Final = 1 << 19
_FEW_ROWS: Final = (64, 49)  # of one product of matrices, which may add them one after the other
Gradients = tuple[Tensor, Tensor, Tensor]
_ops: Final = torch.ops.aten


def looked(layer: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """What a layer does that has weights to refuse, and nothing else to do with them."""
    low, high = torch.aminmax(weights)
    assert low.item() >= 0 and high.item() < torch.inf
    return layer(x)


class Bare:
    """Called like a layer.

    Args:
        option: of `OPTIONS` by name; "" for a plain call.
        values: gamma, beta, moving_mean, moving_variance.
        epsilon: added to the variance.
        training: whether the batch's own statistics normalize.
        kept: whether, of (n, C), sums are checked and averages moved as well.
    """

    def __init__(
        self, option: str, values: Mapping[str, NDArray], epsilon: float, *, training: bool, kept: bool = False
    ) -> None:
        given = [torch.from_numpy(values[name].copy()) for name in ("gamma", "beta", "moving_mean", "moving_variance")]
        self.gamma, self.beta, self.mean, self.variance = given
        self._parameters = [each.requires_grad_(training) for each in given[:2]]
        self._option, self._epsilon, self._training, self._kept = option, epsilon, training, kept
        self._counter, self._hidden = torch.tensor(0), torch.tensor([(16 * epsilon) ** 0.5])

    def zero_grad(self) -> None:
        """As a layer's."""
        for parameter in self._parameters:
            parameter.grad = None

    def __call__(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """y."""
        if not self._training:
            return torch.batch_norm(
                x, self.gamma, self.beta, self.mean, self.variance, False, 0.0, self._epsilon, False
            )
        if not self._option:
            return self._plain(x)
        forward: Callable[..., Any]
        if weights is not None:
            forward = partial(_weighted, self._epsilon, weights)
        elif self._option == "renorm":
            forward = partial(_renorm, self._epsilon, self.mean, self.variance)
        else:
            forward = partial(_ghosts, self._epsilon, self._option == "strided ghosts")
        forward = partial(self._keep, forward)
        if torch.is_grad_enabled():
            return _Derived.apply(x, self.gamma, self.beta, forward)  # type: ignore[no-untyped-call, no-any-return]
        return forward(x, self.gamma, self.beta)[0]

    def _plain(self, x: Tensor) -> Tensor:
        if not self._kept:
            return torch.native_batch_norm(x, self.gamma, self.beta, None, None, True, 0.0, self._epsilon)[0]
        _ = torch.cat((self.mean, self.variance))  # to go back to, if the check fails
        y, mean, rstd = torch.native_batch_norm(
            x, self.gamma, self.beta, self.mean, self.variance, True, 0.1, self._epsilon
        )
        self._counter.add_(1)
        assert torch.hypot(mean, self._hidden).mul_(rstd).max().item() < 5
        return y

    def _keep(self, forward: Callable[..., Any], x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Any]:
        y, backward, mean, variance = forward(x, gamma, beta)
        if not self._kept:
            return y, backward
        assert torch.square(mean).sub_(variance, alpha=16.0).max().item() <= 0
        if len(mean) > x.shape[1]:
            mean, variance = (each.view(GHOSTS, -1).mean(0) for each in (mean, variance))
        averages = (self.mean, mean), (self.variance, variance)
        for average, new in averages * (2 if self._option == "renorm" else 1):
            average.mul_(0.9).add_(new, alpha=0.1)
        self._counter.add_(1)
        return y, backward


class _Derived(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, forward: Callable[..., Any]) -> Tensor:
        y, ctx.backward_of = forward(x, gamma, beta)
        ctx.save_for_backward(x, gamma)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *ctx.backward_of(*ctx.saved_tensors, gradients[0]), None


def _flat(x: Tensor) -> Tensor:
    """(n, C) where the channels are innermost, else (N, C, L)."""
    if x.dim() == 2:
        return x
    return x.flatten(2) if x.is_contiguous() else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _blocks(x: Tensor) -> int:
    """Rows of a block."""
    return max(1, len(x) * _BLOCK // x.numel())


def _kernel_into(y: Tensor, x: Tensor, *given: Any) -> None:
    unused = x.new_empty(0)
    torch.native_batch_norm(x, *given, out=(y, unused, unused))


def _renorm(epsilon: float, mean: Tensor, variance: Tensor, x: Tensor, gamma: Tensor, beta: Tensor) -> Any:
    """With clips of 1 and 0."""
    its_mean, its_variance = _ops.batch_norm_update_stats(x, None, None, 0.0)
    stddev = torch.sqrt(its_variance + epsilon)
    r, d = (stddev / variance).clamp(1.0, 1.0), ((its_mean - mean) / variance).clamp(0.0, 0.0)
    y = torch.batch_norm(
        x, gamma * r, torch.addcmul(beta, gamma, d), its_mean, its_variance, False, 0.0, epsilon, False
    )

    def backward(x: Tensor, gamma: Tensor, dy: Tensor) -> Gradients:
        return _ops.native_batch_norm_backward(  # type: ignore[no-any-return]
            dy, x, gamma * r, None, None, its_mean, 1.0 / stddev, True, epsilon, (True, True, True)
        )

    return y, backward, its_mean, its_variance


def _weighted(epsilon: float, weights: Tensor, x: Tensor, gamma: Tensor, beta: Tensor) -> Any:
    flat, y = _flat(x), torch.empty_like(x)
    w = weights.to(x.dtype).reshape(-1, 1) if flat.dim() == 2 else weights.to(x.dtype).reshape(len(x), 1, -1)
    every = w.sum().item() * (flat.numel() / (w.numel() * x.shape[1]))
    sums = _sums_of_columns if flat.dim() == 2 else _sums_of_rows
    total, squares = sums(flat, w, weights.dtype is torch.bool)
    mean = total.div_(every)
    variance = squares.div_(every).addcmul_(mean, mean, value=-1.0)
    given = mean, variance, False, 0.0, epsilon
    _kernel_into(_flat(y), flat, gamma, beta, *given)

    def backward(x: Tensor, gamma: Tensor, dy: Tensor) -> Gradients:
        x, dy, result = _flat(x), _flat(dy), torch.empty_like(x)
        _, dgamma, dbeta = _ops.native_batch_norm_backward(
            dy, x, gamma, mean, variance, None, None, False, epsilon, (False, True, True)
        )
        scale = torch.rsqrt(variance + epsilon).mul_(gamma)
        slope, offset = scale * dgamma / -every, scale * dbeta / -every
        wide = scale.view(-1, *[1] * (x.dim() - 2))
        rows = _blocks(x)
        for dx, *its in zip(*(torch.split(t, rows) for t in (_flat(result), x, dy, w)), strict=True):
            _kernel_into(dx, its[0], slope, offset, *given)
            torch.addcmul(dx.mul_(its[2]), its[1], wide, out=dx)
        return result, dgamma, dbeta

    return y, backward, mean, variance


def _sums_of_rows(x: Tensor, w: Tensor, boolean: bool) -> tuple[Tensor, Tensor]:
    rows = _blocks(x)
    found, room = x.new_empty(2, *x.shape[:2]), torch.empty_like(x[:rows])
    for some, its, total, squares in zip(*(torch.split(t, rows) for t in (x, w, *found)), strict=True):
        part = torch.mul(some, its, out=room[: len(some)])
        torch.sum(part, -1, out=total)
        if boolean:
            torch.linalg.vector_norm(part, dim=-1, out=squares).square_()
        else:
            torch.sum(part.mul_(some), -1, out=squares)
    total, squares = found.sum(1)
    return total, squares


def _sums_of_columns(x: Tensor, w: Tensor, _: bool) -> tuple[Tensor, Tensor]:
    if x.numel() < 1 << 17:
        part = x * w
        return part.sum(0), part.mul_(x).sum(0)
    length = next(length for length in _FEW_ROWS if len(x) % length == 0)
    cut, its = x.view(-1, length, x.shape[1]), w.view(-1, 1, length)
    rows = _blocks(cut)
    total, squares = torch.bmm(its, cut), cut.new_empty(len(cut), 1, x.shape[1])
    room = torch.empty_like(cut[:rows])
    for some, weights, found in zip(*(torch.split(t, rows) for t in (cut, its, squares)), strict=True):
        torch.bmm(weights, torch.mul(some, some, out=room[: len(some)]), out=found)
    return total.sum((0, 1)), squares.sum((0, 1))


def _ghosts(epsilon: float, strided: bool, x: Tensor, gamma: Tensor, beta: Tensor) -> Any:
    """Channels are innermost."""
    if x.dim() == 2 and (strided or len(x) <= 256):
        return _folded(epsilon, strided, x, gamma, beta)
    y, found, room = torch.empty_like(x), [], None
    for target, part in zip(_each(y, strided), _each(x, strided), strict=True):
        if strided:
            part = room = torch.empty_like(part).copy_(part) if room is None else room.copy_(part)
            mean, variance = _ops.batch_norm_update_stats(part.flatten(0, 1), None, None, 0.0)
            rstd = torch.rsqrt(variance + epsilon)
            scale = rstd * gamma
            torch.addcmul(torch.addcmul(beta, mean, scale, value=-1.0), part, scale, out=target)
        else:
            mean, rstd = torch.empty_like(gamma), torch.empty_like(gamma)
            torch.native_batch_norm(part, gamma, beta, None, None, True, 0.0, epsilon, out=(target, mean, rstd))
        found.append((mean, rstd))

    def backward(x: Tensor, gamma: Tensor, dy: Tensor) -> Gradients:
        result, sums, rooms = torch.empty_like(x), [], None
        every = zip(*(_each(t, strided) for t in (result, x, dy)), found, strict=True)
        for target, part, its_dy, (mean, rstd) in every:
            if not strided:
                dx, *its_sums = _ops.native_batch_norm_backward(
                    its_dy, part, gamma, None, None, mean, rstd, True, epsilon, (True, True, True)
                )
                target.copy_(dx)
            else:
                rooms = (torch.empty_like(part), torch.empty_like(part)) if rooms is None else rooms
                part, its_dy = rooms[0].copy_(part), rooms[1].copy_(its_dy)
                _, *its_sums = _ops.native_batch_norm_backward(
                    its_dy.flatten(0, 1), part.flatten(0, 1), None, None, None, mean, rstd, True, epsilon,
                    (False, True, True),
                )  # fmt: skip
                scale = rstd * gamma
                of_x = its_sums[0] * rstd * scale / -(part.numel() // len(scale))
                offset = torch.addcmul(its_sums[1] * scale / -(part.numel() // len(scale)), of_x, mean, value=-1.0)
                torch.addcmul(torch.addcmul(offset, part, of_x, out=part), its_dy, scale, out=target)
            sums.append(its_sums)
        dgamma, dbeta = (torch.stack(each).sum(0) for each in zip(*sums, strict=True))
        return result, dgamma, dbeta

    return y, backward, None, None


def _each(x: Tensor, strided: bool) -> tuple[Tensor, ...]:
    flat = _flat(x)
    if strided:
        return flat.view(len(x) // GHOSTS, GHOSTS, -1, x.shape[1]).unbind(1)
    return flat.chunk(GHOSTS)


def _folded(epsilon: float, strided: bool, x: Tensor, gamma: Tensor, beta: Tensor) -> Any:
    """Ghost batches of (n, C) as channels of their own."""

    def fold(x: Tensor) -> Tensor:
        if not strided:
            x = x.view(GHOSTS, -1, x.shape[1]).transpose(0, 1)
        return x.reshape(-1, wide)

    def unfold(x: Tensor) -> Tensor:
        if strided:
            return x.view(-1, features)
        return x.view(-1, GHOSTS, features).transpose(0, 1).reshape(-1, features)

    features, wide = x.shape[1], GHOSTS * x.shape[1]
    gammas, betas = torch.cat([gamma] * GHOSTS), torch.cat([beta] * GHOSTS)
    folded = fold(x)
    y, mean, rstd = torch.native_batch_norm(folded, gammas, betas, None, None, True, 0.0, epsilon)

    def backward(_: Tensor, __: Tensor, dy: Tensor) -> Gradients:
        dx, *sums = _ops.native_batch_norm_backward(
            fold(dy), folded, gammas, None, None, mean, rstd, True, epsilon, (True, True, True)
        )
        dgamma, dbeta = (each.view(GHOSTS, -1).sum(0) for each in sums)
        return unfold(dx), dgamma, dbeta

    return unfold(y), backward, mean, torch.pow(rstd, -2)
