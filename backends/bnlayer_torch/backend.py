"""The `torch` backend: the contract of `bnlayer.contract.Backend` over this package's modules. Imports no torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bnlayer.contract import NDArray, Outcome, Request, require
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.shards import cut, join
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .support import missing

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
        return missing(request)

    def build(self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None) -> Module:
        require("torch", "torch")
        from .bridge import write_state
        from .devices import checked
        from .layer import BatchNorm

        layer = BatchNorm(spec, device=checked(device))
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
        from .bridge import read_state, run_step

        spec = layer.spec
        if request.shards is not None:
            if not spec.synchronized:
                raise InputError("shards need a synchronized layer; build it with synchronized=True.")
            reason = missing(request)
            if reason is not None:
                raise UnsupportedError(f"backend {self.name!r} does not support {reason}.")
            from .replicas import run

            outcomes = run(spec, read_state(layer, spec), cut(request), _device(layer))
            outcome = join(request, outcomes)
            return self.load(layer, outcome.state), outcome
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


def _device(layer: Module) -> str:
    return next((str(tensor.device) for tensor in (*layer.parameters(), *layer.buffers())), "cpu")


BACKEND = TorchBackend()
