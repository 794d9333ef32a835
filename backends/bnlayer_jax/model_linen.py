"""Live Flax Linen models: their batch norms, and they as checkpoints (`linen_io`). Imports no Flax."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bnlayer.contract import Kind, LayerRecord, NDArray, Part, Run
from bnlayer.errors import BatchNormError, InputError, UnsupportedError

if TYPE_CHECKING:
    from bnlayer.checkpoint import Checkpoint
    from bnlayer.spec import BatchNormSpec

    from .linen_models import Path, Place


class Inputs:
    """The arguments of one call of a Linen model, by which the batch norms that its `@compact` methods make are found.

    Attributes:
        args, kwargs: of the call; for arrays, their shapes (`jax.ShapeDtypeStruct`) are enough.
        method: as of `apply`.
        rngs: as of `apply`, for a model that draws random numbers in such a call.
    """

    def __init__(self, *args: Any, method: Any = None, rngs: Any = None, **kwargs: Any) -> None:
        self.args, self.kwargs, self.method, self.rngs = args, kwargs, method, rngs


class LinenModels:
    """A model is a tuple (module, variables), or (module, variables, inputs) where a `@compact` method makes batch
    norms: `inputs` is the array, or the `bnlayer_jax.linen.Inputs`, of one call that calls them all.

    The result has the same form. Its variables are the same objects; its module wraps the given one
    (`bnlayer_jax.linen_models.Converted`), or is what was once wrapped.
    """

    name = "flax.linen"

    def owns(self, model: Any) -> bool:
        flax = sys.modules.get("flax.linen")
        module = model[0] if isinstance(model, tuple) and model else model
        return flax is not None and isinstance(module, flax.Module)

    def batch_norms(self, model: Any) -> Sequence[LayerRecord]:
        _, variables, _ = _parts(model)
        return [_record(path, place, variables) for path, place in _places(model).items()]

    def counterpart(self, record: LayerRecord, to: Kind) -> Any:
        from flax import linen as nn

        from .hosts import refuse_losses
        from .linen import BatchNorm, host_fields

        if to == "bnlayer":
            return BatchNorm(**host_fields(record.layer), parent=None)
        refuse_losses(record.layer, "flax.linen.BatchNorm")
        return nn.BatchNorm(**host_fields(record.layer), parent=None)

    def replace(self, model: Any, layers: Mapping[str, Any]) -> Any:
        from .linen_models import Converted, Places

        module, *rest = model
        inner = module.inner if isinstance(module, Converted) else module
        after = [
            dataclasses.replace(place, layer=layers.get("/".join(place.path), place.layer))
            for place in _places(model).values()
            if place is not None
        ]
        if all(place.layer == place.own for place in after):
            return (inner, *rest)
        return (Converted(inner=inner, places=Places(tuple(after))), *rest)

    def freeze(self, model: Any, names: Collection[str], frozen: bool, part: Part) -> Any:
        chosen = [record for record in self.batch_norms(model) if record.name in names]
        native = [record.name for record in chosen if record.kind == "native"]
        if native:
            raise UnsupportedError(
                f"flax.linen.BatchNorm cannot freeze its {part}: {', '.join(native)}. Convert the model first:"
                " bnlayer.convert((module, variables))."
            )
        changed = {record.name: record.layer.clone(**{f"frozen_{part}": frozen}) for record in chosen}
        return self.replace(model, changed)

    def read(self, model: Any) -> Checkpoint:
        """Named as Flax's msgpack of the variables is; layer by layer, not collection by collection.

        With inputs the order is that of the calls, and all layers are known by class. Without, it is that of the
        variables, which JAX sorts on most ways (`order_is_meaningful` is False then), and the layers that `@compact`
        methods make are left out of `layers`.
        """
        from .linen_io import read

        return read(*_parts(model), _places(model))

    def write(self, model: Any, checkpoint: Checkpoint) -> Any:
        from .linen_io import write

        module, variables, *inputs = model
        return (module, write(variables, checkpoint), *inputs)

    def configure(self, model: Any, specs: Mapping[str, BatchNormSpec]) -> Any:
        """The module wraps the given one where something differs, as that of `replace` does."""
        from .model_io import refuse_cumulative

        changed = {}
        for path, place in _places(model).items():
            name = "/".join(path)
            if name not in specs:
                continue
            if place is None:
                raise UnsupportedError(
                    f"{name}: a @compact method of the model makes it, with its epsilon and momentum. Give (module,"
                    " variables, inputs), with the inputs of a call that calls it."
                )
            refuse_cumulative(name, place.layer.momentum, specs[name])
            changed[name] = place.layer.clone(epsilon=specs[name].epsilon, momentum=specs[name].decay)
        return self.replace(model, changed)

    def run(self, model: Any, x: NDArray, *, training: bool, capture: bool = False) -> Run:
        """`module.apply(variables, x)`; with inputs, their call with x as its first array.

        Dropout layers pass on what they are given. Batch norms under `nn.scan` or `nn.vmap` are in `calls`, and their
        arrays are not captured.
        """
        from .linen_io import run

        module, variables, inputs = _parts(model)
        after, done = run(module, variables, inputs, x, training=training, capture=capture)
        return dataclasses.replace(done, model=(module, after, *model[2:]))


def _parts(model: Any) -> tuple[Any, Mapping[str, Any], Inputs | None]:
    """Module, variables and inputs of a model.

    Raises:
        InputError: it is not such a tuple.
    """
    if not isinstance(model, tuple) or len(model) not in (2, 3) or not isinstance(model[1], Mapping):
        raise InputError(
            "a Linen model is the tuple (module, variables), or (module, variables, inputs) where @compact methods make"
            " its batch norms; got " + (f"{len(model)} parts." if isinstance(model, tuple) else "a module alone.")
        )
    inputs = model[2] if len(model) == 3 else None
    return model[0], model[1], inputs if inputs is None or isinstance(inputs, Inputs) else Inputs(inputs)


def _places(model: Any) -> dict[Path, Place | None]:
    """The model's batch norms by path; None for what may be one, and was not found."""
    from .linen_models import Converted, found_by_calling, found_by_name

    module, variables, inputs = _parts(model)
    found: dict[Path, Place | None] = {}
    if isinstance(module, Converted):
        found.update((place.path, place) for place in module.places.every)
        module = module.inner
    called = {} if inputs is None else found_by_calling(module, variables, inputs)
    for path, place in [*called.items(), *found_by_name(module, variables).items()]:
        if found.get(path) is None:
            found[path] = place
    return found


def _record(path: Path, place: Place | None, variables: Mapping[str, Any]) -> LayerRecord:
    from flax import linen as nn

    from .hosts import channel_axis, flax_spec, numpy_state
    from .linen import BatchNorm, arrays_in, created_dtype

    name = "/".join(path)
    if place is None:
        why = (
            "no field and no setup() of the model holds it: give (module, variables, inputs), with the inputs of a call"
            " that calls it"
        )
        return LayerRecord(name, None, "native", None, None, why)
    layer = place.layer
    kind: Kind = "bnlayer" if isinstance(layer, BatchNorm) else "native"
    if type(layer) not in (BatchNorm, nn.BatchNorm):
        why = f"{type(layer).__qualname__} is a subclass, which may compute something else"
        return LayerRecord(name, layer, kind, None, None, why)
    arrays = arrays_in(variables, path)
    counter = arrays.pop("num_updates", None)
    parameter = next((arrays[n] for n in ("gamma", "beta") if n in arrays), None)
    try:
        spec = flax_spec(
            layer,
            place.channels,
            channel_axis(layer.axis),
            layer.param_dtype if parameter is None else parameter.dtype,
            arrays["moving_mean"].dtype if "moving_mean" in arrays else created_dtype(layer),
        )
    except BatchNormError as error:
        return LayerRecord(name, layer, kind, None, None, str(error))
    return LayerRecord(name, layer, kind, spec, numpy_state(arrays, counter))


ADAPTER = LinenModels()
