"""The batch norms inside of a Keras model: listed, exchanged for ours or for Keras's, frozen; and the model as a
whole: read, written, run. Imports no Keras."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from bnlayer.contract import Kind, LayerRecord, NDArray, Part, Run
from bnlayer.errors import UnsupportedError
from bnlayer.spec import BatchNormSpec

from .inside import holders, named_batch_norms

if TYPE_CHECKING:
    import keras

    from bnlayer.checkpoint import Checkpoint


class KerasModels:
    """Any Keras model or layer: sequential, functional, subclassed, nested, wrapped; or a single batch norm."""

    name = "keras"

    def owns(self, model: object) -> bool:
        """Whether it is a Keras layer, as every Keras model is."""
        keras = sys.modules.get("keras")
        return keras is not None and isinstance(model, keras.layers.Layer)

    def batch_norms(self, model: keras.layers.Layer) -> Sequence[LayerRecord]:
        """Those of Keras's class, which ours are too, by their layers' names with "/" between nested ones.

        Two of the same name get "#2", "#3" and so on after the first.
        """
        from .exchange import record

        return [record(name, layer) for name, layer in named_batch_norms(model).items()]

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

        found = named_batch_norms(model)
        new = {id(found[name]): layer for name, layer in layers.items()}
        if id(model) in new:
            return new[id(model)]
        graft(list(holders(model)), [(found[name], layer) for name, layer in layers.items()])
        return model

    def freeze(self, model: keras.layers.Layer, names: Collection[str], frozen: bool, part: Part) -> keras.layers.Layer:
        """Statistics by `frozen_statistics`, parameters by the variables' own `trainable`.

        Keras's `layer.trainable = False` does both at once, and sets the variables' flags whenever it is assigned. On
        JAX a model that has been fitted has to be compiled again where parameters are frozen or freed, as after every
        change of what is trainable.
        """
        from .graft import forget_compiled_steps
        from .layer import BatchNormalization

        layers = {name: layer for name, layer in named_batch_norms(model).items() if name in names}
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
        forget_compiled_steps(holders(model))
        return model

    def read(self, model: keras.layers.Layer) -> Checkpoint:
        """Copies of what `model.save_weights` would write, under its paths, layer by layer.

        Raises:
            CheckpointError: the model is not built.
        """
        from .reading import read

        return read(model)

    def write(self, model: keras.layers.Layer, checkpoint: Checkpoint) -> keras.layers.Layer:
        """The model with its tensors from a checkpoint, in its own dtypes.

        Raises:
            CheckpointError: a tensor is missing, unknown, or does not fit; the model is as it was.
        """
        from .reading import write

        written: keras.layers.Layer = write(model, checkpoint)
        return written

    def configure(self, model: keras.layers.Layer, specs: Mapping[str, BatchNormSpec]) -> keras.layers.Layer:
        """The model, its batch norms' `epsilon` and `momentum` changed in place; its compiled steps are made anew.

        Raises:
            UnsupportedError: the cumulative average is wanted of Keras's own layer; nothing is changed.
        """
        from .graft import forget_compiled_steps
        from .layer import BatchNormalization

        found = named_batch_norms(model)
        layers = [(found[name], name, spec) for name, spec in specs.items()]
        for layer, name, spec in layers:
            if spec.decay == "cumulative" and not isinstance(layer, BatchNormalization):
                raise UnsupportedError(f"{name}: Keras's own layer has no cumulative average; convert the model.")
        for layer, _, spec in layers:
            layer.epsilon = spec.epsilon
            if isinstance(layer, BatchNormalization):
                layer.cumulative = spec.decay == "cumulative"
            if spec.decay != "cumulative":
                layer.momentum = spec.decay
        forget_compiled_steps(holders(model))
        return model

    def run(self, model: keras.layers.Layer, x: NDArray, *, training: bool, capture: bool = False) -> Run:
        """One pass, for inputs of rank 3 and more with the channels where the model's layers have them.

        Raises:
            UnsupportedError: the model returns no tensor.
        """
        from .running import run

        return run(model, x, training=training, capture=capture)


ADAPTER = KerasModels()
