"""y by statistics that are known already, with the gradients of normalizing by the batch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function

from .orders import Order, in_blocks
from .surroundings import are_many
from .weights import Shares


def by_known(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    order: Order,
    shares: Shares | None = None,
) -> Tensor:
    """gamma (x - m)/sqrt(v + epsilon) + beta, where m and v are x's own: the gradient of x goes through them too.

    Args:
        x: float32 or float64 on the CPU.
        gamma, beta: (C,) of x's dtype, or None; no beta without a gamma.
        mean, variance: (C,) of x's dtype, without gradient.
        epsilon: above 0.
        order: x's.
        shares: of the positions in m and v; None: they are equal.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gamma, beta)):
        if shares is not None:
            return _by_weighted(x, gamma, beta, mean, variance, shares.relative, shares.total, epsilon, order)
        return _by_known(x, gamma, beta, mean, variance, epsilon, order)
    return _applied(x, gamma, beta, mean, variance, epsilon, order)


def _applied(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float, order: Order
) -> Tensor:
    # Memory of its own, which the kernel fills by a view: were y a view itself, autograd would let nothing change it in
    # place, as an activation after it may.
    y, unused = torch.empty_like(x), x.new_empty(0)
    out = order.merge(y), unused, unused
    torch.native_batch_norm(order.merge(x), gamma, beta, mean, variance, False, 0.0, epsilon, out=out)
    return y


class _ByKnown(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        epsilon: float,
        order: Order,
    ) -> Tensor:
        ctx.save_for_backward(x, gamma, mean, torch.rsqrt(variance.double() + epsilon).to(x.dtype))
        ctx.epsilon, ctx.order = epsilon, order
        return _applied(x, gamma, beta, mean, variance, epsilon, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, gamma, mean, rstd = ctx.saved_tensors
        order = ctx.order
        # The kernel has a derivative of its own, for a second order: it knows that m and v come from x.
        dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            order.merge(gradients[0]), order.merge(x), gamma, None, None, mean, rstd, True, ctx.epsilon,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return None if dx is None else order.split(dx, x.shape), dgamma, dbeta, None, None, None, None


_by_known: Final[Callable[..., Tensor]] = _ByKnown.apply


class _ByWeighted(Function):
    """With positions' shares p of the whole: dx = gamma/sd (dy - p (S1 + xhat S2)), S1 = sum dy, S2 = sum dy xhat."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        relative: Tensor,
        total: float,
        epsilon: float,
        order: Order,
    ) -> Tensor:
        ctx.save_for_backward(x, gamma, mean, variance, relative)
        ctx.total, ctx.epsilon, ctx.order = total, epsilon, order
        return _applied(x, gamma, beta, mean, variance, epsilon, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, gamma, mean, variance, relative = ctx.saved_tensors
        order, shape, total = ctx.order, x.shape, ctx.total
        x, dy = order.merge(x), order.merge(gradients[0])
        needs_x, needs_gamma, needs_beta = ctx.needs_input_grad[:3]
        dx: Tensor | None
        if torch.is_grad_enabled() or are_many(gradients[0]):
            dx, dgamma, dbeta = _gradients(x, dy, gamma, mean, relative / total, ctx.epsilon)
        else:
            _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                dy, x, gamma, mean, variance, None, None, False, ctx.epsilon, (False, True, True)
            )
            dx = None
            if needs_x:
                scale = torch.rsqrt(variance.double() + ctx.epsilon).to(x.dtype)
                scale = scale if gamma is None else scale * gamma
                through = (-1.0 / total) * scale
                dx = _dx(x, dy, scale, through * dgamma, through * dbeta, mean, variance, ctx.epsilon, relative)
        return (
            order.split(dx, shape) if needs_x and dx is not None else None,
            dgamma if needs_gamma else None,
            dbeta if needs_beta else None,
            None, None, None, None, None, None,
        )  # fmt: skip


def _dx(
    x: Tensor,
    dy: Tensor,
    scale: Tensor,
    of_xhat: Tensor,
    offset: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    relative: Tensor,
) -> Tensor:
    """scale dy + relative (of_xhat xhat + offset), block by block."""
    scale = scale.view(-1, *[1] * (x.dim() - 2))
    dx, unused = torch.empty_like(x), x.new_empty(0)
    cut = (in_blocks(dx), in_blocks(relative, like=dx), in_blocks(x), in_blocks(dy))
    for its_dx, its_relative, its_x, its_dy in zip(*cut, strict=True):
        out = its_dx, unused, unused
        torch.native_batch_norm(its_x, of_xhat, offset, mean, variance, False, 0.0, epsilon, out=out)
        torch.addcmul(its_dx.mul_(its_relative), its_dy, scale, out=its_dx)
    return dx


def _gradients(
    x: Tensor, dy: Tensor, gamma: Tensor | None, mean: Tensor, p: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta in differentiable operations, of (N, C, L) or (n, C): m and v are x's own here as well."""
    dims = (0, 2) if x.dim() > 2 else (0,)
    wide = (1, -1, 1)[: x.dim()]
    deviation = x - mean.reshape(wide)
    deviation = deviation - (p * deviation).sum(dims, keepdim=True)
    rstd = torch.rsqrt((p * torch.square(deviation)).sum(dims, keepdim=True) + epsilon)
    xhat = deviation * rstd
    s1, s2 = dy.sum(dims, keepdim=True), (dy * xhat).sum(dims, keepdim=True)
    scale = rstd if gamma is None else rstd * gamma.reshape(wide)
    return scale * (dy - p * (s1 + xhat * s2)), s2.reshape(-1), s1.reshape(-1)


_by_weighted: Final[Callable[..., Tensor]] = _ByWeighted.apply
