"""What the live models of Flax and Equinox share where they are read, written and run. Imports JAX only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from bnlayer.checkpoint import Checkpoint, Tensor
from bnlayer.errors import CheckpointError, UnsupportedError
from bnlayer.outputs import first_array
from bnlayer.spec import BatchNormSpec

Name = TypeVar("Name", bound=Hashable)
NDArray = np.ndarray[Any, np.dtype[Any]]

# What models call the argument that says whether they train. Everything but the batch norms evaluates.
_MODES: Mapping[str, bool] = {
    "train": False, "training": False, "is_training": False, "deterministic": True, "use_running_average": True,
    "inference": True,
}  # fmt: skip


def tensor_of(leaf: Any) -> Tensor:
    """An array of a model, copied to the host when it is read; of a mere shape, zeros."""
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Tensor(dtype, shape, lambda: np.zeros(shape, dtype))
    return Tensor(dtype, shape, lambda: np.array(leaf))


def values_for(held: Checkpoint, given: Checkpoint) -> dict[str, NDArray]:
    """The values of `given` for each tensor that the model holds, in the model's dtypes.

    Args:
        held: the model, as it is read.
        given: what is to be written.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or holds numbers that an integer cannot be.
    """
    problems = [f"{name} is missing" for name in held if name not in given]
    problems += [f"{name} is none of the model's" for name in given if name not in held]
    problems += [
        f"{name} is {given.tensors[name].shape}, and {tensor.shape} in the model"
        for name, tensor in held.tensors.items()
        if name in given and given.tensors[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{given.path or given.format}: it does not fit the model: {shown}.")
    values = {}
    for name, tensor in held.tensors.items():
        array = given[name]
        values[name] = array.astype(tensor.dtype)
        if tensor.dtype.kind in "biu" and not np.array_equal(values[name], array):
            raise CheckpointError(
                f"{given.path or given.format}: {name} is {tensor.dtype.name} in the model; got others."
            )
    return values


def placed(value: NDArray, leaf: Any) -> Any:
    """The value as the model has its leaf: on the same devices, a numpy array, or a Python number."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(value, leaf.sharding)
    return value if isinstance(leaf, np.ndarray) else type(leaf)(value.item())


def output_of(returned: Any, skipped: type[Any] | tuple[type[Any], ...] = ()) -> Any:
    """The first array of what a model returned.

    Raises:
        UnsupportedError: there is none.
    """
    found = first_array(returned, lambda one: isinstance(one, (jax.Array, np.ndarray)), skipped)
    if found is None:
        raise UnsupportedError(f"the model returned no array, but a {type(returned).__name__}.")
    return found


def modes_of(call: Callable[..., Any]) -> dict[str, bool]:
    """The arguments by which a model's call is told that it evaluates, where it takes them by name."""
    parameters = inspect.signature(call).parameters
    return {
        name: mode
        for name, mode in _MODES.items()
        if name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
    }


def in_order(names: Iterable[Name], first: Iterable[Name]) -> list[Name]:
    """The names, those of `first` first and in that order."""
    rest = dict.fromkeys(names)
    return [name for name in dict.fromkeys(first) if name in rest] + [n for n in rest if n not in set(first)]


def refuse_cumulative(name: str, decay: Any, spec: BatchNormSpec) -> None:
    """Refuse to make a layer's average cumulative, which needs a counter that it was built without.

    Args:
        name: the layer's.
        decay: the layer's own.
        spec: what is asked for.

    Raises:
        UnsupportedError: it is asked for.
    """
    if spec.decay == "cumulative" != decay:
        raise UnsupportedError(
            f"{name}: decay='cumulative' needs a counter; build the layer with momentum='cumulative'."
        )
