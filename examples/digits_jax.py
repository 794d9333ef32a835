"""Handwritten digits in plain JAX: a dense and a convolutional network with bnlayer's batch norm.

    python examples/digits_jax.py

`bnlayer_jax.BatchNorm` is a pytree: a call returns y and the layer after, and its parameters come out as a dict to
differentiate. Gradient descent is written out below; any optimizer that takes pytrees does as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np

from bnlayer import BatchNormSpec
from bnlayer_jax import BatchNorm

Parameters = dict[str, Any]  # "kernels", the last one's "bias", and gamma and beta of every batch norm in "norms"
Norms = tuple[BatchNorm, ...]


def start(shapes: tuple[tuple[int, ...], ...]) -> tuple[Parameters, Norms]:
    """The examples' first kernels, and new batch norms: torch's, said as a spec, with the channels last."""
    kernels = [jnp.asarray(kernel) for kernel in digits.first_kernels(shapes)]
    specs = [BatchNormSpec.from_dialect("torch", num_features=shape[-1]).replace(axis=-1) for shape in shapes[:-1]]
    norms = tuple(BatchNorm(spec) for spec in specs)
    return {"kernels": kernels, "bias": jnp.zeros(10), "norms": [norm.parameters for norm in norms]}, norms


def forward(parameters: Parameters, norms: Norms, x: jax.Array, training: bool) -> tuple[jax.Array, Norms]:
    """Logits, and the batch norms after."""
    *kernels, last = parameters["kernels"]
    x = x if kernels[0].ndim == 4 else x.reshape(len(x), -1)
    after = []
    for kernel, norm, learned in zip(kernels, norms, parameters["norms"], strict=True):
        x = convolve(x, kernel) if kernel.ndim == 4 else x @ kernel
        x, norm = norm.with_parameters(learned)(x, training=training)
        x = jax.nn.relu(x)
        after.append(norm)
    features = x.mean(axis=(1, 2)) if x.ndim == 4 else x
    return features @ last + parameters["bias"], tuple(after)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Where the kernel fits whole; channels last."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loss_of(parameters: Parameters, norms: Norms, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Norms]:
    """Mean cross entropy, and the batch norms after."""
    logits, norms = forward(parameters, norms, x, training=True)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean(), norms


@jax.jit
def step(
    parameters: Parameters, velocity: Parameters, norms: Norms, x: jax.Array, y: jax.Array
) -> tuple[Parameters, Parameters, Norms, jax.Array]:
    """One step of gradient descent with momentum."""
    (loss, norms), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters, norms, x, y)
    velocity = jax.tree.map(lambda v, gradient: digits.MOMENTUM * v + gradient, velocity, gradients)
    parameters = jax.tree.map(lambda p, v: p - digits.RATE * v, parameters, velocity)
    return parameters, velocity, norms, loss


@partial(jax.jit, static_argnames="training")
def logits_of(parameters: Parameters, norms: Norms, x: jax.Array, training: bool) -> jax.Array:
    """Logits alone."""
    return forward(parameters, norms, x, training)[0]


def main() -> None:
    """Train both networks and print what they learned."""
    data = digits.load()
    for name, shapes in (("dense", digits.DENSE), ("convolutional", digits.CONVOLUTIONAL)):
        parameters, norms = start(shapes)
        velocity = jax.tree.map(jnp.zeros_like, parameters)
        losses = []
        for x, y in digits.batches(data):
            parameters, velocity, norms, loss = step(parameters, velocity, norms, x, y)
            losses.append(loss)
        trained = partial(logits_of, parameters, norms, training=False)
        digits.report(name, np.array(losses), data, lambda x, trained=trained: np.asarray(trained(x)))


if __name__ == "__main__":
    main()
