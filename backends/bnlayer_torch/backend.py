"""The `torch` backend: the contract of `bnlayer.contract.Backend` over this package's modules. Imports no torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bnlayer.contract import NDArray, Outcome, Request, require
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .support import MISSING

if TYPE_CHECKING:
    from torch import Tensor

    from .layer import Module


class TorchBackend:
    """bnlayer's batch norm in PyTorch."""

    name = "torch"

    def version(self) -> str:
        return str(require("torch", "torch").__version__)

    def owns(self, layer: Any) -> bool:
        ours = sys.modules.get("bnlayer_torch.layer")  # without it nobody has built one
        return ours is not None and isinstance(layer, ours.Module)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        return MISSING.reason(spec, request)

    def build(self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None) -> Module:
        require("torch", "torch")
        from .bridge import write_state
        from .layer import BatchNorm

        layer = BatchNorm(spec, device=device)
        if state is not None:
            write_state(layer, state, spec)
        return layer

    def extract(self, layer: Module) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        from .bridge import read_state

        spec = layer.spec
        return spec, read_state(layer, spec)

    def load(self, layer: Module, state: BatchNormState[NDArray]) -> Module:
        from .bridge import write_state

        write_state(layer, state, layer.spec)
        return layer

    def step(self, layer: Module, request: Request) -> tuple[Module, Outcome]:
        from .bridge import run_step

        spec = layer.spec
        MISSING.refuse(self.name, spec, request)
        layer.train(request.training)
        layer.frozen_statistics = request.frozen_statistics

        def forward(x: Tensor, weights: Tensor | None, adjustment: tuple[Tensor, Tensor] | None) -> Tensor:
            y: Tensor = layer(
                x,
                weights,
                update_stats=request.update_stats,
                adjustment=adjustment,
                renorm_clips=request.renorm_clips,
            )
            return y

        return layer, run_step(layer, spec, request, forward)


BACKEND = TorchBackend()
