"""The batch norms inside of a torch model: listed, exchanged for ours or for torch.nn's, frozen; and the model
as a whole: read, written, run. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bnlayer.contract import Kind, LayerRecord, NDArray, Part, Run
from bnlayer.dialects import complement
from bnlayer.errors import UnsupportedError
from bnlayer.spec import BatchNormSpec

if TYPE_CHECKING:
    from torch.nn import Module

    from bnlayer.checkpoint import Checkpoint


class TorchModels:
    """Any `torch.nn.Module`: containers, compiled and wrapped models, or a single batch norm."""

    name = "torch"

    def owns(self, model: Any) -> bool:
        """Whether it is a torch module. A Keras model that runs on torch is one too, but Keras's to reach into."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(model, torch.nn.Module):
            return False
        return not any(kind.__module__.split(".")[0] == "keras" for kind in type(model).__mro__)

    def batch_norms(self, model: Module) -> Sequence[LayerRecord]:
        """Those of torch's class `_BatchNorm`, which ours are too, by the names of `named_modules`."""
        from torch.nn.modules.batchnorm import _BatchNorm

        from .exchange import record

        return [record(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]

    def counterpart(self, record: LayerRecord, to: Kind) -> Module:
        """The other kind's module over the very same tensors, hooks and flags; the record's stays as it is."""
        from .exchange import native_of, ours_of

        return ours_of(record.layer) if to == "bnlayer" else native_of(record.layer)

    def replace(self, model: Module, layers: Mapping[str, Module]) -> Module:
        """The model, changed in place; where it is a batch norm itself, the other layer."""
        from .exchange import adopt_hooks

        found = dict(model.named_modules())
        new = {id(found[name]): layer for name, layer in layers.items()}
        for layer in layers.values():
            adopt_hooks(layer)
        for holder in found.values():
            for name, child in holder._modules.items():
                if id(child) in new:
                    holder._modules[name] = new[id(child)]
        return new.get(id(model), model)

    def freeze(self, model: Module, names: Collection[str], frozen: bool, part: Part) -> Module:
        """Statistics by `frozen_statistics`, parameters by `requires_grad`; a frozen parameter keeps no old gradient,
        which an optimizer would go on to apply."""
        found = dict(model.named_modules())
        layers: list[Any] = [found[name] for name in names]
        if part == "statistics":
            from .layer import Module as Ours

            for name, layer in zip(names, layers, strict=True):
                if not isinstance(layer, Ours):
                    kind = type(layer).__name__
                    raise UnsupportedError(f"{name}: torch's {kind} cannot freeze its statistics; convert the model.")
                if not layer.track_running_stats:
                    raise UnsupportedError(f"{name}: there are no statistics; it has track_running_stats=False.")
            for layer in layers:
                layer.frozen_statistics = frozen
            return model
        for layer in layers:
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    parameter.requires_grad_(not frozen)
                    if frozen:
                        parameter.grad = None
        return model

    def read(self, model: Module) -> Checkpoint:
        """Copies of the model's tensors by the state_dict's keys, in its order."""
        from .reading import read

        return read(model)

    def write(self, model: Module, checkpoint: Checkpoint) -> Module:
        """The model with its tensors from a checkpoint, in its own dtypes and on its own devices.

        Raises:
            CheckpointError: a tensor is missing, unknown, or does not fit; the model is as it was.
        """
        from .reading import write

        return write(model, checkpoint)

    def configure(self, model: Module, specs: Mapping[str, BatchNormSpec]) -> Module:
        """The model, its batch norms' `eps` and `momentum` changed in place."""
        found = dict(model.named_modules())
        layers: list[Any] = [found[name] for name in specs]
        for layer, spec in zip(layers, specs.values(), strict=True):
            layer.eps = spec.epsilon
            layer.momentum = None if isinstance(spec.decay, str) else complement(spec.decay)
        return model

    def run(self, model: Module, x: NDArray, *, training: bool, capture: bool = False) -> Run:
        """One pass with the channels on axis 1, for inputs and outputs of rank 3 and more, on the model's device.

        Raises:
            UnsupportedError: the model returns no tensor.
        """
        from .running import run

        return run(model, x, training=training, capture=capture)


ADAPTER = TorchModels()
