"""Whole models to synchronized batch norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from bnlayer.errors import SpecError
from bnlayer.models import batch_norms, convert

from .layer import Module


def convert_sync_batchnorm(module: torch.nn.Module, process_group: dist.ProcessGroup | None = None) -> torch.nn.Module:
    """Make every batch norm of a model take its statistics over all processes of a group.

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, for CPU tensors too, and nothing is lost: torch.nn's batch norms
    become ours with the same parameters, buffers, hooks and mode, ours stay the same objects, and both only get
    `synchronized=True`. Convert the model before it is given to `torch.nn.parallel.DistributedDataParallel` and to an
    optimizer.

    DistributedDataParallel averages the processes' gradients, while a batch norm's are those of the sum of their
    losses: to train as on the one big batch of N rows, let each process's loss be the sum over its rows times the
    number of processes over N; the usual mean over its own rows is that where all have as many.

    Args:
        module: any model, changed in place; or a single batch norm.
        process_group: the processes, among them this one; None for all.

    Returns:
        The module; a new one where it is itself one of torch.nn's batch norms.

    Raises:
        UnsupportedError: a batch norm cannot become one of ours; the message says why, and nothing was changed.
        SpecError: a batch norm has ghost batches, which contradict synchronized ones; nothing was changed.
    """
    for record in batch_norms(module):
        if record.spec is not None:
            try:
                record.spec.replace(synchronized=True)
            except SpecError as error:
                raise SpecError(f"{record.name or 'the module'} cannot be synchronized: {error}") from error
    model: Any = convert(module).model
    for layer in model.modules():
        if isinstance(layer, Module):
            layer.synchronized, layer.process_group = True, process_group
    synchronized: torch.nn.Module = model
    return synchronized
