"""Whether torch has a device here."""

from __future__ import annotations

from typing import Any

import torch

from bnlayer.errors import UnsupportedError


def checked(device: Any) -> Any:
    """The device as it came, None for torch's default.

    Raises:
        UnsupportedError: torch knows no such device, or has none here.
    """
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was built without it
            why = str(error).splitlines()[0]
            raise UnsupportedError(
                f"torch has no device {device!r} here ({why}). Give a device that it has."
            ) from error
    return device
