"""The framework that Keras runs on: chosen where nobody did, and mapped to the module that knows it.

Imports Keras when asked to, and of the frameworks none but the one in use. What differs between them is in `on_jax`,
`on_tensorflow` and `on_torch`, which have the same functions.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from bnlayer.contract import CallOutcome, NDArray, Request, require
from bnlayer.errors import BackendUnavailable

Forward = Callable[[Any, Any, Any], Any]  # x, weights, adjustment -> y

_MODULES: Final = {"tensorflow": "on_tensorflow", "jax": "on_jax", "torch": "on_torch"}


class Runtime(Protocol):
    """What a module `on_*` offers."""

    def batch_norm(self, x: Any, state: Any, spec: Any, **keywords: Any) -> tuple[Any, Any]:
        """The function of the backend for this framework."""
        ...

    def plain(self, layer: Any, x: Any, training: bool) -> Any | None:
        """y by the framework's kernel, and the layer's variables moved; None where `batch_norm` has to do it.

        Args:
            layer: of ours, as Keras's own may be; its variables have any dtype.
            x: the inputs.
            training: whether the batch's own statistics normalize, and enter the moving ones.
        """
        ...

    def counter_dtype(self) -> str:
        """Of the update counter: int64, or int32 where the framework has no other."""
        ...

    def counter_among_variables(self) -> bool:
        """Whether the counter, where it is no weight, is among the layer's `variables`."""
        ...

    def precision(self, dtypes: set[str]) -> AbstractContextManager[Any]:
        """Within it arrays of these dtypes are what they say."""
        ...

    def device(self, name: str) -> str:
        """The device in Keras's words, such as "cpu:0"; refused if it is absent."""
        ...

    def step(
        self, layer: Any, home: Any, request: Request, forward: Forward
    ) -> tuple[tuple[CallOutcome, ...], NDArray | None, NDArray | None]:
        """One step through the framework's own autodiff: the calls' outcomes, dgamma and dbeta.

        Args:
            layer: a Keras layer whose variables are all its state, and whose parameters are `gamma` and `beta`.
            home: a variable of it, on whose device the step runs.
            request: what to run.
            forward: calls the layer with x, the weights and the adjustment, as the framework's tensors.
        """
        ...


def load_keras() -> Any:
    """Import Keras; where nobody chose its framework and its default is not installed, on one that is.

    Raises:
        BackendUnavailable: Keras or the framework is absent, or the framework is none of ours.
    """
    if "keras" in sys.modules:
        keras = require("keras", "keras")
    else:
        chosen = os.environ.get("KERAS_BACKEND")
        os.environ["KERAS_BACKEND"] = _framework_to_be(chosen)
        try:
            keras = require("keras", "keras")
        finally:  # Keras has read it; child processes choose for themselves
            if chosen is None:
                del os.environ["KERAS_BACKEND"]
            else:
                os.environ["KERAS_BACKEND"] = chosen
    _refuse_foreign(keras.config.backend())
    return keras


def name() -> str:
    """What Keras runs on: "tensorflow", "jax" or "torch"."""
    return str(load_keras().config.backend())


def current() -> Runtime:
    """The module for what Keras runs on."""
    module: Any = importlib.import_module(f".{_MODULES[name()]}", __package__)
    runtime: Runtime = module
    return runtime


def _framework_to_be(chosen: str | None) -> str:
    """The environment's word; else what Keras's own file says, where that is installed; else another one."""
    if find_spec("keras") is None:
        require("keras", "keras")  # says how to install it, before anything is said about frameworks
    if chosen:
        _refuse_foreign(chosen)
        if find_spec(chosen) is None:
            raise BackendUnavailable(
                f"KERAS_BACKEND is {chosen!r}, which is not installed. Run: pip install 'bnlayer[keras,{chosen}]'"
            )
        return chosen
    configured = _configured()
    for framework in (configured, *_MODULES):
        if find_spec(framework) is not None:
            _refuse_foreign(framework)
            return framework
    raise BackendUnavailable(
        f"Keras needs one of {', '.join(_MODULES)}; none is installed. Run: pip install 'bnlayer[keras,tensorflow]'"
    )


def _configured() -> str:
    """The framework that Keras's own configuration file names; "tensorflow" where it does not."""
    home = Path(os.environ.get("KERAS_HOME", Path("~", ".keras"))).expanduser()
    try:
        config = json.loads((home / "keras.json").read_text())
    except (OSError, ValueError):  # absent or damaged; Keras, too, goes on without it
        return "tensorflow"
    return str(config.get("backend", "tensorflow")) if isinstance(config, dict) else "tensorflow"


def _refuse_foreign(framework: str) -> None:
    if framework not in _MODULES:
        raise BackendUnavailable(
            f"Keras runs on {framework!r} here; this backend needs one of {', '.join(_MODULES)}. Set KERAS_BACKEND to"
            " one of them before Keras is imported."
        )
