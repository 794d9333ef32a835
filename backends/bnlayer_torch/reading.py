"""A torch model as a checkpoint and back: its state_dict as numpy arrays, and what each module of it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlayer.checkpoint import Checkpoint, Layer
from bnlayer.checkpoint.checkpoint import Tensor as Stored
from bnlayer.contract import NDArray
from bnlayer.errors import CheckpointError, DialectError
from bnlayer.spec import BatchNormSpec

from .bridge import to_array, to_tensor
from .exchange import record
from .tensors import TORCH_NAMES

_KINDS: Final[Mapping[str, tuple[type[nn.Module], ...]]] = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "conv transpose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    "dense": (nn.Linear,),
    "embedding": (nn.Embedding,),
    "norm": (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
}
_ROLES: Final = {"weight": "kernel", "bias": "bias"}
_OF_NORMS: Final = {"weight": "gamma", "bias": "beta"}
_OF_BATCH_NORMS: Final = {**{ours: name for name, ours in TORCH_NAMES.items()}, "num_batches_tracked": "num_updates"}
# What numpy has under no name of its own, as bits of the same size.
_BITS: Final = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def read(model: nn.Module) -> Checkpoint:
    """Copies of the model's tensors; see `ModelAdapter.read`.

    `metadata["tied"]` has the names under which the state_dict lists a tensor again, to its first name.

    Raises:
        CheckpointError: a tensor holds no numbers, or numbers that numpy has no dtype for.
    """
    state = _tensors(model)
    arrays = {name: _array(name, tensor) for name, tensor in state.items()}
    # Tensors without elements have no address that would tell them apart.
    known: dict[Any, str] = {}
    tied = {
        name: first
        for name, tensor in state.items()
        if tensor.numel() and (first := known.setdefault(_place(tensor), name)) != name
    }
    return Checkpoint(
        "torch",
        {name: Stored.of(array) for name, array in arrays.items()},
        order_is_meaningful=True,
        metadata={"tied": tied} if tied else {},
        layers=tuple(
            _layer(name, module, own)
            for name, module in model.named_modules()
            if (own := {leaf: full for leaf, full in own_tensors(name, module).items() if full in state})
        ),
    )


def write(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The model with its tensors from the checkpoint; see `ModelAdapter.write`.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or of a kind of number that the model's does not
            hold, or two that are one in the model differ.
    """
    state = model.state_dict()
    held = _tensors(model)
    _refuse_other_names(checkpoint, held)
    arrays: dict[str, NDArray] = {}
    known: dict[Any, str] = {}
    for name, tensor in held.items():
        array = checkpoint[name]
        if array.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} has shape {array.shape} in the checkpoint, {tuple(tensor.shape)} in the model."
            )
        if not tensor.is_floating_point() and array.dtype.kind not in ("c" if tensor.is_complex() else "biu"):
            raise CheckpointError(f"{name} is {array.dtype.name} in the checkpoint, {tensor.dtype} in the model.")
        if tensor.is_floating_point() and array.dtype.kind == "c":
            raise CheckpointError(f"{name} is complex in the checkpoint, {tensor.dtype} in the model.")
        first = known.setdefault(_place(tensor), name) if tensor.numel() else name
        if first != name and not np.array_equal(arrays[first], array, equal_nan=array.dtype.kind in "fc"):
            raise CheckpointError(f"{first} and {name} are one tensor in the model, and differ in the checkpoint.")
        arrays[name] = array
    # Through torch's own loading, which knows what hooks of the modules rename and compute.
    state.update({name: _tensor(array) for name, array in arrays.items()})
    model.load_state_dict(state)
    return model


def own_tensors(name: str, module: nn.Module) -> dict[str, str]:
    """What a module itself holds and saves: the attribute to the state_dict's key, in its order."""
    prefix = f"{name}." if name else ""
    held = {**module._parameters, **module._buffers}
    unsaved = module._non_persistent_buffers_set
    return {leaf: prefix + leaf for leaf, tensor in held.items() if tensor is not None and leaf not in unsaved}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Of the state_dict, what is a tensor; modules may keep other things in it."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _array(name: str, tensor: Tensor) -> NDArray:
    if tensor.is_meta:
        raise CheckpointError(f"{name} is on the meta device and holds no numbers; materialize the model.")
    if is_lazy(tensor):
        raise CheckpointError(f"{name} has no shape yet, for its layer is lazy; call the model once.")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{name} is sparse or quantized; numpy has no array of it.")
    bits = _BITS.get(tensor.dtype)
    try:
        if bits is None:
            return to_array(tensor)
        return to_array(tensor.detach().view(bits[0])).view(bits[1])
    except TypeError as error:
        raise CheckpointError(f"{name} is {tensor.dtype}, which numpy has not ({error}).") from error


def _tensor(array: NDArray) -> Tensor:
    bits = {np.dtype(dtype): (kind, number) for kind, (number, dtype) in _BITS.items()}.get(array.dtype)
    if bits is None:
        return to_tensor(array)
    kind, number = bits
    return to_tensor(np.ascontiguousarray(array).view(np.int16 if number is torch.int16 else np.uint8)).view(kind)


def _place(tensor: Tensor) -> Any:
    """The same for tensors that are one."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _refuse_other_names(checkpoint: Checkpoint, held: Mapping[str, Tensor]) -> None:
    missing = [name for name in held if name not in checkpoint]
    unknown = [name for name in checkpoint if name not in held]
    if missing or unknown:
        said = [("lacks", missing), ("has, and the model has not,", unknown)]
        parts = [f"{verb} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for verb, names in said if names]
        raise CheckpointError(f"the checkpoint {' and '.join(parts)}; write it under the names that `read` gives.")


# What a module is


def _layer(name: str, module: nn.Module, own: Mapping[str, str]) -> Layer:
    if isinstance(module, _BatchNorm):
        spec = record(name, module).spec
        if spec is not None:
            roles = {_OF_BATCH_NORMS.get(leaf, leaf): full for leaf, full in own.items()}
            return Layer(name, type(module).__name__, roles, _settings(spec))
        return Layer(name, f"{type(module).__name__} that is no plain batch norm", own, {"dialect": "torch"})
    kind = next((kind for kind, classes in _KINDS.items() if isinstance(module, classes)), None)
    # A subclass that computes its kernel from other tensors, as weight norm does, is not what its base is.
    if kind is None or not own.keys() <= _ROLES.keys() or (kind != "norm" and "weight" not in own):
        return Layer(name, type(module).__name__, own, {"dialect": "torch"})
    words = _OF_NORMS if kind == "norm" else _ROLES
    groups = {"groups": module.groups} if kind.startswith("conv") else {}
    return Layer(name, kind, {words[leaf]: full for leaf, full in own.items()}, {"dialect": "torch", **groups})


def _settings(spec: BatchNormSpec) -> dict[str, Any]:
    """torch's arguments, or where it has no words for all of it, the spec itself."""
    try:
        return {"dialect": "torch", **spec.to_dialect("torch")}
    except DialectError:
        return {"dialect": "torch", "spec": spec.to_dict()}
