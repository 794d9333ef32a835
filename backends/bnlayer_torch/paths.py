"""The ways by which a batch's own statistics normalize it, and which of them a call can take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from bnlayer.paths import Paths

# native: torch's kernel in training mode, on x or on x minus its mean.
# checked: the kernel on x, and again on x minus its mean where its statistics turn out to need that.
# rows, columns: our own sums over (N, C, L) or (n, C), torch's kernels for the rest.
# weighted: with weights, our own sums and torch's kernels for the rest. composite: in differentiable operations.
# pieces, foldings: ghost batches one after the other, or as channels of their own.
PATHS = Paths("native", "checked", "rows", "columns", "weighted", "composite", "pieces", "foldings")


def can_look(x: Tensor) -> bool:
    """Whether x is plain numbers on the CPU, which can be looked at, and derivatives come from autograd's graph alone.

    Not so where operations are recorded, nor in forward-mode AD: there a path cannot depend on values, and a
    torch.autograd.Function of ours would not be followed. Of compilation, traces and torch.func `around` tells.
    """
    return (
        (type(x) is Tensor or type(x) is Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )
