"""What the operations share: checkpoints with tensors taken away and added, batch norms chosen by name, and notes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from ..checkpoint.batch_norms import StoredBatchNorm
from ..checkpoint.checkpoint import Checkpoint, Tensor
from ..errors import CheckpointError

NDArray = np.ndarray[Any, np.dtype[Any]]
Note = Callable[..., None]  # (section, what, *names), as of `Notes.add`
_BESIDE: Final = {"moving_mean": "gamma", "moving_variance": "beta"}  # what is added beside these; else a bias
SECTIONS: Final = ("converted", "assumed", "lossy", "warnings", "verified")


@dataclass
class Notes:
    """What an operation did beside what was asked for: by section, then by words, the names of tensors or layers."""

    notes: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {section: {} for section in SECTIONS})

    def add(self, section: str, what: str, *names: str) -> None:
        """Say that `what` happened to these names; equal words are gathered."""
        self.notes[section].setdefault(what, []).extend(names)

    def lines(self) -> list[str]:
        """For people, one line each."""
        return [
            f"{section.upper():9}  {what}" + (f" ({', '.join(names[:3])}{_more(names)})" if names else "")
            for section, whats in self.notes.items()
            for what, names in whats.items()
        ]


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def silent(section: str, what: str, *names: str) -> None:
    """A note that nobody reads."""


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The name."""
        ...


Found = TypeVar("Found", bound=Named)


def chosen(found: Iterable[Found], names: str | Iterable[str] | None) -> list[Found]:
    """Those whose names match one of these patterns (`fnmatch`); None: all.

    Raises:
        CheckpointError: a pattern matches none, or there is none at all.
    """
    every = list(found)
    if not every:
        raise CheckpointError(
            "there is no batch norm in it; of hand-written layers, give the words by which to know them."
        )
    if names is None:
        return every
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in every):
            raise CheckpointError(
                f"no batch norm matches {pattern!r}; there are {', '.join(one.name for one in every)}."
            )
    return [one for one in every if any(fnmatchcase(one.name, pattern) for pattern in patterns)]


def edited(
    checkpoint: Checkpoint,
    changes: Mapping[str, NDArray],
    *,
    removed: Collection[str] = (),
    added: Mapping[str, tuple[str, NDArray]] | None = None,
) -> Checkpoint:
    """The checkpoint with other tensors, and what it says of its layers changed accordingly.

    Args:
        checkpoint: stays as it is.
        changes: new values by name.
        removed: names that go.
        added: for the name after which it comes, a new tensor's name and values: a bias after its kernel.

    Raises:
        CheckpointError: a new name is there already.
    """
    added = added or {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if name not in removed:
            tensors[name] = Tensor.of(changes[name]) if name in changes else tensor
        if name in added:
            new, array = added[name]
            if new in checkpoint.tensors:
                raise CheckpointError(f"{new} is there already, and no bias of {name}.")
            tensors[new] = Tensor.of(array)
    layers = []
    for layer in checkpoint.layers:
        left = {role: name for role, name in layer.tensors.items() if name not in removed}
        left |= {_BESIDE.get(role, "bias"): added[name][0] for role, name in layer.tensors.items() if name in added}
        if left or not layer.tensors:
            layers.append(replace(layer, tensors=left))
    return replace(
        checkpoint, tensors=tensors, layers=tuple(layers), metadata=_metadata(checkpoint.metadata, removed, added)
    )


def _metadata(
    metadata: Mapping[str, Any], removed: Collection[str], added: Mapping[str, tuple[str, NDArray]]
) -> Mapping[str, Any]:
    """Old Keras files list each layer's weights; a layer without weights keeps an empty list, as Keras writes it."""
    if "weight_names" not in metadata:
        return metadata
    listed = {}
    for layer, weights in metadata["weight_names"].items():
        prefix = f"{layer}/"
        names = []
        for weight in weights:
            names += [] if prefix + weight in removed else [weight]
            names += [added[prefix + weight][0].removeprefix(prefix)] if prefix + weight in added else []
        listed[layer] = names
    return {**metadata, "weight_names": listed}


def refuse_assumed(found: Iterable[StoredBatchNorm], accepted: bool, note: Note) -> None:
    """Refuse to compute with an epsilon that the file does not tell, unless that is accepted.

    Raises:
        CheckpointError: it is not.
    """
    guessed = [one for one in found if one.sources["epsilon"] == "assumed"]
    if guessed and not accepted:
        values = ", ".join(sorted({f"{one.spec.epsilon:g}" for one in guessed}))
        raise CheckpointError(
            f"the file does not say the epsilon of {len(guessed)} batch norms ({guessed[0].name}, ...), and a wrong one"
            f" gives wrong numbers. Give it, or a model that has it, or accept the framework's default ({values})."
        )
    for one in guessed:
        note("assumed", f"epsilon {one.spec.epsilon:g}: the framework's default, for the file does not say", one.name)
