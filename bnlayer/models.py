"""The batch norms of a live model: list them, convert them to ours and back, freeze and unfreeze them.

Every framework is reached through its `ModelAdapter`; this module holds what is the same for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from .contract import Kind, LayerRecord, ModelAdapter, Part
from .errors import BatchNormError, InputError, UnsupportedError
from .registry import adapter


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` did. Print it: one line a layer.

    Attributes:
        model: the model after; the same object where the framework's models are mutable.
        to: "bnlayer" or "native".
        replaced: the batch norms that were replaced, as they were before.
        kept: those that were of that kind before.
        refused: those that could not be converted, and are unchanged; `reason` says why.
    """

    model: Any
    to: Kind
    replaced: tuple[LayerRecord, ...]
    kept: tuple[LayerRecord, ...]
    refused: tuple[LayerRecord, ...]

    def __str__(self) -> str:
        rows = [
            *((record, "replaced", _described(record)) for record in self.replaced),
            *((record, "kept", _described(record)) for record in self.kept),
            *((record, "REFUSED", record.reason) for record in self.refused),
        ]
        width = max((len(record.name) for record, _, _ in rows), default=0)
        lines = [f"{what:8}  {record.name:{width}}  {text}" for record, what, text in rows]
        whose = "bnlayer's" if self.to == "bnlayer" else "the framework's own"
        counts = f"{len(self.replaced)} replaced, {len(self.kept)} kept, {len(self.refused)} refused"
        return "\n".join([*lines, f"batch norms to {whose}: {counts}"])


def batch_norms(model: Any) -> Sequence[LayerRecord]:
    """The model's batch norms, ours and the framework's own, in the order in which the model holds them.

    Raises:
        UnknownBackend: no adapter knows such a model.
    """
    return adapter(model).batch_norms(model)


def convert(model: Any, to: Kind = "bnlayer", *, allow_partial: bool = False) -> Conversion:
    """Replace every native batch norm of a model by ours with the same spec and state; or ours by native ones.

    What cannot be converted without changing what it computes is refused, and then nothing is replaced, unless
    `allow_partial` says that the rest shall be.

    Args:
        model: a torch, Keras, Flax or Equinox model; with its variables or state where the framework keeps them apart
            (see docs/drop-in.md).
        to: "bnlayer" or "native".
        allow_partial: replace what can be, and list the rest in `refused`.

    Raises:
        UnknownBackend: no adapter knows such a model.
        UnsupportedError: something cannot be converted, and `allow_partial` is False; the message lists each.
    """
    if to not in ("bnlayer", "native"):
        raise InputError(f"to must be 'bnlayer' or 'native'; got {to!r}.")
    reach = adapter(model)
    kept, refused, replaced = [], [], []
    layers: dict[str, Any] = {}
    for record in reach.batch_norms(model):
        if record.kind == to:
            kept.append(record)
        elif record.reason:
            refused.append(record)
        else:
            try:
                layers[record.name] = reach.counterpart(record, to)
                replaced.append(record)
            except BatchNormError as error:
                refused.append(replace(record, reason=str(error)))
    if refused and not allow_partial:
        raise _refusal(refused)
    model = reach.replace(model, layers) if layers else model
    return Conversion(model, to, tuple(replaced), tuple(kept), tuple(refused))


def freeze(model: Any, names: str | Iterable[str] = "*", *, statistics: bool = True, parameters: bool = True) -> Any:
    """Freeze batch norms of a model: their moving statistics, their gamma and beta, or both.

    Frozen statistics normalize in training too, are not updated, and stay frozen through `model.train()`. Frozen
    parameters get no gradient.

    Args:
        model: as of `convert`; statistics can be frozen in our layers only, so convert it first.
        names: a glob pattern of layer names, or several.
        statistics, parameters: what to freeze; the other keeps its state.

    Returns:
        The model; the same object where the framework's models are mutable.

    Raises:
        UnknownBackend: no adapter knows such a model.
        InputError: no batch norm has such a name.
        UnsupportedError: a layer has no such flag.
    """
    return _set_frozen(model, names, frozen=True, statistics=statistics, parameters=parameters)


def unfreeze(model: Any, names: str | Iterable[str] = "*", *, statistics: bool = True, parameters: bool = True) -> Any:
    """Undo `freeze`; arguments, result and errors are its."""
    return _set_frozen(model, names, frozen=False, statistics=statistics, parameters=parameters)


def _set_frozen(model: Any, names: str | Iterable[str], *, frozen: bool, statistics: bool, parameters: bool) -> Any:
    reach = adapter(model)
    chosen = _chosen(reach, model, [names] if isinstance(names, str) else list(names))
    parts: list[Part] = []
    if statistics:
        parts.append("statistics")
    if parameters:
        parts.append("parameters")
    for part in parts:
        model = reach.freeze(model, chosen, frozen, part)
    return model


def _chosen(reach: ModelAdapter, model: Any, patterns: Sequence[str]) -> list[str]:
    names = [record.name for record in reach.batch_norms(model)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"no batch norm matches {pattern!r}; the model has {', '.join(names) or 'none'}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _refusal(refused: Sequence[LayerRecord]) -> BatchNormError:
    listed = "\n".join(f"  {record.name}: {record.reason}" for record in refused)
    return UnsupportedError(
        f"{len(refused)} batch norms cannot be converted, so nothing was (allow_partial=True converts the rest):\n"
        f"{listed}"
    )


def _described(record: LayerRecord) -> str:
    if record.spec is None:
        return type(record.layer).__name__
    s = record.spec
    return f"{type(record.layer).__name__}: {s.num_features} channels, epsilon {s.epsilon:g}, decay {s.decay}"
