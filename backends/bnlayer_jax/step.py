"""One step of a layer as a compiled function: every call forward in order, then one backward pass through all."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax

from .layer import BatchNorm


class StepInput(NamedTuple):
    """One call's arrays; `weights` get a gradient, `mask` does not; at most one of the two is given. Nor does
    `adjustment`."""

    x: jax.Array
    weights: jax.Array | None
    mask: jax.Array | None
    dy: jax.Array | None
    adjustment: tuple[jax.Array, jax.Array] | None


class StepGradients(NamedTuple):
    """Gradients over all calls with a `dy`: of the parameters by name, and of x and the weights call by call."""

    parameters: dict[str, jax.Array]
    calls: list[tuple[jax.Array, jax.Array | None]]


@partial(jax.jit, static_argnames=("training", "update_stats"))
def run_step(
    layer: BatchNorm,
    inputs: list[StepInput],
    clips: dict[str, float | None] | None,
    *,
    training: bool,
    update_stats: bool,
) -> tuple[list[jax.Array], BatchNorm, StepGradients]:
    """Each call's y, the layer after, and the gradients of sum(dy y) over the calls that have a `dy`."""

    def forward(
        parameters: dict[str, jax.Array], differentiated: list[tuple[jax.Array, jax.Array | None]]
    ) -> tuple[list[jax.Array], tuple[list[jax.Array], BatchNorm]]:
        after, ys, reached, given = layer.with_parameters(parameters), [], [], iter(differentiated)
        for call in inputs:
            x, weights = (call.x, call.weights) if call.dy is None else next(given)
            y, after = after(
                x,
                training=training,
                weights=call.mask if weights is None else weights,
                update_stats=update_stats,
                adjustment=call.adjustment,
                renorm_clips=clips,
            )
            ys.append(y)
            # A call that no gradient comes back to is left out: 0 times its non-finite values would be NaN.
            if call.dy is not None:
                reached.append(y)
        return reached, (ys, after)

    differentiated = [(call.x, call.weights) for call in inputs if call.dy is not None]
    _, backward, (ys, after) = jax.vjp(forward, layer.parameters, differentiated, has_aux=True)
    return ys, after, StepGradients(*backward([call.dy for call in inputs if call.dy is not None]))
