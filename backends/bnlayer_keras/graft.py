"""Put other layers in the places of some, in everything that holds them: attributes, lists, and functional graphs.

Keras has no public way to do this in place, and a model that is made anew loses its class, its own `train_step`, its
optimizer and whoever else holds it. So this module, and no other, knows how Keras 3 keeps its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from keras.src.utils import tracking

_COMPILED = ("train_function", "test_function", "predict_function")
_NOT_ATTRIBUTES = ("_modules", "_tracker", "_layers", "_operations", "_operations_by_depth")  # seen to by themselves


def graft(holders: Sequence[Any], pairs: Sequence[tuple[Any, Any]]) -> None:
    """Put each pair's second layer in the place of its first.

    Args:
        holders: every layer that holds one of the first ones, and every model that computes with one.
        pairs: old and new, of the same name.
    """
    new = {id(old): layer for old, layer in pairs}
    for old, layer in pairs:
        _take_over_calls(old, layer)
    for holder in holders:
        _in_tracked_layers(holder, new)
        if hasattr(holder, "_operations_by_depth"):
            _in_graph(holder, new)
        _in_attributes(holder, new)
    forget_compiled_steps(holders)


def forget_compiled_steps(holders: Iterable[Any]) -> None:
    """Have the steps of `fit`, `evaluate` and `predict` compiled anew, for what they compute has changed."""
    for holder in holders:
        for name in _COMPILED:
            if getattr(holder, name, None) is not None:
                setattr(holder, name, None)
        if hasattr(holder, "_compiled_trainable_state"):  # by layer, to warn of a flag that changed since
            holder._compiled_trainable_state = {each: each.trainable for each in holder._flatten_layers()}


def _take_over_calls(old: Any, layer: Any) -> None:
    """The calls that functional models are made of become the new layer's, under the same numbers."""
    layer._inbound_nodes, layer._outbound_nodes = list(old._inbound_nodes), list(old._outbound_nodes)
    for node in layer._inbound_nodes:
        node.operation = layer
        for tensor in node.outputs:
            tensor._keras_history = tensor._keras_history._replace(operation=layer)


def _in_tracked_layers(holder: Any, new: dict[int, Any]) -> None:
    """In the list that a holder's weights come from: at the same place, or its weights had another order."""
    known = holder._tracker.stored_ids["layers"]
    _in_list(holder._layers, new)
    for old in known & new.keys():
        known.remove(old)
        known.add(id(new[old]))


def _in_graph(model: Any, new: dict[int, Any]) -> None:
    with tracking.DotNotTrackScope():  # as they were made; TensorFlow refuses to save a list that was written into
        model._operations = [new.get(id(operation), operation) for operation in model._operations]
    for operations in model._operations_by_depth.values():
        _in_list(operations, new)
    # Keys are made of an operation's id and a call's number.
    keys = [key.split("_", 1) for key in model._nodes]
    model._nodes = {f"{id(new[int(own)]) if int(own) in new else own}_{rest}" for own, rest in keys}


def _in_attributes(holder: Any, new: dict[int, Any]) -> None:
    # On PyTorch a layer is a module, and keeps the layers among its attributes apart.
    named = {**vars(holder), **vars(holder).get("_modules", {})}
    locked = holder._tracker.locked
    holder._tracker.unlock()
    for name, value in named.items():
        if name not in _NOT_ATTRIBUTES and not name.startswith("_self_"):  # TensorFlow's notes; `setattr` writes them
            changed = _changed(value, new)
            if changed is not value:
                setattr(holder, name, changed)
    if locked:
        holder._tracker.locked = True


def _changed(value: Any, new: dict[int, Any]) -> Any:
    """The value with new layers for old; lists and dicts are changed in place."""
    if id(value) in new:
        return new[id(value)]
    if type(value) in (list, tracking.TrackedList):  # TensorFlow's wrappers derive from these, and hold no layers here
        _in_list(value, new)
    elif type(value) in (dict, tracking.TrackedDict):
        for key, each in value.items():
            dict.__setitem__(value, key, _changed(each, new))  # Keras's own would track it, at the end of the list
    elif isinstance(value, tuple):
        changed = [_changed(each, new) for each in value]
        if any(a is not b for a, b in zip(changed, value, strict=True)):
            return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    return value


def _in_list(layers: list[Any], new: dict[int, Any]) -> None:
    for i, each in enumerate(layers):
        changed = _changed(each, new)
        if changed is not each:
            list.__setitem__(layers, i, changed)
