"""The dtypes of a spec, by torch's names and back."""

from __future__ import annotations

from typing import Final

import torch

DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
HALVES: Final = (torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as a spec or an error message says it; any torch dtype has one."""
    return NAMES.get(dtype) or str(dtype).removeprefix("torch.")
