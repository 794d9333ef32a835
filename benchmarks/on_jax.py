"""JAX: our Flax modules under jit against Flax's, and what those do not have against our own plain call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from .cases import IMAGES, MODES, ROWS, Case, Mode, NDArray, Pair, Shape, data, parameters
from .options import OPTIONS, Option

_BARS: Final = {"eval": 1.0, "train": 1.10, "grad": 0.80}
_GATED: Final = {(64, 14, 14, 256), (128, 7, 7, 512), (65536, 64)}  # the others take too little time, or memory's luck
_EPSILON: Final = 1e-5

Normalize = Callable[[Any, Any, Any], tuple[Any, Any]]  # x, gamma and beta to y and the moving statistics


def cases(device: str = "cpu") -> Iterator[Case]:
    """Channels last; on a device that is not the CPU without bars."""
    gated = device == "cpu"
    for peer in ("flax.nnx", "flax.linen"):
        for shape in (*IMAGES, *ROWS):
            for mode in MODES:
                bar = _BARS[mode] if gated and shape in _GATED else None
                yield _against_flax(device, peer, mode, shape, bar)
    for option in OPTIONS:
        for shape in (*IMAGES, *ROWS):
            for mode in option.modes:
                bar = option.bar(mode) if gated and shape in _GATED else None
                make = partial(_option_pair, device, mode, shape, option)
                layout = f"{layout_of(shape)}, {option.name}"
                yield Case("jax", "ours, plain", mode, "float32", layout, shape, bar, make)
    for shape in ((64, 14, 14, 256), (65536, 64)):
        for mode in MODES:
            yield _against_flax(device, "flax.linen", mode, shape, None, dtype="bfloat16")
            yield _against_flax(device, "flax.linen", mode, shape, None, mean=1e3)


def layout_of(shape: Shape) -> str:
    """Channels last."""
    return "NHWC" if len(shape) == 4 else "NC"


def _against_flax(
    device: str, peer: str, mode: Mode, shape: Shape, bar: float | None, *, dtype: str = "float32", mean: float = 0.5
) -> Case:
    # Flax's usual variance, mean(x^2) - mean(x)^2, is no result to compare with under such a mean; its other one is.
    accurate = mean == 1e3
    layout = f"{layout_of(shape)}, mean 1e3, use_fast_variance=False" if accurate else layout_of(shape)
    return Case(
        "jax", peer, mode, dtype, layout, shape, bar, partial(_flax_pair, device, peer, mode, shape, dtype, mean)
    )


def _flax_pair(device: str, peer: str, mode: Mode, shape: Shape, dtype: str, mean: float) -> Pair:
    arrays = on(device, *data(shape, mean=mean), dtype=dtype)
    values = parameters(shape[-1])
    if peer == "flax.nnx":
        import flax.nnx

        import bnlayer_jax.nnx

        kinds, make = (bnlayer_jax.nnx.BatchNorm, flax.nnx.BatchNorm), _nnx
    else:
        import flax.linen

        import bnlayer_jax.linen

        kinds, make = (bnlayer_jax.linen.BatchNorm, flax.linen.BatchNorm), _linen
    options = {
        "use_running_average": mode == "eval", "momentum": 0.99, "epsilon": _EPSILON, "dtype": dtype,
        "use_fast_variance": mean != 1e3,
    }  # fmt: skip
    calls = [_compiled(make(kind, shape[-1], options, values), mode, device, *arrays, values) for kind in kinds]
    # Of x itself the roundings are 1e-4 at a mean of 1e3.
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-3 if mean == 1e3 else 1e-4
    return Pair(*calls, lambda: tuple(flat(call()) for call in calls), tolerance, calls[0].memory)


def _linen(kind: Any, _: int, options: Mapping[str, Any], values: Mapping[str, NDArray]) -> Normalize:
    layer = kind(**options)
    stats = {"mean": values["moving_mean"], "var": values["moving_variance"]}

    def function(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        y, after = layer.apply(
            {"params": {"scale": gamma, "bias": beta}, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return y, (after["batch_stats"]["mean"], after["batch_stats"]["var"])

    return function


def _nnx(kind: Any, channels: int, options: Mapping[str, Any], values: Mapping[str, NDArray]) -> Normalize:
    from flax import nnx

    def function(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        layer = kind(channels, **options, rngs=nnx.Rngs(0))  # at this trace's level, where it can be changed
        layer.scale[...], layer.bias[...] = gamma, beta
        layer.mean[...], layer.var[...] = values["moving_mean"], values["moving_variance"]
        y = layer(x)
        return y, (layer.mean[...], layer.var[...])

    return function


def _option_pair(device: str, mode: Mode, shape: Shape, option: Option) -> Pair:
    import bnlayer

    arrays, values, weights = data(shape), parameters(shape[-1]), option.weights(shape, -1)
    plain = bnlayer.BatchNormSpec(shape[-1], epsilon=_EPSILON)
    placed = on(device, *arrays)
    ours, peer = (
        _compiled(_function(spec, mode, values), mode, device, *placed, values, *given)
        for spec, given in (
            (plain.replace(**option.fields(shape[0])), () if weights is None else (weights,)),
            (plain, ()),
        )
    )

    def results() -> Any:
        want = option.right(mode, arrays, values, _EPSILON, -1)
        return flat(ours())[: len(want)], want

    return Pair(ours, peer, results, memory=ours.memory)


def _function(spec: Any, mode: Mode, values: Mapping[str, NDArray]) -> Callable[..., tuple[Any, Any]]:
    import bnlayer
    import bnlayer_jax.state

    state = bnlayer_jax.state.owned(bnlayer.BatchNormState(**values), spec)

    def function(x: Any, gamma: Any, beta: Any, weights: Any = None) -> tuple[Any, Any]:
        y, after = bnlayer_jax.batch_norm(
            x, state.replace(gamma=gamma, beta=beta), spec, training=mode != "eval", weights=weights
        )
        return y, (after.moving_mean, after.moving_variance)

    return function


def _compiled(
    function: Callable[..., tuple[Any, Any]], mode: Mode, device: str, x: Any, dy: Any, values: Mapping[str, NDArray],
    *rest: NDArray,
) -> Repeated:  # fmt: skip
    """What is timed: y first, then in mode "grad" dx, dgamma and dbeta, then the moving statistics."""
    import jax

    def step(x: Any, gamma: Any, beta: Any, dy: Any, *rest: Any) -> tuple[Any, ...]:
        if mode != "grad":
            return function(x, gamma, beta, *rest)
        y, back, moved = jax.vjp(lambda *inputs: function(*inputs, *rest), x, gamma, beta, has_aux=True)
        return y, *back(dy), moved

    gamma, beta, *rest = on(device, values["gamma"], values["beta"], *rest)
    return Repeated(step, (x, gamma, beta, dy, *rest))


class Repeated:
    """A compiled step that writes its results where the last call's were; they are its own until the next call.

    Fresh memory for them would take longer than what is measured, and at each call another time: the system gives a
    page of it at its first touch.
    """

    def __init__(self, step: Callable[..., tuple[Any, ...]], inputs: tuple[Any, ...]) -> None:
        import jax

        self._inputs = inputs
        self._last = jax.jit(step)(*inputs)
        self._run = jax.jit(lambda inputs, _: step(*inputs), donate_argnums=1, keep_unused=True)

    def __call__(self) -> tuple[Any, ...]:
        import jax

        self._last = jax.block_until_ready(self._run(self._inputs, self._last))
        return self._last

    def memory(self) -> int:
        """The bytes of the results and of what lies between, as the compiler laid them out."""
        found = self._run.lower(self._inputs, self._last).compile().memory_analysis()
        return int(found.temp_size_in_bytes + found.output_size_in_bytes)


def on(device: str, *arrays: NDArray, dtype: str | None = None) -> list[Any]:
    """JAX's arrays on the first device of this kind."""
    import jax
    import jax.numpy as jnp

    return [jax.device_put(jnp.asarray(array, dtype), jax.devices(device)[0]) for array in arrays]


def flat(results: tuple[Any, ...]) -> tuple[NDArray, ...]:
    """The arrays of a tree, in NumPy and float32."""
    import jax

    return tuple(np.asarray(part, np.float32) for part in jax.tree.leaves(results))
