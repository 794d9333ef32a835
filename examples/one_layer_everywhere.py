"""Train one batch norm a little in each installed framework, carry it on into the next, and see that nothing is lost.

    python examples/one_layer_everywhere.py

Every framework's own kind of layer is called the framework's own way. The state goes from one to the next as NumPy
arrays; at the end the layer has trained one step in each, and NumPy, doing all steps alone, has the same statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import bnlayer

SPEC = bnlayer.BatchNormSpec.from_dialect("torch", num_features=3)  # torch.nn.BatchNorm2d(3), said exactly


def with_torch(layer: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """torch: the mode is the module's, and y has a gradient."""
    import torch

    return layer, layer.train()(torch.from_numpy(x)).detach().numpy()


def with_jax(layer: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """JAX: pure, so a new layer comes back."""
    y, layer = layer(x, training=True)
    return layer, np.asarray(y)


def with_keyword(layer: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """NumPy, TensorFlow and Keras on it: the layer updates itself."""
    y = layer(x, training=True)
    return layer, np.asarray(y.detach() if hasattr(y, "detach") else y)  # Keras may run on torch


TRAIN: dict[str, Callable[[Any, np.ndarray], tuple[Any, np.ndarray]]] = {
    "numpy": with_keyword,
    "torch": with_torch,
    "tensorflow": with_keyword,
    "jax": with_jax,
    "keras": with_keyword,
}


def installed() -> list[str]:
    """The frameworks that can be imported here."""
    names = []
    for name in TRAIN:
        try:
            bnlayer.backend(name).version()
        except bnlayer.BackendUnavailable as reason:
            print(f"{name} is left out: {reason}")
        else:
            names.append(name)
    return names


def main() -> None:
    """Print, step by step, where the layer is and how far it is from NumPy's own."""
    random = np.random.default_rng(0)
    alone = bnlayer.build(SPEC, "numpy")
    state = None
    print("framework    step  worst |y - NumPy's y|  moving mean after")
    for step, name in enumerate(installed(), 1):
        x = random.normal(step, 2.0, size=(8, 3, 4, 4)).astype(np.float32)
        layer, y = TRAIN[name](bnlayer.build(SPEC, name, state), x)
        spec, state = bnlayer.extract(layer)
        difference = np.abs(y - alone(x, training=True)).max()
        print(f"{name:12} {state.num_updates:4}  {difference:21.1e}  {np.round(state.moving_mean, 4)}")
        assert spec == SPEC
        assert difference < 1e-5
        np.testing.assert_allclose(state.moving_variance, alone.state.moving_variance, rtol=1e-6)
    print("One spec, one state, the same numbers.")


if __name__ == "__main__":
    main()
