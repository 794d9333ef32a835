"""The true pairs are true: a port by hand along them computes what the source computes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from bnlayer import checkpoint

from . import by_hand, truth

WIDTH = 16  # of ResNet-18: as deep as the real one, and thin
SIZE = 65


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Channels last; two of different brightness, or noise would look like noise to the last layers."""
    noise = np.random.default_rng(5).normal(size=(2, SIZE, SIZE, 3))
    return (noise + np.array([-1, 1]).reshape(2, 1, 1, 1)).astype(np.float32)


def torch_outputs(model: Any, images: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()


def keras_outputs(model: Any, images: np.ndarray) -> np.ndarray:
    import keras

    return keras.ops.convert_to_numpy(model(images, training=False))


def keras_resnet50(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pytest.importorskip("keras")
    from .models import keras_models, torch_models

    source, pairs = keras_models.resnet50(size=None), truth.keras_resnet50()
    layers = by_hand.absorbed(by_hand.of_keras(source), pairs)
    target = by_hand.into_torch(torch_models.resnet50(seed=1), layers, pairs)
    return torch_outputs(target, images), keras_outputs(source, images)


def keras_mobilenet_v2(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pytest.importorskip("keras")
    from .models import keras_models, torch_models

    source = keras_models.mobilenet_v2(SIZE)
    layers = by_hand.of_keras(source)
    target = by_hand.into_torch(torch_models.mobilenet_v2(seed=1), layers, truth.keras_mobilenet_v2())
    return torch_outputs(target, images), keras_outputs(source, images)


def nnx_resnet18(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pytest.importorskip("flax")
    from .models import nnx_models, torch_models

    source = nnx_models.resnet18(WIDTH)
    target = by_hand.into_torch(torch_models.resnet18(WIDTH, seed=1), by_hand.of_nnx(source), truth.nnx_resnet18())
    return torch_outputs(target, images), source(images)


def linen_resnet18(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pytest.importorskip("flax")
    from .models import linen_models, torch_models

    module, variables, _ = linen_models.resnet18(WIDTH)
    layers = by_hand.of_linen(variables, epsilon=1e-5)
    target = by_hand.into_torch(torch_models.resnet18(WIDTH, seed=1), layers, truth.linen_resnet18())
    return torch_outputs(target, images), module.apply(variables, images)


def equinox_resnet18(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    equinox = pytest.importorskip("equinox")
    import jax

    from .models import equinox_models, torch_models

    module, state = equinox_models.resnet18(WIDTH)
    layers = by_hand.of_equinox(module, state)
    target = by_hand.into_torch(torch_models.resnet18(WIDTH, seed=1), layers, truth.equinox_resnet18())
    module = equinox.nn.inference_mode(module)
    outputs, _ = jax.vmap(module, in_axes=(0, None), out_axes=(0, None))(images.transpose(0, 3, 1, 2), state)
    return torch_outputs(target, images), outputs


def tf1_mobilenet_v2(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pytest.importorskip("keras")
    from .models import keras_models, tf1_mobilenet, torch_models

    variables = tf1_mobilenet.variables()
    keras_model = tf1_mobilenet.into_keras(keras_models.mobilenet_v2(SIZE, seed=2), variables)
    layers = by_hand.of_tf1(variables, epsilon=1e-3)
    target = by_hand.into_torch(torch_models.mobilenet_v2(seed=1), layers, truth.tf1_mobilenet_v2())
    return torch_outputs(target, images), keras_outputs(keras_model, images)


@pytest.mark.parametrize(
    "outputs", [keras_resnet50, keras_mobilenet_v2, nnx_resnet18, linen_resnet18, equinox_resnet18, tf1_mobilenet_v2]
)
def test_a_port_by_hand_computes_what_the_source_computes(
    outputs: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    images: np.ndarray,
) -> None:
    found, expected = map(np.asarray, outputs(images))
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()  # the images reach the outputs
    error = by_hand.relative_error(found, expected)
    print(f"{outputs.__name__}: {error:.1e}")
    assert error < 1e-5


def test_the_checkpoint_of_tensorflow_1_reads_as_it_was_made(tmp_path: Path) -> None:
    from .models import tf1_mobilenet

    read = checkpoint.open(tf1_mobilenet.write(tmp_path / "mobilenet.ckpt", seed=3))
    values = tf1_mobilenet.variables(seed=3)
    twins = {name for name in read if name.endswith(tf1_mobilenet.AVERAGE)}
    assert set(read) == {*values, *twins, "global_step"}
    assert {name.removesuffix(tf1_mobilenet.AVERAGE) for name in twins} == {n for n in values if "moving_" not in n}
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)
        if name + tf1_mobilenet.AVERAGE in twins:
            assert not np.array_equal(read[name + tf1_mobilenet.AVERAGE], value)


def test_no_wrong_pair_would_go_unseen(images: np.ndarray) -> None:
    """Any two layers of one shape that follow each other, swapped, change the outputs."""
    import torch

    from .models import torch_models

    model = torch_models.resnet18(WIDTH)
    expected = torch_outputs(model, images)
    alike: dict[object, list[Any]] = {}
    for pair in truth.nnx_resnet18():
        layer = model.get_submodule(pair.target)
        alike.setdefault((pair.kind, layer.weight.shape), []).append(layer)
    errors = []
    with torch.no_grad():
        for layers in alike.values():
            for one, other in pairwise(layers):
                states = [
                    {name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in (one, other)
                ]
                one.load_state_dict(states[1])
                other.load_state_dict(states[0])
                errors.append(by_hand.relative_error(torch_outputs(model, images), expected))
                one.load_state_dict(states[0])
                other.load_state_dict(states[1])
    assert len(errors) > 20
    assert min(errors) > 1e-3
