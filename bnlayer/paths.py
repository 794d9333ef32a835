"""Which of several ways a backend computes one call by: chosen where it pays, forced where a test wants to see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Paths:
    """The ways by which one backend computes the same thing, each right wherever it says that it can.

        PATHS = Paths("fused", "composite")
        PATHS.chosen("fused" if large else "composite", able=("fused", "composite"))

    A backend asks once per call, or once per trace where the framework traces. Tests force each path over the
    conformance vectors, and see which ones were taken:

        with PATHS.forced("fused") as taken: ...
        assert taken["fused"]

    Attributes:
        names: of the paths.
        wanted: None as a rule; within `forced` what it was given, and its count. `watched` without a call of Python.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.wanted: ContextVar[tuple[str | None, Counter[str]] | None] = ContextVar("wanted", default=None)

    @property
    def watched(self) -> bool:
        """Whether `forced` holds; where not, a backend need not find out which paths are able besides the fastest."""
        return self.wanted.get() is not None

    def chosen(self, fastest: str, able: Collection[str]) -> str:
        """The path to take.

        Args:
            fastest: what to take unless another is forced.
            able: the paths that compute this call exactly as the spec says, `fastest` among them.
        """
        wanted = self.wanted.get()
        if wanted is None:
            return fastest
        name, taken = wanted
        path = name if name in able else fastest
        assert path is not None
        taken[path] += 1
        return path

    @contextmanager
    def forced(self, name: str | None = None) -> Iterator[Counter[str]]:
        """Take this path wherever it is able, inside of the `with`; None: as without. Gives the count of each taken.

        Raises:
            ValueError: there is no such path.
        """
        if name is not None and name not in self.names:
            raise ValueError(f"the paths are {', '.join(self.names)}; got {name!r}.")
        taken: Counter[str] = Counter()
        token = self.wanted.set((name, taken))
        try:
            yield taken
        finally:
            self.wanted.reset(token)
