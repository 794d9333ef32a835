"""What a live model returned, as one array to compare: the same choice in every framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NDArray = np.ndarray[Any, np.dtype[Any]]


def first_array(
    output: Any, is_array: Callable[[Any], bool], skipped: type[Any] | tuple[type[Any], ...] = ()
) -> Any | None:
    """The first array of what a model returned, into containers and objects; None where there is none.

    Of named ones (a mapping, an object's attributes) the logits come first, where there are any.

    Args:
        output: what the model returned.
        is_array: whether it is one of the framework's arrays.
        skipped: what is no output, such as a state that is returned beside it.
    """
    if is_array(output):
        return output
    if isinstance(output, skipped):
        return None
    logits = getattr(output, "logits", None) if isinstance(output, tuple) else None
    if not isinstance(output, (Mapping, list, tuple)) and hasattr(output, "__dict__"):
        output = vars(output)
    if isinstance(output, Mapping):
        output = [output[key] for key in sorted(output, key=lambda key: key != "logits")]
    if not isinstance(output, (list, tuple)):
        return None
    each = (first_array(one, is_array, skipped) for one in (logits, *output) if one is not None)
    return next((found for found in each if found is not None), None)


def widened(array: NDArray) -> NDArray:
    """A copy in no less than float32's precision; whole numbers as float64."""
    if array.dtype.kind in "fc" and array.dtype.itemsize >= 4:
        return array.copy()
    return array.astype(np.float64 if array.dtype.kind in "biu" else np.float32)
