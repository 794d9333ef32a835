"""What the figures were measured on."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("bnlayer", "numpy", "torch", "tensorflow", "tensorflow-cpu", "keras", "jax", "flax")


def machine(device: str) -> dict[str, str]:
    """Python, system, processor, and the version of every package that is there."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = {"python": platform.python_version(), "system": platform.platform(), "processor": _processor()}
    return found | {"device": device} | versions


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()
