"""JAX: our function under jit against `flax.nnx.BatchNorm` and `flax.linen.BatchNorm`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .cases import IMAGES, MODES, ROWS, Case, Mode, Pair, Shape, data, parameters

_BARS = {"eval": 1.0, "train": 1.10, "grad": 0.80}
_GATED = {(64, 14, 14, 256), (128, 7, 7, 512), (65536, 64)}


def cases() -> Iterator[Case]:
    """Channels last."""
    for peer in ("flax.nnx", "flax.linen"):
        for shape in (*IMAGES, *ROWS):
            for mode in MODES:
                layout = "NHWC" if len(shape) == 4 else "NC"
                bar = _BARS[mode] if shape in _GATED else None
                yield Case("jax", peer, mode, "float32", layout, shape, bar, partial(_pair, peer, mode, shape))


def _pair(peer: str, mode: Mode, shape: Shape) -> Pair:
    import jax
    import jax.numpy as jnp

    import bnlayer
    import bnlayer_jax

    x, dy = (jnp.asarray(a) for a in data(shape))
    values = {name: jnp.asarray(value) for name, value in parameters(shape[-1]).items()}
    spec = bnlayer.BatchNormSpec(shape[-1], decay=0.99)
    state = bnlayer.BatchNormState(**values)

    def ours(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        y, after = bnlayer_jax.batch_norm(x, state.replace(gamma=gamma, beta=beta), spec, training=mode != "eval")
        return y, (after.moving_mean, after.moving_variance)

    theirs = (_nnx if peer == "flax.nnx" else _linen)(mode, shape, values)

    def compiled(function: Callable[..., tuple[Any, Any]]) -> Callable[[], tuple[Any, ...]]:
        def step(x: Any, gamma: Any, beta: Any, dy: Any) -> tuple[Any, ...]:
            if mode != "grad":
                y, moved = function(x, gamma, beta)
                return y, moved
            y, back, moved = jax.vjp(function, x, gamma, beta, has_aux=True)
            return y, back(dy)[0], moved

        run = jax.jit(step)
        return lambda: jax.block_until_ready(run(x, values["gamma"], values["beta"], dy))

    calls = compiled(ours), compiled(theirs)

    def results() -> Any:
        return tuple(tuple(jax.device_get(part) for part in call()[:-1]) for call in calls)

    return Pair(calls[0], calls[1], results)


def _linen(mode: Mode, shape: Shape, values: dict[str, Any]) -> Callable[..., tuple[Any, Any]]:
    from flax import linen

    layer = linen.BatchNorm(use_running_average=mode == "eval", momentum=0.99, epsilon=1e-5)
    stats = {"mean": values["moving_mean"], "var": values["moving_variance"]}

    def function(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        variables = {"params": {"scale": gamma, "bias": beta}, "batch_stats": stats}
        y, after = layer.apply(variables, x, mutable=["batch_stats"])
        return y, after

    return function


def _nnx(mode: Mode, shape: Shape, values: dict[str, Any]) -> Callable[..., tuple[Any, Any]]:
    from flax import nnx

    layer = nnx.BatchNorm(shape[-1], use_running_average=mode == "eval", momentum=0.99, epsilon=1e-5, rngs=nnx.Rngs(0))
    graph, start = nnx.split(layer)

    def function(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        layer = nnx.merge(graph, start)
        layer.scale[...], layer.bias[...] = gamma, beta
        layer.mean[...], layer.var[...] = values["moving_mean"], values["moving_variance"]
        y = layer(x)
        return y, (layer.mean[...], layer.var[...])

    return function
