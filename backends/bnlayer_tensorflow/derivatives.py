"""Gradients by a formula of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

Tensors = Sequence[tf.Tensor]


def differentiable(
    forward: Callable[..., tuple[Tensors, Tensors]], backward: Callable[..., Tensors], sources: Tensors
) -> tuple[tf.Tensor, ...]:
    """What `forward` computes, with the gradient that `backward` computes.

    The second derivative, and forward mode, are those of `backward` by plain autodiff; so all that it uses has to
    depend on the sources, and on what was kept, as the operations say. There is no derivative by hand of a derivative
    by hand: TensorFlow does not find its tensors once a graph is taken of a graph.

    Args:
        forward: of the sources: y and what else is a result, and what `backward` needs beside the sources.
        backward: of dy, what `forward` kept, and the sources: the gradient of each source.
        sources: what y depends on.

    Returns:
        y, and the other results; only y has a gradient.
    """

    @tf.custom_gradient
    def computed(*sources: tf.Tensor) -> Any:
        results, kept = forward(*sources)
        return tuple(results), lambda dy, *_: tuple(backward(dy, kept, *sources))

    y, *others = computed(*sources)
    return y, *(tf.stop_gradient(other) for other in others)
