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
    "conv": lambda bias: nnx.Conv(4, 8, (3, 3), use_bias=bias, rngs=nnx.Rngs(0)),
    "depthwise": lambda bias: nnx.Conv(4, 8, (3, 3), feature_group_count=4, use_bias=bias, rngs=nnx.Rngs(0)),
    "transposed": lambda bias: nnx.ConvTranspose(4, 8, (3, 3), strides=2, use_bias=bias, rngs=nnx.Rngs(0)),
    "dense": lambda bias: nnx.Linear(4, 8, use_bias=bias, rngs=nnx.Rngs(0)),
}


def close(got: Any, wanted: Any) -> None:
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(("kind", "bias"), [("conv", True), *((kind, False) for kind in LAYERS)])
def test_every_kind_of_layer(kind: str, bias: bool):
    model = nnx.Sequential(LAYERS[kind](bias), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    norm = model.layers[1]
    for variable in (norm.mean, norm.var, norm.scale, norm.bias):
        variable.set_value(rng.uniform(0.5, 2, 8).astype("f4"))
    wanted = ADAPTER.run(model, X, training=False).output
    kept = fold(ADAPTER.read(model), keep=True, model=model, x=X)
    without = fold(ADAPTER.read(model), model=model, x=X)
    close(ADAPTER.run(ADAPTER.write(model, kept), X, training=False).output, wanted)
    smaller = nnx.Sequential(LAYERS[kind](True))
    close(ADAPTER.run(ADAPTER.write(smaller, without), X, training=False).output, wanted)


@pytest.mark.parametrize("kind", ["Conv", "Dense"])
def test_linen(kind: str):
    linen = pytest.importorskip("flax.linen")
    jax = pytest.importorskip("jax")
    adapter = pytest.importorskip("bnlayer_jax.model_linen").ADAPTER

    class Net(linen.Module):
        normalized: bool

        @linen.compact
        def __call__(self, x: Any, train: bool = False) -> Any:
            shape = (8,) if kind == "Dense" else (8, (3, 3))
            x = getattr(linen, kind)(*shape, use_bias=not self.normalized, name="conv")(x)
            return linen.BatchNorm(use_running_average=not train, name="bn")(x) if self.normalized else x

    rng = np.random.default_rng(1)
    module, plain = Net(True), Net(False)
    shapes, smaller = (jax.eval_shape(m.init, jax.random.key(0), X) for m in (module, plain))
    variables = jax.tree.map(lambda a: rng.uniform(0.5, 2, a.shape).astype("f4"), shapes)
    model = (module, variables, X)
    wanted = adapter.run(model, X, training=False).output
    kept, without = (fold(adapter.read(model), keep=keep, model=model, x=X) for keep in (True, False))
    close(adapter.run(adapter.write(model, kept), X, training=False).output, wanted)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, "f4"), smaller)
    close(adapter.run(adapter.write((plain, zeros, X), without), X, training=False).output, wanted)
