"""A forward pass of a whole Keras model in which batch norms alone may train."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final

import numpy as np

from bnlayer.contract import NDArray, Run
from bnlayer.errors import UnsupportedError
from bnlayer.outputs import first_array, widened

from . import runtime
from .bridge import to_array
from .inside import named_batch_norms, named_layers, own_variables
from .reading import layer_names

_SPATIAL: Final = 3  # the least rank of an array with channels and places


def run(model: Any, x: NDArray, *, training: bool, capture: bool) -> Run:
    """See `ModelAdapter.run`.

    Raises:
        UnsupportedError: the model returns no tensor.
    """
    keras = runtime.load_keras()
    seen: dict[str, tuple[NDArray, NDArray]] = {}
    calls: dict[str, None] = {}
    layers = named_layers(model)
    first = _channels_first(layers)
    with ExitStack() as stack:
        stack.enter_context(_no_gradients())
        for name, layer in named_batch_norms(model).items():
            stack.enter_context(_instead(layer, _training(layer.call, training)))
            if capture:
                stack.enter_context(_instead(layer, _captured(layer.call, name, seen)))
        for name, layer in layers.items() if capture else ():
            if own_variables(layer):
                stack.enter_context(_instead(layer, _noted(layer.call, layer_names(name, layer), calls)))
        moved = np.moveaxis(x, -1, 1) if first and x.ndim >= _SPATIAL else x
        tensor = keras.ops.convert_to_tensor(np.ascontiguousarray(moved))
        # A model whose call has no such argument leaves it to its layers, and theirs is False by itself.
        told = {"training": False} if model._call_has_training_arg else {}
        found = first_array(model(tensor, **told), runtime.load_keras().ops.is_tensor)
        if found is None:
            raise UnsupportedError(f"{model.name} returns no tensor to compare.")
        output = widened(to_array(found))
    if first and output.ndim >= _SPATIAL:
        output = np.moveaxis(output, 1, -1)
    return Run(model, output, seen, tuple(calls))


@contextmanager
def _instead(layer: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Within it the layer computes by another function; all that Keras does around a call stays."""
    before = vars(layer).get("call")
    layer.call = call
    try:
        yield
    finally:
        if before is None:
            del layer.call
        else:
            layer.call = before


def _training(call: Callable[..., Any], training: bool) -> Callable[..., Any]:
    signature = inspect.signature(call)

    def trained(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        if "training" in signature.parameters:
            given.arguments["training"] = training
        return call(*given.args, **given.kwargs)

    return trained


def _captured(call: Callable[..., Any], name: str, seen: dict[str, tuple[NDArray, NDArray]]) -> Callable[..., Any]:
    def captured(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = call(inputs, *args, **kwargs)
        if name not in seen:
            seen[name] = to_array(inputs), to_array(outputs)
        return outputs

    return captured


def _noted(call: Callable[..., Any], names: tuple[str, ...], calls: dict[str, None]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.update(dict.fromkeys(names))
        return call(*args, **kwargs)

    return noted


def _no_gradients() -> AbstractContextManager[Any]:
    """Only torch records gradients without being asked to."""
    return sys.modules["torch"].no_grad() if runtime.name() == "torch" else nullcontext()


def _channels_first(layers: Mapping[str, Any]) -> bool:
    """Whether the model has channels on axis 1: as its first layer that has an order says, else as Keras's default."""
    said = [layer.data_format for layer in layers.values() if isinstance(getattr(layer, "data_format", None), str)]
    order: str = [*said, runtime.load_keras().config.image_data_format()][0]
    return order == "channels_first"
