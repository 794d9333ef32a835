"""Whether a framework has a device here."""

from __future__ import annotations


def absence(framework: str, device: str) -> str | None:
    """Why this device cannot be computed on, or None. Imports the framework, unless the device is the CPU."""
    if device == "cpu":
        return None
    if framework == "torch":
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    if framework == "jax":
        import jax

        try:
            return None if jax.devices(device) else "JAX finds no CUDA device"
        except RuntimeError as error:
            return f"JAX finds no CUDA device ({error})"
    return f"there are no cases for {framework} on {device}"
