"""What can be benchmarked here, by name, and in which process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Final

from .cases import Case, Job
from .devices import absence


@dataclass(frozen=True)
class Suite:
    """The cases of one process.

    Attributes:
        module: of this package, whose `cases` gives them.
        needs: the packages that must be installed; the last is the framework that computes.
        environment: variables of its process.
    """

    module: str
    needs: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def absence(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} is not installed"
        return absence(self.needs[-1] if self.needs else "the core", device)

    def cases(self, device: str) -> Iterator[Case | Job]:
        """All of its cases, on a device that is there."""
        os.environ.update(self.environment)  # what the module asks to tell its suite
        module = import_module(f".{self.module}", __package__)
        yield from module.cases(device)


SUITES: Final = {
    "core": Suite("on_core", ()),
    "numpy": Suite("on_numpy", ("numpy",)),
    "torch": Suite("on_torch", ("torch",)),
    "tensorflow": Suite("on_tensorflow", ("keras", "tensorflow"), {"KERAS_BACKEND": "tensorflow"}),
    "jax": Suite("on_jax", ("flax", "jax")),
    "keras-jax": Suite("on_keras", ("keras", "jax"), {"KERAS_BACKEND": "jax"}),
    "keras-torch": Suite("on_keras", ("keras", "torch"), {"KERAS_BACKEND": "torch"}),
}
