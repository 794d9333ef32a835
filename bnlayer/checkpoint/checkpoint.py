"""`Checkpoint`: what every format is read into and written from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .batch_norms import StoredBatchNorm

NDArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that lies in a file: what is known of it without reading it.

    Attributes:
        dtype: numpy's, or ml_dtypes' for bfloat16 and the 8-bit floats; native byte order.
        shape: as stored.
        read: reads it; a new array each time, with the stored memory layout where the format has one.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], NDArray]

    @classmethod
    def of(cls, array: NDArray) -> Tensor:
        """A tensor that is in memory already."""
        return cls(array.dtype, array.shape, lambda: array)

    @property
    def nbytes(self) -> int:
        """Its size in bytes once read."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@dataclass(frozen=True)
class Layer:
    """What a format says about a layer beyond its tensors' names: Keras's config, a module object, an ONNX node.

    Attributes:
        name: the layer's.
        kind: its class or operator, as the format says it ("BatchNormalization", "torch.nn.modules.conv.Conv2d").
        tensors: of a batch norm, attribute of `BatchNormState` to the tensor's name, such as {"gamma": "bn/vars/0"}; of
            others the layer's own words.
        settings: its arguments as the file has them ({"epsilon": 1e-3, "momentum": 0.99}), and for a batch norm
            "dialect": whose words they are.
    """

    name: str
    kind: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, NDArray]):
    """Named tensors of a file, in its order, read when they are asked for.

    A mapping of names to numpy arrays; `checkpoint[name]` reads one.

    Attributes:
        format: the format's name, such as "safetensors".
        tensors: by name, in the file's order, unread.
        order_is_meaningful: the order is the one in which the model holds its tensors. False where the format sorts.
        path: where it was read from, or None.
        metadata: what else the file says, JSON values.
        layers: what the format says about layers, in the model's order; empty where it only has names.
    """

    format: str
    tensors: Mapping[str, Tensor]
    _: KW_ONLY
    order_is_meaningful: bool
    path: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.tensors)}

    def before(self, names: Iterable[str]) -> Iterator[str]:
        """The names of the tensors that come before the first of these, the nearest first."""
        first = min(self._places[name] for name in names)
        return (self._names[i] for i in range(first - 1, -1, -1))

    def __getitem__(self, name: str) -> NDArray:
        return self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # Mapping's own would read it

    def replace(self, changes: Mapping[str, NDArray]) -> Checkpoint:
        """This checkpoint with other values for some of its tensors.

        Raises:
            CheckpointError: a name is not in it.
        """
        unknown = [name for name in changes if name not in self.tensors]
        if unknown:
            raise CheckpointError(f"{self.path or self.format}: there is no tensor {', '.join(unknown)} to replace.")
        tensors = {name: Tensor.of(changes[name]) if name in changes else t for name, t in self.tensors.items()}
        return Checkpoint(
            self.format,
            tensors,
            order_is_meaningful=self.order_is_meaningful,
            path=self.path,
            metadata=self.metadata,
            layers=self.layers,
        )

    def batch_norms(self, **options: Any) -> list[StoredBatchNorm]:
        """The batch norms in it; see `bnlayer.checkpoint.batch_norms.find` for the options."""
        from .batch_norms import find

        return find(self, **options).batch_norms

    def save(self, path: str | Path, format: str | None = None, *, force: bool = False) -> None:
        """Write it, whole or not at all; see `bnlayer.checkpoint.save`."""
        from . import save

        save(self, path, format, force=force)
