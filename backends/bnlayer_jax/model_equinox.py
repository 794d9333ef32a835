"""Live Equinox models: their batch norms, and they as checkpoints (`equinox_io`). Imports no Equinox."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bnlayer.contract import Kind, LayerRecord, NDArray, Part, Run
from bnlayer.errors import BatchNormError, UnsupportedError

if TYPE_CHECKING:
    from bnlayer.checkpoint import Checkpoint
    from bnlayer.spec import BatchNormSpec


class EquinoxModels:
    """A model is a module, or the pair (module, state) of `equinox.nn.make_with_state`; the result has the same form.

    Layers that take another's place have its leaves and its indices into the state, which stays as it is. What layers
    have learned is told of a pair only.
    """

    name = "equinox"

    def owns(self, model: Any) -> bool:
        equinox = sys.modules.get("equinox")
        if equinox is None:
            return False
        if isinstance(model, tuple) and len(model) == 2:
            return isinstance(model[0], equinox.Module) and isinstance(model[1], equinox.nn.State)
        return isinstance(model, equinox.Module)

    def batch_norms(self, model: Any) -> Sequence[LayerRecord]:
        import equinox as eqx
        import jax

        module, state = model if isinstance(model, tuple) else (model, None)
        records: dict[int, LayerRecord] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(module, is_leaf=_is_batch_norm):
            if isinstance(leaf, eqx.nn.BatchNorm) and id(leaf) not in records:
                records[id(leaf)] = _record(jax.tree_util.keystr(path).lstrip("."), leaf, state)
        return list(records.values())

    def counterpart(self, record: LayerRecord, to: Kind) -> Any:
        import equinox as eqx

        from .equinox import BatchNorm, plain_options, with_fields
        from .hosts import refuse_losses

        layer = record.layer
        if layer.mode != "batch":
            raise UnsupportedError(
                f"{record.name}: mode='ema' of equinox.nn.BatchNorm normalizes with the moving average in training too,"
                " which bnlayer's does not. To train on with batch normalization, build the model with"
                " bnlayer_jax.equinox.BatchNorm, whose mode='ema' loads the same leaves."
            )
        if to == "bnlayer":
            return with_fields(layer, BatchNorm, **plain_options())
        refuse_losses(layer, "equinox.nn.BatchNorm")
        return with_fields(layer, eqx.nn.BatchNorm)

    def replace(self, model: Any, layers: Mapping[str, Any]) -> Any:
        import jax

        module, *state = model if isinstance(model, tuple) else (model,)
        new = {id(record.layer): layers[record.name] for record in self.batch_norms(model) if record.name in layers}
        module = jax.tree.map(lambda leaf: new.get(id(leaf), leaf), module, is_leaf=_is_batch_norm)
        return (module, *state) if state else module

    def freeze(self, model: Any, names: Collection[str], frozen: bool, part: Part) -> Any:
        from .equinox import with_fields

        chosen = [record for record in self.batch_norms(model) if record.name in names]
        native = [record.name for record in chosen if record.kind == "native"]
        if native:
            raise UnsupportedError(
                f"equinox.nn.BatchNorm cannot freeze its {part}: {', '.join(native)}. Convert the model first:"
                " bnlayer.convert((module, state))."
            )
        changed = {r.name: with_fields(r.layer, type(r.layer), **{f"frozen_{part}": frozen}) for r in chosen}
        return self.replace(model, changed)

    def read(self, model: Any) -> Checkpoint:
        """Named as `bnlayer_jax.equinox_template` names an `.eqx` file's arrays, and in its order: the fields', with
        the state behind them.

        `metadata["numbers"]` are the names of those that are Python numbers in the module, such as flags.
        """
        from .equinox_io import read

        return read(*_parts(model))

    def write(self, model: Any, checkpoint: Checkpoint) -> Any:
        """The state, its counters and flags too."""
        from .equinox_io import write

        module, state = write(*_parts(model), checkpoint)
        return (module, state) if isinstance(model, tuple) else module

    def configure(self, model: Any, specs: Mapping[str, BatchNormSpec]) -> Any:
        from .equinox import with_fields
        from .model_io import refuse_cumulative

        changed = {}
        for record in self.batch_norms(model):
            if record.name in specs:
                spec, layer = specs[record.name], record.layer
                refuse_cumulative(record.name, layer.momentum, spec)
                changed[record.name] = with_fields(layer, type(layer), eps=spec.epsilon, momentum=spec.decay)
        return self.replace(model, changed)

    def run(self, model: Any, x: NDArray, *, training: bool, capture: bool = False) -> Run:
        """`model(x)` or `model(x, state)`, each also with `key`, of one example under vmap.

        Raises:
            UnsupportedError: the batch norms' axes have different names, or the call asks for other arguments.
        """
        from .equinox_io import run

        module, state = _parts(model)
        after, done = run(module, state, x, training=training, capture=capture)
        return dataclasses.replace(done, model=(module, after) if isinstance(model, tuple) else model)


def _parts(model: Any) -> tuple[Any, Any]:
    return model if isinstance(model, tuple) else (model, None)


def _is_batch_norm(node: Any) -> bool:
    import equinox as eqx

    return isinstance(node, eqx.nn.BatchNorm)


def _record(name: str, layer: Any, state: Any) -> LayerRecord:
    import equinox as eqx

    from .equinox import BatchNorm, held_in, spec_of
    from .hosts import numpy_state

    kind: Kind = "bnlayer" if isinstance(layer, BatchNorm) else "native"
    if type(layer) not in (BatchNorm, eqx.nn.BatchNorm):
        why = f"{type(layer).__qualname__} is a subclass, which may compute something else"
        return LayerRecord(name, layer, kind, None, None, why)
    learned = None
    stored: Any = "float32" if layer.weight is None else layer.weight.dtype
    if state is not None:
        held = held_in(layer, state)
        learned = numpy_state(held.arrays(), held.num_updates)
        if held.moving_mean is not None:
            stored = held.moving_mean.dtype
    try:
        spec = layer.spec_of(stored) if isinstance(layer, BatchNorm) else spec_of(layer, stored)
    except BatchNormError as error:
        return LayerRecord(name, layer, kind, None, None, str(error))
    return LayerRecord(name, layer, kind, spec, learned)


ADAPTER = EquinoxModels()
