"""The batch norms inside of a Keras model: listed, exchanged for ours or for Keras's, frozen. Imports no Keras."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bnlayer.contract import Kind, LayerRecord, Part
from bnlayer.errors import UnsupportedError

if TYPE_CHECKING:
    import keras


class KerasModels:
    """Any Keras model or layer: sequential, functional, subclassed, nested, wrapped; or a single batch norm."""

    name = "keras"

    def owns(self, model: Any) -> bool:
        """Whether it is a Keras layer, as every Keras model is."""
        keras = sys.modules.get("keras")
        return keras is not None and isinstance(model, keras.layers.Layer)

    def batch_norms(self, model: keras.layers.Layer) -> Sequence[LayerRecord]:
        """Those of Keras's class, which ours are too, by their layers' names with "/" between nested ones.

        Two of the same name get "#2", "#3" and so on after the first.
        """
        from .exchange import record

        return [record(name, layer) for name, layer in _named(model).items()]

    def counterpart(self, record: LayerRecord, to: Kind) -> keras.layers.Layer:
        """The other kind's layer over the very same variables, with the same name and flags; the record's stays."""
        from .exchange import native_of, ours_of

        return ours_of(record.layer) if to == "bnlayer" else native_of(record.layer)

    def replace(self, model: keras.layers.Layer, layers: Mapping[str, keras.layers.Layer]) -> keras.layers.Layer:
        """The model, changed in place, its optimizer, losses and metrics with it; its compiled steps are made anew.

        In a functional model the new layer takes over the calls of the old one, so that whatever else was made of the
        same tensors has the new layer too. Where the model is a batch norm itself, the result is the other layer.
        """
        from .graft import graft

        found = _named(model)
        new = {id(found[name]): layer for name, layer in layers.items()}
        if id(model) in new:
            return new[id(model)]
        graft(list(_holders(model)), [(found[name], layer) for name, layer in layers.items()])
        return model

    def freeze(self, model: keras.layers.Layer, names: Collection[str], frozen: bool, part: Part) -> keras.layers.Layer:
        """Statistics by `frozen_statistics`, parameters by the variables' own `trainable`.

        Keras's `layer.trainable = False` does both at once, and sets the variables' flags whenever it is assigned. On
        JAX a model that has been fitted has to be compiled again where parameters are frozen or freed, as after every
        change of what is trainable.
        """
        from .graft import forget_compiled_steps
        from .layer import BatchNormalization

        layers = {name: layer for name, layer in _named(model).items() if name in names}
        if part == "statistics":
            for name, layer in layers.items():
                if not isinstance(layer, BatchNormalization):
                    raise UnsupportedError(
                        f"{name}: Keras's own layer cannot freeze its statistics and learn its parameters; convert the"
                        " model, or set layer.trainable = False, which freezes both."
                    )
                if not layer.track_moving_stats:
                    raise UnsupportedError(f"{name}: there are no statistics; it has track_moving_stats=False.")
            for layer in layers.values():
                layer.frozen_statistics = frozen
        else:
            for name, layer in layers.items():
                if not frozen and not layer.trainable:
                    raise UnsupportedError(
                        f"{name}: it is frozen by Keras's layer.trainable = False, whoever set it; set that to True."
                    )
            for layer in layers.values():
                for variable in (layer.gamma, layer.beta):
                    if variable is not None:
                        variable.trainable = not frozen
        forget_compiled_steps(_holders(model))
        return model


def _named(model: Any) -> dict[str, Any]:
    """Every batch norm once, by its first name, in the order in which the model holds them."""
    keras = sys.modules["keras"]
    named: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(layer: Any, path: tuple[str, ...]) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if isinstance(layer, keras.layers.BatchNormalization):
            name = first = "/".join(path) or layer.name
            count = 1
            while name in named:
                count += 1
                name = f"{first}#{count}"
            named[name] = layer
        for child in _children(layer):
            visit(child, (*path, child.name))

    visit(model, ())
    return named


def _holders(model: Any) -> Iterator[Any]:
    """The model and every layer in it that holds layers, once each."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        layer = waiting.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        children = _children(layer)
        waiting.extend(children)
        if children or layer is model:
            yield layer
            # What a sequential model computes with is a functional one that it keeps to itself.
            if getattr(layer, "_functional", None) is not None:
                waiting.append(layer._functional)


def _children(layer: Any) -> list[Any]:
    return list(layer._flatten_layers(include_self=False, recursive=False))


ADAPTER = KerasModels()
