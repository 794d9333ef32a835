"""JSON from files that nobody vouches for: no duplicate names, no depth that exhausts the interpreter."""

from __future__ import annotations

import json
from typing import Any

from ..errors import CheckpointError


def strict_json(data: bytes | str, place: str) -> Any:
    """Parse JSON.

    Args:
        data: text, or its UTF-8 bytes.
        place: file and place, for the error.

    Raises:
        CheckpointError: it is not JSON, is nested too deep, or an object has a name twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{place}: the name {twice!r} is there twice.")
        return found

    try:
        return json.loads(data, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: it is not sound JSON ({type(error).__name__}: {error}).") from error
