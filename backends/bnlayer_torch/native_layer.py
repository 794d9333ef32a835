"""torch's own batch norm for inputs of any rank; torch's classes differ only in the rank they accept."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class AnyRank(_BatchNorm):
    """torch's `BatchNorm1d`, `2d` or `3d`, whichever takes the input."""

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ValueError(f"expected 2D to 5D input; got {input.dim()}D")
