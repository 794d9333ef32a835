"""What can be benchmarked here, by name, and in which process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Final

from .cases import Case, Job


@dataclass(frozen=True)
class Suite:
    """The cases of one process.

    Attributes:
        module: of this package, whose `cases` gives them.
        needs: the packages that must be installed.
        devices: that it takes beside the CPU.
        environment: variables of its process.
    """

    module: str
    needs: tuple[str, ...]
    devices: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """What is not installed of what it needs."""
        return [name for name in self.needs if find_spec(name) is None]

    def cases(self, device: str) -> Iterator[Case | Job]:
        """All of its cases, on a device that it takes."""
        module = import_module(f".{self.module}", __package__)
        yield from module.cases(device) if self.devices else module.cases()


SUITES: Final = {
    "core": Suite("on_core", ()),
    "numpy": Suite("on_numpy", ()),
    "torch": Suite("on_torch", ("torch",), ("cuda",)),
    "tensorflow": Suite("on_tensorflow", ("tensorflow", "keras"), environment={"KERAS_BACKEND": "tensorflow"}),
    "jax": Suite("on_jax", ("jax", "flax"), ("cuda",)),
    "keras-jax": Suite("on_keras", ("keras", "jax"), ("cuda",), {"KERAS_BACKEND": "jax"}),
    "keras-torch": Suite("on_keras", ("keras", "torch"), ("cuda",), {"KERAS_BACKEND": "torch"}),
}
