"""y by statistics that are known already, with the gradients of normalizing by the batch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function

from .orders import Order


def by_known(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float, order: Order
) -> Tensor:
    """gamma (x - m)/sqrt(v + epsilon) + beta, where m and v are x's own: the gradient of x goes through them too.

    Args:
        x: float32 or float64 on the CPU.
        gamma, beta: (C,) of x's dtype, or None; no beta without a gamma.
        mean, variance: (C,) of x's dtype, without gradient.
        epsilon: above 0.
        order: x's.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gamma, beta)):
        return _by_known(x, gamma, beta, mean, variance, epsilon, order)
    return _applied(x, gamma, beta, mean, variance, epsilon, order)


def _applied(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float, order: Order
) -> Tensor:
    y = torch.batch_norm(order.merge(x), gamma, beta, mean, variance, False, 0.0, epsilon, False)
    return order.split(y, x.shape)


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
