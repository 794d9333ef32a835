"""Names for what Equinox writes without: a model's leaves, in the order of an `.eqx` file.

`eqx.tree_serialise_leaves` writes the arrays and the Python numbers of a tree, depth first; of an `eqx.nn.State` it
writes the values in the order in which the model's layers asked for them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax import tree_util

from bnlayer.checkpoint import Checkpoint, Layer, Tensor
from bnlayer.errors import BackendUnavailable

try:
    import equinox as eqx
except ModuleNotFoundError as error:
    raise BackendUnavailable("equinox is not installed. Run: pip install 'bnlayer[equinox]'") from error

# What Equinox's BatchNorm keeps behind each of its state indices; `bnlayer.checkpoint.naming.equinox` knows the names.
_STATE: Final[Mapping[str, Sequence[str]]] = {
    "batch_counter": ("batch_counter",),
    "batch_state_index": ("batch_hidden_mean", "batch_hidden_variance"),
    "ema_first_time_index": ("ema_first_time",),
    "ema_state_index": ("ema_mean", "ema_variance"),
}


def equinox_template(model: Any, state: eqx.nn.State | None = None) -> Checkpoint:
    """The names, shapes and dtypes of an `.eqx` file, in its order; and these very values, to be saved under names.

        template = bnlayer_jax.equinox_template(model, state)
        bnlayer.checkpoint.open("model.eqx", template=template).batch_norms()
        template.save("like.npz")    # for `bnlayer inspect model.eqx --template like.npz`

    A field's path is its name, such as `layers.1.weight`. A batch norm's state is named beside its parameters:
    `batch_counter`, `batch_hidden_mean`, `batch_hidden_variance`; of mode "ema" `ema_first_time`, `ema_mean`,
    `ema_variance`. Epsilon and decay are in `layers`, which no saved template keeps.

    Args:
        model: what was given to `tree_serialise_leaves`, or is its first part; shapes will do
            (`eqx.filter_eval_shape`). Any tree of models and states.
        state: the second part, where the pair (model, state) was written.

    Raises:
        ValueError: two leaves have the same name, as under dict keys with dots in them.
    """
    layers: list[Layer] = []
    for name, node in _batch_norms(model, state):
        held = [field for field in _STATE if getattr(node, field) is not None]
        names = [leaf for leaf in ("weight", "bias") if getattr(node, leaf) is not None]
        names += [leaf for field in held for leaf in _STATE[field]]
        settings = {"dialect": "equinox", "eps": node.eps, "momentum": node.momentum}
        layers.append(Layer(name, "equinox.nn.BatchNorm", {leaf: _under(name, leaf) for leaf in names}, settings))
    tensors: dict[str, Tensor] = {}
    for name, leaf in leaf_names(model, state):
        tensor = _tensor(leaf)
        if tensor is None:
            continue
        if name in tensors:
            raise ValueError(f"two leaves are named {name!r}; give the parts of the tree other keys.")
        tensors[name] = tensor
    kept = tuple(layer for layer in layers if all(name in tensors for name in layer.tensors.values()))
    return Checkpoint("equinox", tensors, order_is_meaningful=True, layers=kept)


def leaf_names(model: Any, state: eqx.nn.State | None = None) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree with the name that `equinox_template` gives it, those too that it leaves out; in JAX's
    order."""
    tree, unnamed = _tree(model, state)
    indices: dict[Any, str] = {}
    for path, node in _flat(tree, (eqx.nn.BatchNorm, eqx.nn.StateIndex)):
        name = _name(path[unnamed:])
        if isinstance(node, eqx.nn.StateIndex):
            indices[node.marker] = name
        elif isinstance(node, eqx.nn.BatchNorm):
            held = {field: getattr(node, field) for field in _STATE if getattr(node, field) is not None}
            indices.update({index.marker: _under(name, field) for field, index in held.items()})
    yield from _leaves(tree, unnamed, indices)


def _batch_norms(model: Any, state: eqx.nn.State | None) -> Iterator[tuple[str, eqx.nn.BatchNorm]]:
    tree, unnamed = _tree(model, state)
    for path, node in _flat(tree, (eqx.nn.BatchNorm,)):
        if isinstance(node, eqx.nn.BatchNorm):
            yield _name(path[unnamed:]), node


def _tree(model: Any, state: eqx.nn.State | None) -> tuple[Any, int]:
    """What is written, and how many keys of its paths stand for no name: the pair's own."""
    return (model, 0) if state is None else ((model, state), 1)


def _flat(tree: Any, stop: tuple[type, ...]) -> list[tuple[tuple[Any, ...], Any]]:
    return tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, stop))[0]


def _leaves(tree: Any, unnamed: int, indices: Mapping[Any, str]) -> Iterator[tuple[str, Any]]:
    """Every leaf with its name; those of a State have the names of the indices that they belong to."""
    for path, node in _flat(tree, (eqx.nn.State,)):
        if not isinstance(node, eqx.nn.State):
            yield _name(path[unnamed:]), node
            continue
        state: Any = node  # whose method has no types
        values, markers = state.tree_flatten()
        for marker, value in zip(markers, values, strict=True):
            index = indices.get(marker, str(marker))
            owner, _, field = index.rpartition(".")
            inner = _flat(value, ())
            known = _STATE.get(field, ())
            for i, (inside, leaf) in enumerate(inner):
                yield (_under(owner, known[i]) if len(known) == len(inner) else _under(index, _name(inside))), leaf


def _tensor(leaf: Any) -> Tensor | None:
    """A leaf as Equinox writes it, or None for one that it leaves out."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
        return Tensor(dtype, shape, lambda: np.zeros(shape, dtype))
    if isinstance(leaf, (jax.Array, np.ndarray)):
        return Tensor(np.dtype(leaf.dtype), tuple(leaf.shape), lambda: np.asarray(leaf))
    written = io.BytesIO()
    eqx.default_serialise_filter_spec(written, leaf)  # a Python number's dtype depends on JAX's settings
    return Tensor.of(np.load(io.BytesIO(written.getvalue()), allow_pickle=False)) if written.getvalue() else None


def _name(path: Sequence[Any]) -> str:
    """`.layers[1].weight` as layers.1.weight."""
    return ".".join(tree_util.keystr((key,), simple=True) for key in path)


def _under(owner: str, leaf: str) -> str:
    return ".".join(part for part in (owner, leaf) if part)
