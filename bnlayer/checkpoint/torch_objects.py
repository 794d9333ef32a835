"""What torch's pickles mean: storages, tensors, parameters, state dicts, modules. `pickles` read them as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .checkpoint import Checkpoint, Layer, NDArray, Tensor
from .flatten import flatten
from .formats import Options
from .pickles import Call, Global, Persistent

# torch's dtypes by name, and the storages that are called after them.
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8",
                                         "uint16", "uint32", "uint64", "bool", "complex64", "complex128")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
STORAGES: Final[Mapping[str, str]] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
# Keys under which training programs keep what is not the model.
_NOT_THE_MODEL: Final = ("optim", "opt_", "scheduler", "scaler", "amp", "args", "config", "rng", "hyper_parameters",
                         "callbacks", "loops", "meta", "history")  # fmt: skip
_DICTS: Final = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
_LARGEST: Final = 2**62
_MOST_AXES: Final = 32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle describes it: a view of a storage, all in elements."""

    storage: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """How many elements of the storage it reaches over, from the storage's beginning."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def view(self, data: bytes | bytearray) -> NDArray:
        """The tensor over its storage's bytes; with the stored strides, in memory of its own, or in that of `data`."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        size = self.dtype.itemsize
        strides = tuple(s * size for s in self.stride)
        view: NDArray = np.ndarray(self.shape, self.dtype, data, self.offset * size, strides)
        whole = isinstance(data, bytearray) and view.nbytes == len(data)
        whole = whole and (view.flags.c_contiguous or view.flags.f_contiguous)
        return view if whole else view.copy(order="K")


# Reads a storage's bytes: its key, how many, and the tensor's name for the error.
Storage = Callable[[str, int, str], bytes | bytearray]


def checkpoint_of(
    root: Any, path: Path, format: str, options: Options, sizes: Callable[[str], int | None], storage: Storage
) -> Checkpoint:
    """The checkpoint of an unpickled root object.

    Args:
        root: what `pickles` read.
        path: the file.
        format: the format's name.
        options: key and module_stubs.
        sizes: a storage's length in bytes by its key; None where there is no such storage.
        storage: reads one.

    Raises:
        CheckpointError: there is no model in it, or more than one, or a tensor does not fit its storage.
    """
    place = str(path)
    model, key = _model(root, options, place)
    modules: list[Layer] = []
    if _is_module(model):
        if not options.module_stubs:
            raise CheckpointError(
                f"{place}: it is a whole module ({_class_of(model)}) and not a state_dict; read it with"
                " module_stubs=True (--module-stubs): its parameters and settings are data, and none of its code runs."
            )
        leaves = list(_module_leaves(model, place, modules))
    else:
        leaves = list(flatten(model, place, separator=".", children=_children))
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, leaf in leaves:
        tensor = stored_tensor(leaf, f"{place}: {name}")
        if tensor is None:
            if isinstance(leaf, (bool, int, float, str)) or leaf is None:
                others[name] = leaf
            elif isinstance(leaf, Call):
                others[name] = f"<{leaf.name}>"
            continue
        tensors[name] = _lazy(tensor, f"{place}: {name}", sizes, storage)
    metadata: dict[str, Any] = {"values": others} if others else {}
    if key is not None:
        metadata["key"] = key
    return Checkpoint(format, tensors, order_is_meaningful=True, path=path, metadata=metadata, layers=tuple(modules))


def stored_tensor(leaf: Any, place: str) -> StoredTensor | None:
    """The tensor that a record describes; None if it describes none.

    Raises:
        CheckpointError: it is a kind of tensor that is not read here, or its numbers make no sense.
    """
    if not isinstance(leaf, Call):
        return None
    name, arguments = leaf.name, leaf.arguments
    if name in (
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch.nn.parameter.Parameter",
    ):
        return stored_tensor(arguments[0], place) if arguments else None
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) >= 3 and isinstance(arguments[2], tuple):
        return stored_tensor(Call(arguments[0], arguments[2]), place)
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        return _view(arguments, None, place)
    if name == "torch._utils._rebuild_tensor_v3" and len(arguments) >= 7:
        return _view(arguments, arguments[6], place)
    if name.startswith("torch._utils._rebuild"):
        raise CheckpointError(f"{place}: it is made by {name}, which is not read here (sparse, quantized, meta ...).")
    return None


def _view(arguments: tuple[Any, ...], dtype: Any, place: str) -> StoredTensor:
    storage, *numbers = arguments[:4] or (None,)
    identity = storage.identity if isinstance(storage, Persistent) else None
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage" or len(numbers) != 3:
        raise CheckpointError(f"{place}: the pickle does not describe a tensor over a storage.")
    kind = identity[1]
    named = dtype if dtype is not None else kind
    known = (
        STORAGES.get(named.name, named.name) if isinstance(named, Global) and named.module.startswith("torch") else ""
    )
    if known not in DTYPES:
        raise CheckpointError(f"{place}: its dtype {named} is unknown; known are {', '.join(DTYPES)}.")
    offset, shape, stride = numbers[0], _size(numbers[1]), _size(numbers[2])
    if (
        not (type(offset) is int and 0 <= offset < _LARGEST)
        or shape is None
        or stride is None
        or len(shape) != len(stride)
        or len(shape) > _MOST_AXES
        or prod(shape) * DTYPES[known].itemsize >= _LARGEST
    ):
        raise CheckpointError(
            f"{place}: offset {offset!r}, shape {numbers[1]!r} or stride {numbers[2]!r} make no sense."
        )
    view = identity[5] if len(identity) > 5 else None  # in old files a storage may be a part of another
    if view is not None:
        if not isinstance(view, tuple) or len(view) != 3 or type(view[1]) is not int or view[1] < 0:
            raise CheckpointError(f"{place}: its storage is a part of another in a way that makes no sense.")
        offset += view[1]
    return StoredTensor(str(identity[2]), DTYPES[known], offset, shape, stride)


def _size(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Call) and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, (tuple, list)) or not all(type(n) is int and 0 <= n < _LARGEST for n in value):
        return None
    return tuple(value)


def _lazy(tensor: StoredTensor, place: str, sizes: Callable[[str], int | None], storage: Storage) -> Tensor:
    size = sizes(tensor.storage)
    needed = tensor.extent * tensor.dtype.itemsize
    if size is None:
        raise CheckpointError(f"{place}: its storage {tensor.storage!r} is not in the file.")
    if needed > size or (prod(tensor.shape) * tensor.dtype.itemsize > size):
        # More elements than the storage has: an expanded tensor (stride 0), or an attack. A model holds neither.
        raise CheckpointError(
            f"{place}: shape {tensor.shape} with strides {tensor.stride} needs {needed} bytes, its storage has {size}."
        )

    def load() -> NDArray:
        return tensor.view(storage(tensor.storage, needed, place))

    return Tensor(tensor.dtype, tensor.shape, load)


# Which part is the model


def _model(root: Any, options: Options, place: str) -> tuple[Any, str | None]:
    """The state dict (or module) inside of what a training program saved, and the key that it was under."""
    if options.key is not None:
        node = root
        for part in options.key.split("."):
            inside = _children(node)
            if inside is None or part not in inside:
                has = ", ".join(map(str, inside or {})) or "nothing"
                raise CheckpointError(f"{place}: there is no key {options.key!r}; it has {has}.")
            node = inside[part]
        return node, options.key
    if _is_module(root) or _has_tensors(root):
        return root, None
    inside = _children(root) or {}
    models = [
        key
        for key, value in inside.items()
        if not any(word in str(key).lower() for word in _NOT_THE_MODEL) and (_is_module(value) or _has_tensors(value))
    ]
    if len(models) == 1:
        return inside[models[0]], str(models[0])
    if models:
        raise CheckpointError(
            f"{place}: it holds several models: {', '.join(map(str, models))}. Say which with key=... (--key)."
        )
    raise CheckpointError(
        f"{place}: there is no state_dict in it; it holds {', '.join(map(str, inside)) or 'nothing'}."
    )


def _children(node: Any) -> dict[Any, Any] | None:
    if isinstance(node, dict):
        return node
    if isinstance(node, Call) and node.name in _DICTS:
        return node.items
    if isinstance(node, (list, tuple)):
        return dict(enumerate(node))
    return None


def _has_tensors(node: Any) -> bool:
    """Whether a mapping directly holds tensors by name."""
    inside = _children(node)
    if inside is None or isinstance(node, (list, tuple)):
        return False
    return any(
        isinstance(v, Call) and v.name.startswith(("torch._utils._rebuild", "torch._tensor.")) for v in inside.values()
    )


# Whole modules, as data


def _is_module(node: Any) -> bool:
    state = node.state if isinstance(node, Call) else None
    return isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= set(map(str, state))


def _class_of(node: Call) -> str:
    """The class of a pickled object: what was called, or the first argument of copyreg's maker of objects."""
    if node.name in ("copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__") and node.arguments:
        return str(node.arguments[0])
    return node.name


def _module_leaves(root: Call, place: str, layers: list[Layer]) -> Iterator[tuple[str, Any]]:
    """Parameters and persistent buffers in state_dict's order; each module's class and settings go to `layers`."""
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    seen = 0
    while stack:
        prefix, module, depth = stack.pop()
        seen += 1
        if depth > 64 or seen > 100_000:
            raise CheckpointError(f"{place}: its modules are nested too deep, or too many.")
        if not _is_module(module):
            continue
        state = module.state
        parameters, buffers, modules = (_children(state[k]) or {} for k in ("_parameters", "_buffers", "_modules"))
        unsaved = _members(state.get("_non_persistent_buffers_set"))
        own = {str(n): leaf for n, leaf in {**parameters, **buffers}.items() if leaf is not None and n not in unsaved}
        layers.append(_layer(prefix.removesuffix("."), module, own))
        yield from ((prefix + name, leaf) for name, leaf in own.items())
        stack += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(list(modules.items()))]


def _members(node: Any) -> set[str]:
    """The texts in a pickled set: protocol 2 calls `set` with a list. Anything else has none."""
    if isinstance(node, Call):
        node = node.arguments[0] if node.arguments else None
    return {member for member in node if isinstance(member, str)} if isinstance(node, (set, frozenset, list)) else set()


def _layer(name: str, module: Call, own: Mapping[str, Any]) -> Layer:
    roles = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance",
             "num_batches_tracked": "num_updates"}  # fmt: skip
    kind = _class_of(module)
    prefix = f"{name}." if name else ""
    batch_norm = "running_mean" in own and ".batchnorm." in kind
    tensors = {roles.get(n, n) if batch_norm else n: prefix + n for n in own}
    settings = {
        str(key): value
        for key, value in module.state.items()
        if (isinstance(value, (bool, int, float, str)) or value is None) and not str(key).startswith("_")
    }
    if batch_norm:
        wanted = ("eps", "momentum", "affine", "track_running_stats")
        settings = {"dialect": "torch", **{key: settings[key] for key in wanted if key in settings}}
    return Layer(name, kind, tensors, settings)
