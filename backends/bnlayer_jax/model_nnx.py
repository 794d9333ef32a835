"""Live Flax NNX models: their batch norms, and they as checkpoints (`nnx_io`). Imports no Flax."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bnlayer.contract import Kind, LayerRecord, NDArray, Part, Run
from bnlayer.errors import BatchNormError, UnsupportedError

if TYPE_CHECKING:
    from flax import nnx

    from bnlayer.checkpoint import Checkpoint
    from bnlayer.spec import BatchNormSpec

Rebuild = Callable[[Any], Any]  # what may stand in a layer's place


class NnxModels:
    """A model is an `nnx.Module`; it is changed in place, and the layers that take another's place hold its Variables,
    so that optimizers and shared parameters see no difference."""

    name = "flax.nnx"

    def owns(self, model: Any) -> bool:
        flax = sys.modules.get("flax.nnx")
        return flax is not None and isinstance(model, flax.Module)

    def batch_norms(self, model: nnx.Module) -> Sequence[LayerRecord]:
        from flax import nnx

        records: dict[int, LayerRecord] = {}
        for path, layer in _held(model, ()):
            if isinstance(layer, nnx.BatchNorm) and id(layer) not in records:
                records[id(layer)] = _record(".".join(path), layer)
        # What Flax reaches and this module cannot replace: inside of a user's own pytree.
        for parts, layer in nnx.iter_modules(model):
            if isinstance(layer, nnx.BatchNorm) and id(layer) not in records:
                name = ".".join(map(str, parts))
                why = "it is in a container other than a module, list, tuple or dict; replace it by hand"
                records[id(layer)] = LayerRecord(name, layer, _kind(layer), None, None, why)
        return list(records.values())

    def counterpart(self, record: LayerRecord, to: Kind) -> nnx.BatchNorm:
        from flax import nnx

        from .hosts import FLAGS, OPTIONS, refuse_losses
        from .nnx import BatchNorm

        layer = record.layer
        words = ("use_running_average", "axis", "momentum", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale",
                 "axis_name", "axis_index_groups", "use_fast_variance", "promote_dtype")  # fmt: skip
        arguments = {word: getattr(layer, word) for word in words}
        made: nnx.BatchNorm
        if to == "bnlayer":
            made = BatchNorm(layer.num_features, **arguments, rngs=nnx.Rngs(0))
        else:
            refuse_losses(layer, "flax.nnx.BatchNorm")
            made = nnx.BatchNorm(layer.num_features, **arguments, rngs=nnx.Rngs(0))
        ours = {*OPTIONS, *FLAGS}
        for name, value in vars(layer).items():
            # Variables stay the same objects; what someone has set on the layer beyond its own attributes comes along.
            if not name.startswith("_") and value is not None and name not in ours and name not in words:
                setattr(made, name, value)
        return made

    def replace(self, model: nnx.Module, layers: Mapping[str, Any]) -> Any:
        new = {id(record.layer): layers[record.name] for record in self.batch_norms(model) if record.name in layers}
        return _replaced(model, lambda value: new.get(id(value), value), {})

    def freeze(self, model: nnx.Module, names: Collection[str], frozen: bool, part: Part) -> nnx.Module:
        chosen = [record for record in self.batch_norms(model) if record.name in names]
        native = [record.name for record in chosen if record.kind == "native"]
        if native:
            raise UnsupportedError(
                f"flax.nnx.BatchNorm cannot freeze its {part}: {', '.join(native)}. Convert the model first:"
                " bnlayer.convert(model)."
            )
        for record in chosen:
            setattr(record.layer, f"frozen_{part}", frozen)
        return model

    def read(self, model: nnx.Module) -> Checkpoint:
        """Named as `nnx.to_pure_dict(nnx.state(model))` is in a file, without the states of random numbers.

        The order is that of the attributes, which `nnx.jit` sorts (`order_is_meaningful` is False then).
        """
        from .nnx_io import read

        return read(model, _paths(model))

    def write(self, model: nnx.Module, checkpoint: Checkpoint) -> nnx.Module:
        from .nnx_io import write

        write(model, checkpoint)
        return model

    def configure(self, model: nnx.Module, specs: Mapping[str, BatchNormSpec]) -> nnx.Module:
        from .nnx_io import configure

        chosen = [record for record in self.batch_norms(model) if record.name in specs]
        for apply in [configure(record.layer, record.name, specs[record.name]) for record in chosen]:
            apply()
        return model

    def run(self, model: nnx.Module, x: NDArray, *, training: bool, capture: bool = False) -> Run:
        """`model(x)`, with arguments such as `train` and `deterministic` where the model takes them.

        A batch norm that is only called inside of a function that JAX transforms (`nnx.scan`, `nnx.jit`) is in
        `calls`, and its arrays are not captured.
        """
        from .nnx_io import run

        return run(model, x, _paths(model), training=training, capture=capture)


def _paths(model: nnx.Module) -> dict[int, str]:
    """The name of every module, by its id."""
    return {id(node): ".".join(path) for path, node in _held(model, ())}


def _kind(layer: nnx.BatchNorm) -> Kind:
    from .nnx import BatchNorm

    return "bnlayer" if isinstance(layer, BatchNorm) else "native"


def _record(name: str, layer: nnx.BatchNorm) -> LayerRecord:
    from flax import nnx

    from .hosts import channel_axis, flax_spec, numpy_state
    from .nnx import BatchNorm, variables_of

    kind = _kind(layer)
    if type(layer) not in (BatchNorm, nnx.BatchNorm):
        why = f"{type(layer).__qualname__} is a subclass, which may compute something else"
        return LayerRecord(name, layer, kind, None, None, why)
    arrays = {n: variable.get_value() for n, variable in variables_of(layer).items()}
    parameter = next((arrays[n] for n in ("gamma", "beta") if n in arrays), None)
    try:
        spec = flax_spec(
            layer,
            layer.num_features,
            channel_axis(layer.axis),
            layer.param_dtype if parameter is None else parameter.dtype,
            arrays["moving_mean"].dtype if "moving_mean" in arrays else "float32",
        )
    except BatchNormError as error:
        return LayerRecord(name, layer, kind, None, None, str(error))
    counter = arrays.pop("num_updates", None)
    return LayerRecord(name, layer, kind, spec, numpy_state(arrays, counter))


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """What a module or container holds, by name, in Flax's own order: attributes sorted, for their order changes where
    Flax updates a module, and with it which of a shared layer's names is the first."""
    from flax import nnx

    if isinstance(node, (nnx.List, list, tuple)):
        yield from ((str(index), value) for index, value in enumerate(node))
    elif isinstance(node, nnx.Module):
        yield from ((name, vars(node)[name]) for name in sorted(vars(node)) if not name.startswith("_pytree__"))
    elif isinstance(node, dict):
        yield from sorted(((str(key), value) for key, value in node.items()), key=lambda item: item[0])


def _held(node: Any, path: tuple[str, ...], seen: set[int] | None = None) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every module and container in `node`, itself first, by path; each once."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    yield path, node
    for name, child in _children(node):
        yield from _held(child, (*path, name), seen)


def _replaced(node: Any, rebuild: Rebuild, done: dict[int, tuple[Any, Any]]) -> Any:
    """`node` with other layers in it: the same object, but for a tuple that held one, or where it is one itself.

    Args:
        node: a module, a container, or anything else.
        rebuild: what stands in a layer's place.
        done: the results for what the model holds several times; with the originals, whose ids so stay theirs.
    """
    from flax import nnx

    changed = rebuild(node)
    if changed is not node or id(node) in done:
        return done[id(node)][1] if changed is node else changed
    done[id(node)] = node, node
    after = {name: (value, _replaced(value, rebuild, done)) for name, value in _children(node)}
    moved = {name: new for name, (old, new) in after.items() if new is not old}
    if not moved:
        return node
    if isinstance(node, (nnx.List, list)):
        for name, value in moved.items():
            node[int(name)] = value
    elif isinstance(node, nnx.Module):
        for name, value in moved.items():
            setattr(node, name, nnx.data(value))
    elif isinstance(node, dict):
        node.update({key: moved[str(key)] for key in node if str(key) in moved})
    else:
        values = [new for _, new in after.values()]
        done[id(node)] = node, type(node)(*values) if hasattr(node, "_fields") else tuple(values)
    return done[id(node)][1]


ADAPTER = NnxModels()
