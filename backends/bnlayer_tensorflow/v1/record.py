"""What a graph knows about the batch norms that were built into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from .variables import Variables

# A key that is no string is left out of exported graphs, which could not hold such an object.
_KEY: Any = ("bnlayer batch norms",)


@dataclass(frozen=True, eq=False)
class Record:
    """One call of a drop-in.

    Attributes:
        name: of its scope.
        x, y: the tensors before and after the normalization.
        training: a Python boolean or the tensor that decides.
        updates: the operations that move its statistics; empty where nothing does, or where it happens in place.
        in_place: whether running y moves the statistics.
        variables: of the layer.
    """

    name: str
    x: tf.Tensor
    y: tf.Tensor
    training: bool | tf.Tensor
    updates: tuple[Any, ...]
    in_place: bool
    variables: Variables


def remember(record: Record) -> None:
    """Add a call to its graph's."""
    record.y.graph.add_to_collection(_KEY, record)


def records(graph: Any) -> list[Record]:
    """All calls of the drop-ins in a graph, in their order; none in one that was imported from a file."""
    found: list[Record] = graph.get_collection(_KEY)
    return found
