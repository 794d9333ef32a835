"""One step of a JAX library's own batch norm: every call forward in order, backward through all, and once more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bnlayer.contract import Call, NDArray
from bnlayer.spec import BatchNormSpec

from .native_host import NativeHost, Variables


class Gradients(NamedTuple):
    """Of the parameters, by name and over all calls with a `dy`; of x, and its second order, call by call."""

    parameters: Variables
    dx: list[jax.Array | None]
    hvp: list[jax.Array | None]


class _Input(NamedTuple):
    x: jax.Array
    mask: jax.Array | None
    dy: jax.Array | None
    direction: jax.Array | None


def run_step(
    host: NativeHost,
    spec: BatchNormSpec,
    variables: Variables,
    calls: Sequence[Call],
    masks: Sequence[NDArray | None],
    *,
    training: bool,
    keep: bool,
) -> tuple[list[jax.Array], Variables, Gradients]:
    """Each call's y, the variables after, and what came back.

    Args:
        host: whose layer it is.
        spec: what the layer is.
        variables: what it holds.
        calls: one forward pass each.
        masks: of each call, in a shape that broadcasts to x.
        training: whether the batch's statistics normalize.
        keep: the caller keeps the variables from before.
    """
    inputs = [
        _Input(
            jnp.asarray(call.x),
            None if mask is None else jnp.asarray(mask),
            None if call.dy is None else jnp.asarray(call.dy),
            None if call.direction is None else jnp.asarray(call.direction),
        )
        for call, mask in zip(calls, masks, strict=True)
    ]
    ys, after, gradients = _step(host, spec, variables, inputs, training, keep)
    return ys, after, gradients


@partial(jax.jit, static_argnums=(0, 1, 4, 5))
def _step(
    host: NativeHost, spec: BatchNormSpec, variables: Variables, inputs: list[_Input], training: bool, keep: bool
) -> tuple[list[jax.Array], Variables, Gradients]:
    parameters: Variables = {name: value for name, value in variables.items() if name in ("gamma", "beta")}

    def forward(
        parameters: Variables, differentiated: list[jax.Array]
    ) -> tuple[list[jax.Array], tuple[list[jax.Array], Variables]]:
        held, ys, reached, xs = {**variables, **parameters}, [], [], iter(differentiated)
        for given in inputs:
            x = given.x if given.dy is None else next(xs)
            y, after = host.apply(spec, held, x, given.mask, training=training)
            held = held if keep else after
            ys.append(y)
            # A call that no gradient comes back to is left out: 0 times its non-finite values would be NaN.
            if given.dy is not None:
                reached.append(y)
        return reached, (ys, held)

    def backward(xs: list[jax.Array]) -> tuple[tuple[Variables, list[jax.Array]], tuple[list[jax.Array], Variables]]:
        reached, pull, outputs = jax.vjp(forward, parameters, xs, has_aux=True)
        # A library may give another dtype than x's; its cotangent then has that one.
        return pull([dy.astype(y.dtype) for dy, y in zip(dys, reached, strict=True)]), outputs

    asked = [given for given in inputs if given.dy is not None]
    xs, dys = [given.x for given in asked], [given.dy for given in asked if given.dy is not None]
    if not asked:
        _, (ys, after) = forward(parameters, [])
        return ys, after, Gradients({}, [None] * len(ys), [None] * len(ys))
    if any(given.direction is not None for given in asked):
        # The Hessian is symmetric, so its product with the directions is the derivative of dx along them.
        along = [jnp.zeros_like(given.x) if given.direction is None else given.direction for given in asked]
        (gradients, dxs), (_, hvps), (ys, after) = jax.jvp(backward, (xs,), (along,), has_aux=True)
    else:
        (gradients, dxs), (ys, after) = backward(xs)
        hvps = [None] * len(dxs)
    dx, hvp = iter(dxs), iter(hvps)
    return ys, after, Gradients(
        gradients,
        [None if given.dy is None else next(dx) for given in inputs],
        [None if given.dy is None else _wanted(given, next(hvp)) for given in inputs],
    )  # fmt: skip


def _wanted(given: _Input, hvp: jax.Array | None) -> jax.Array | None:
    return None if given.direction is None else hvp
