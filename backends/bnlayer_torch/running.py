"""A forward pass of a whole torch model in which batch norms alone may train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlayer.contract import NDArray, Run
from bnlayer.errors import UnsupportedError
from bnlayer.outputs import first_array, widened

from .bridge import to_array, to_tensor
from .reading import own_tensors

_SPATIAL: Final = 3  # the least rank of an array with channels and places


def run(model: nn.Module, x: NDArray, *, training: bool, capture: bool) -> Run:
    """See `ModelAdapter.run`.

    Raises:
        UnsupportedError: the model returns no tensor.
    """
    seen: dict[str, tuple[NDArray, NDArray]] = {}
    calls: dict[str, None] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
            # Compiled code has its modes and hooks built in, and would be compiled anew for this pass.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_modes(model, training))
        if capture:
            stack.enter_context(_captured(model, seen, calls))
        found = first_array(model(_input(model, x)), lambda one: isinstance(one, Tensor))
        if found is None:
            raise UnsupportedError(f"{type(model).__name__} returns no tensor to compare.")
        output = widened(to_array(found))
    if output.ndim >= _SPATIAL:
        output = np.moveaxis(output, 1, -1)
    return Run(model, output, seen, tuple(calls))


@contextmanager
def _modes(model: nn.Module, training: bool) -> Iterator[None]:
    """Batch norms in this mode, everything else in eval; by the flags alone, for a model's own `train` may do more."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training and isinstance(module, _BatchNorm)
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _captured(model: nn.Module, seen: dict[str, tuple[NDArray, NDArray]], calls: dict[str, None]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if own_tensors(name, module):

                def called(*_: Any, name: str = name) -> None:
                    calls.setdefault(name)

                stack.callback(module.register_forward_pre_hook(called).remove)
            if isinstance(module, _BatchNorm):

                def normalized(_: Any, args: Any, kwargs: Any, y: Tensor, name: str = name) -> None:
                    if name not in seen:
                        seen[name] = to_array(args[0] if args else next(iter(kwargs.values()))), to_array(y)

                stack.callback(module.register_forward_hook(normalized, with_kwargs=True).remove)
        yield


def _input(model: nn.Module, x: NDArray) -> Tensor:
    """x with the channels where torch has them, on the model's device and in its dtype."""
    if x.ndim >= _SPATIAL:
        x = np.moveaxis(x, -1, 1)
    tensor = to_tensor(np.ascontiguousarray(x))
    held = [*model.parameters(), *model.buffers()]
    floating = next((each.dtype for each in held if each.is_floating_point()), None)
    return tensor.to(
        device=held[0].device if held else None, dtype=floating if tensor.is_floating_point() else tensor.dtype
    )
