"""Names for what lies in nested containers. Shared, deep and endless ones are bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from ..errors import CheckpointError

DEEPEST: Final = 64
MOST: Final = 1_000_000  # leaves; no model has so many
MOST_SHARED: Final = (
    1000  # places where one container may be; containers of shared ones could make any number of leaves
)


def flatten(
    tree: Any, place: str, *, separator: str, children: Callable[[Any], Mapping[Any, Any] | None]
) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree with its name, in order.

    Args:
        tree: the root.
        place: file and place, for the error.
        separator: between the parts of a name.
        children: a node's children by key, or None for a leaf.

    Raises:
        CheckpointError: it is nested too deep, has too many leaves, or two leaves of one name.
    """
    seen: set[str] = set()
    visits: Counter[int] = Counter()
    # A stack and not recursion: depth is the file's to choose.
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while stack:
        path, node = stack.pop()
        inside = children(node)
        if inside is not None:
            if len(path) >= DEEPEST:
                raise CheckpointError(f"{place}: it is nested more than {DEEPEST} deep.")
            visits[id(node)] += 1
            if visits[id(node)] > MOST_SHARED:
                raise CheckpointError(f"{place}: the same container is in it more than {MOST_SHARED} times.")
            stack += [((*path, str(key)), child) for key, child in reversed(list(inside.items()))]
            if len(stack) > MOST:
                raise CheckpointError(f"{place}: it holds more than {MOST} things.")
            continue
        name = separator.join(path)
        if name in seen:
            raise CheckpointError(f"{place}: the name {name!r} is there twice.")
        if len(seen) >= MOST:
            raise CheckpointError(f"{place}: it holds more than {MOST} things.")
        seen.add(name)
        yield name, node
