"""The tensors of a state, and which tensors of a module they are."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from bnlayer.errors import StateError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState, array_names

# torch's names for what it has; the averages that it does not have are called as in a state.
TORCH_NAMES: Final = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
EXTRA_BUFFERS: Final = ("hidden_mean", "hidden_variance", "renorm_mean", "renorm_stddev", "moving_stddev")


def tensors_of(module: Any, spec: BatchNormSpec) -> dict[str, Tensor | None]:
    """The module's tensors by the state's names; None for one that the spec needs and the module does not have."""
    return {name: getattr(module, TORCH_NAMES.get(name, name), None) for name in array_names(spec)}


def held(state: BatchNormState[Tensor], name: str) -> Tensor:
    """The state's array `name`, without gradient.

    Raises:
        StateError: the state does not have it, and the spec needs it.
    """
    tensor: Tensor | None = getattr(state, name)
    if tensor is None:
        raise StateError(f"the state lacks {name}, which this spec needs; it has {', '.join(state.arrays())}.")
    return tensor.detach()
