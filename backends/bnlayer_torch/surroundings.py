"""What a module's call happens inside of: a trace, a torch.func transform, a backward pass that computes it again."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from bnlayer.errors import UnsupportedError

_functorch: Final[Any] = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

Around = Literal["nothing", "compilation", "trace", "transform", "recomputation"]


def around() -> Around:
    """What is going on around a module's call.

    Returns:
        "compilation": torch.compile follows the code.
        "trace": operations are written down, to be run elsewhere: by torch.export or torch.jit.trace.
        "transform": of torch.func, so that a tensor may be many, or have derivatives that autograd does not know of.
        "recomputation": a backward pass runs. What is called inside of one computes again what already was, to save
            memory: as both kinds of torch.utils.checkpoint do, which ask the same question, and reversible networks.
        "nothing": none of these.
    """
    if torch.compiler.is_compiling():
        return "compilation" if torch.compiler.is_dynamo_compiling() else "trace"
    if torch._C._is_tracing():
        return "trace"
    if _functorch.peek_interpreter_stack() is not None:
        return "transform"
    return "nothing" if torch._C._current_graph_task_id() == -1 else "recomputation"


def are_many(gradient: Tensor) -> bool:
    """Whether what a backward pass got stands for several gradients, as where is_grads_batched is asked for."""
    return bool(_functorch.is_batchedtensor(gradient) or _functorch.is_legacy_batchedtensor(gradient))


def write(target: Tensor, values: Tensor) -> None:
    """Copy values, which carry no gradient, into a module's tensor: also from inside a torch.func transform.

    A transform takes writing into tensors from outside of it for a mistake, as it could lose derivatives. Here are none
    to lose: statistics are constants. So the transforms between the two are stepped out of.

    Raises:
        UnsupportedError: torch.func.vmap made many values of one.
    """
    if around() != "transform":
        target.copy_(values)
        return
    home = _functorch.maybe_get_level(target)
    while _functorch.maybe_get_level(values) > home:
        if _functorch.is_batchedtensor(values):
            raise UnsupportedError(
                "torch.func.vmap gives each of its examples statistics of its own, and the module has room for one."
                " Call it with update_stats=False or in eval mode, give it stacked buffers (torch.func.functional_call"
                " with torch.func.stack_module_state), or use bnlayer_torch.batch_norm, which returns the statistics."
            )
        values = _functorch.get_unwrapped(values)
    with ExitStack() as outside:
        while (inner := _functorch.peek_interpreter_stack()) is not None and inner.level() > home:
            outside.enter_context(temporarily_pop_interpreter_stack())
        target.copy_(values)
