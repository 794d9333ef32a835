"""Batch norms folded into the layers that they follow, as eval computes them.

With scale = gamma / sqrt(moving_variance + epsilon), in float64 and per output channel,

    kernel' = kernel * scale
    bias'   = (bias - moving_mean) * scale + beta

A folded model no longer trains as it did: there is no batch norm in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..porting.states import tensors_for
from ..porting.units import Unit, units_of
from ..registry import adapter
from .edits import NDArray, Note, chosen, edited, refuse_assumed, silent
from .formulas import with_statistics
from .owners import Pairs, candidates, error, owners_of, proven

# A kernel's name to its bias's: the last part, by dialect.
_BIASES: Final = (
    (r"(^|[./])weight$", r"\1bias"),
    (r"/vars/0$", "/vars/1"),
    (r"(^|/)(depthwise_|depthwise_conv_|_)?kernel(?=$|:0$|/|\.)", r"\1bias"),
    (r"(^|/)(depthwise_)?weights(?=$|:0$|/)", r"\1biases"),
    (r"(^|/)w$", r"\1b"),
)


def fold(
    checkpoint: Checkpoint,
    names: str | Iterable[str] | None = None,
    *,
    keep: bool = False,
    model: Any = None,
    x: NDArray | None = None,
    tolerance: float = 1e-6,
    allow_partial: bool = False,
    accept_assumed: bool = False,
    note: Note = silent,
    **options: Any,
) -> Checkpoint:
    """Fold batch norms into the convolutions and dense layers that they follow.

    Args:
        checkpoint: stays as it is.
        names: of the batch norms, patterns; None: all.
        keep: batch norms stay, as identities, so that the same model loads the result. Else their tensors are removed,
            and layers without a bias get one: for a model without batch norms.
        model: a live model of these tensors. It tells epsilon and what the layers are, and a run of it proves which
            layer each batch norm follows, and that nothing else takes that layer's output; it is as it was after.
        x: its input, the batch first and the channels last.
        tolerance: by how much the model's output may change at the most, of its largest value.
        allow_partial: fold what can be, and note the rest.
        accept_assumed: take the framework's default where the file does not tell its epsilon.
        note: told what was done, on what grounds, and what was not.
        options: as of `bnlayer.porting.units.units_of`, such as epsilon.

    Raises:
        CheckpointError: it is not certain which layer a batch norm follows, its epsilon is not known, the result has no
            place in the format, or the model's output changes.
        UnknownBackend: no adapter knows such a model.
    """
    if checkpoint.format == "onnx" and not keep:
        raise CheckpointError(
            "an ONNX graph needs every tensor that it has, and takes no new ones; keep the batch norms."
        )
    if model is None:
        units = units_of(checkpoint, **options)
        norms = chosen([unit for unit in units.units if unit.kind == "batch norm"], names)
        refuse_assumed([norm.stored for norm in norms if norm.stored], accept_assumed, note)
        pairs, refusals = owners_of(units, norms, note)
    else:
        if x is None:
            raise CheckpointError("give an input with the model: an array, the batch first and the channels last.")
        reach = adapter(model)
        before = reach.read(model)
        loaded = _as_the_model(before, checkpoint)
        units = units_of(loaded, **options)
        norms = chosen([unit for unit in units.units if unit.kind == "batch norm"], names)
        try:
            run = reach.run(reach.write(model, loaded), x, training=False, capture=True)
            pairs, refusals = candidates(units, norms, run.calls)
            pairs = [(n, o) for n, o in pairs if not any(r.startswith((f"{n.name}:", f"{o.name}:")) for r in refusals)]
            pairs, unproven = proven(reach, model, loaded, pairs, _identities, x)
            refusals += unproven
            after = reach.run(reach.write(model, _identities(loaded, pairs)), x, training=False)
        finally:
            reach.write(model, before)
        change = error(after.output, run.output)
        if change > tolerance:
            raise CheckpointError(f"folded, the model's output changes by {change:.1e} of its largest value, more than"
                                  f" {tolerance:g}.")  # fmt: skip
        note("verified", f"the model's output at {x.shape} changes by {change:.1e} of its largest value",
             *(norm.name for norm, _ in pairs))  # fmt: skip
    if refusals and not allow_partial:
        raise CheckpointError("nothing was folded (allow_partial folds the rest):\n  " + "\n  ".join(refusals))
    for refusal in refusals:
        note("warnings", f"left as it is: {refusal}")
    bad = {name for refusal in refusals for name in [refusal.partition(":")[0]]}
    pairs = [(norm, owner) for norm, owner in pairs if norm.name not in bad and owner.name not in bad]
    _refuse_twins(checkpoint, pairs)
    return _identities(checkpoint, pairs, note) if keep else _folded(checkpoint, pairs, norms, units.dialect, note)


def _as_the_model(model: Checkpoint, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint's values with what the model says of its layers."""
    unknown, missing = [n for n in checkpoint if n not in model], [n for n in model if n not in checkpoint]
    if unknown or missing:
        raise CheckpointError(
            f"the checkpoint is not of this model: the model lacks {unknown[:3]}, the checkpoint lacks {missing[:3]}."
        )
    return model.replace({name: checkpoint[name] for name in checkpoint})


def _refuse_twins(checkpoint: Checkpoint, pairs: Pairs) -> None:
    for one in (unit for pair in pairs for unit in pair):
        for name in one.parts.values():
            if f"{name}/ExponentialMovingAverage" in checkpoint:
                raise CheckpointError(f"{name} has an exponential moving average beside it, which would no longer be"
                                      " its; convert the checkpoint to one of the two first.")  # fmt: skip


def _scaled(checkpoint: Checkpoint, norm: Unit, owner: Unit) -> tuple[NDArray, NDArray]:
    """The layer's kernel as it is stored, and its bias in float64, with the batch norm in them."""
    assert norm.stored is not None
    state, spec = replace(norm.stored, checkpoint=checkpoint).state(), norm.stored.spec
    wide = {role: array.astype(np.float64) for role, array in state.arrays().items()}
    scale = wide.get("gamma", 1.0) / np.sqrt(wide["moving_variance"] + spec.epsilon)
    stored = checkpoint[owner.parts["kernel"]]
    kernel = owner.layout.canonical(stored).astype(np.float64)
    per_kernel = scale.reshape(-1, *[1] * (kernel.ndim - 1))
    if owner.kind == "conv transpose":  # (in, out / groups, ...): each group of inputs has outputs of its own
        groups = owner.groups or norm.channels // kernel.shape[1]
        grouped = kernel.reshape(groups, -1, *kernel.shape[1:])
        kernel = (grouped * scale.reshape(groups, 1, -1, *[1] * (kernel.ndim - 2))).reshape(kernel.shape)
    else:
        kernel = kernel * per_kernel
    bias = checkpoint[owner.parts["bias"]].reshape(-1).astype(np.float64) if "bias" in owner.parts else 0.0
    with np.errstate(over="ignore"):
        made = owner.layout.stored(kernel, stored.shape).astype(stored.dtype)
    if not np.isfinite(made.astype(np.float64)).all() and np.isfinite(stored.astype(np.float64)).all():
        raise CheckpointError(
            f"{owner.parts['kernel']}: with {norm.name} in it, it is too large for {stored.dtype.name}."
        )
    return made, (bias - wide["moving_mean"]) * scale + wide.get("beta", 0.0)


def _folded(checkpoint: Checkpoint, pairs: Pairs, norms: Sequence[Unit], dialect: str, note: Note) -> Checkpoint:
    """Without these batch norms."""
    changes: dict[str, NDArray] = {}
    added: dict[str, tuple[str, NDArray]] = {}
    removed: set[str] = set()
    for norm, owner in pairs:
        name = owner.parts["kernel"]
        changes[name], bias = _scaled(checkpoint, norm, owner)
        dtype = changes[name].dtype
        if "bias" in owner.parts:
            old = checkpoint.tensors[owner.parts["bias"]]
            changes[owner.parts["bias"]] = bias.astype(old.dtype).reshape(old.shape)
        else:
            spatial = changes[name].ndim - 2 if dialect == "equinox" else 0  # its biases have the image's rank
            added[name] = bias_name(name), bias.astype(dtype).reshape(-1, *[1] * spatial)
            note("converted", "a bias added: build the layer with one", added[name][0])
        removed |= set(norm.parts.values())
        note("converted", f"folded into {owner.name}, and removed: build the model without it", norm.name)
    if len(pairs) < len(norms) and any("/vars/" in name for name in removed):
        note("warnings", "Keras counts the batch norms that are left anew in a model with fewer of them; fold all, or"
             " keep them")  # fmt: skip
    return edited(checkpoint, changes, removed=removed, added=added)


def _identities(checkpoint: Checkpoint, pairs: Pairs, note: Note = silent) -> Checkpoint:
    """With batch norms that do nothing in eval; what a layer has no bias for, its batch norm still adds."""
    changes: dict[str, NDArray] = {}
    for norm, owner in pairs:
        assert norm.stored is not None
        stored = replace(norm.stored, checkpoint=checkpoint)
        name, spec, state = owner.parts["kernel"], stored.spec, stored.state()
        changes[name], bias = _scaled(checkpoint, norm, owner)
        zeros = np.zeros(norm.channels)
        mean, beta = zeros, zeros
        if "bias" in owner.parts:
            old = checkpoint.tensors[owner.parts["bias"]]
            changes[owner.parts["bias"]] = bias.astype(old.dtype).reshape(old.shape)
        elif state.beta is not None:
            beta = bias
        else:
            mean = -bias
        if state.gamma is not None:
            variance = zeros + 1.0
            gamma = np.full(norm.channels, np.sqrt(1.0 + spec.epsilon)).astype(state.gamma.dtype)
            state = state.replace(gamma=gamma)
        else:
            variance = zeros + max(1.0 - spec.epsilon, 0.0)
        if state.beta is not None:
            state = state.replace(beta=beta.astype(state.beta.dtype))
        changes |= tensors_for(stored, spec, with_statistics(state, spec, mean, variance), note)
        note("converted", f"folded into {owner.name}, and left as an identity", norm.name)
    return edited(checkpoint, changes)


def bias_name(kernel: str) -> str:
    """Under which name the layer of this kernel has its bias.

    Raises:
        CheckpointError: the kernel's name is none of the frameworks'.
    """
    for pattern, bias in _BIASES:
        name, count = re.subn(pattern, bias, kernel)
        if count:
            return name
    raise CheckpointError(f"{kernel}: it is not known how the bias beside it would be called; keep the batch norms.")
