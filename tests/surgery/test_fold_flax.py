"""Folded Flax models compute what they computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnlayer.surgery.fold import fold

nnx = pytest.importorskip("flax.nnx", reason="pip install 'bnlayer[flax]'")
ADAPTER = pytest.importorskip("bnlayer_jax.model_nnx").ADAPTER
X = np.random.default_rng(3).normal(size=(2, 9, 7, 4)).astype("f4")
LAYERS: dict[str, Any] = {
    "conv": lambda: nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)),
    "no bias": lambda: nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0)),
    "depthwise": lambda: nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)),
    "transposed": lambda: nnx.ConvTranspose(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0)),
    "dense": lambda: nnx.Linear(4, 8, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str):
    model = nnx.Sequential(LAYERS[kind](), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    norm = model.layers[1]
    for variable in (norm.mean, norm.var, norm.scale, norm.bias):
        variable.set_value(rng.uniform(0.5, 2, 8).astype("f4"))
    wanted = ADAPTER.run(model, X, training=False).output
    kept = fold(ADAPTER.read(model), keep=True, model=model, x=X)
    without = fold(ADAPTER.read(model), model=model, x=X)
    assert {name.rsplit("/", 1)[-1] for name in without} == {"kernel", "bias"}
    got = ADAPTER.run(ADAPTER.write(model, kept), X, training=False).output
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()
