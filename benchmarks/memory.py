"""How much memory one call takes, seen from outside of it: the peak of this process, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

_STATUS: Final = Path("/proc/self/status")
_RESET: Final = Path("/proc/self/clear_refs")
# glibc keeps what is freed for later unless it came by mmap, and then a second call seems to take nothing.
ENVIRONMENT: Final[Mapping[str, str]] = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Bytes that the call had at most beyond what was there before, its results among them; None where none tells.

    Linux resets the peak of a resident set on request (proc(5), clear_refs). Pages that were not touched do not count.
    """
    if not _RESET.exists():
        return None
    for _ in range(2):
        call()
    _RESET.write_text("5")
    before = _kilobytes("VmRSS")
    kept = call()
    peak = _kilobytes("VmHWM") - before
    del kept
    return max(peak, 0) * 1024


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {name}.")
