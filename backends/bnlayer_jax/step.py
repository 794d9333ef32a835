"""One step of a layer as a compiled function: every call forward in order, then one backward pass through all, and the
derivative of that where a call has a direction; on one replica, or on several."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .layer import BatchNorm

AXIS = "replicas"
# What takes a step's time is compiling it. Without LLVM's optimizations (XLA's own stay) that is a third faster.
_COMPILER_OPTIONS = {"cpu": {"xla_backend_optimization_level": 0}}


class StepInput(NamedTuple):
    """One call's arrays; `weights` get a gradient, `mask` does not; at most one of the two is given. Nor does
    `adjustment`. `present` is False in rows that only fill up a replica; None: there are none."""

    x: Any
    weights: Any
    mask: Any
    dy: Any
    adjustment: tuple[Any, Any] | None
    direction: Any
    present: Any


class StepGradients(NamedTuple):
    """Gradients over all calls with a `dy`: of the parameters by name, and of x and the weights call by call; and the
    second order of those with a direction, of x."""

    parameters: dict[str, jax.Array]
    calls: list[tuple[jax.Array, jax.Array | None]]
    second: list[jax.Array | None]


Clips = dict[str, float | None] | None
StepResult = tuple[list[jax.Array], BatchNorm, StepGradients]


def run_step(
    layer: BatchNorm, inputs: list[StepInput], clips: Clips, platform: str, *, training: bool, update_stats: bool
) -> StepResult:
    """Each call's y, the layer after, and the gradients of sum(dy y) over the calls that have a `dy`."""
    result: StepResult = _compiled(platform, training, update_stats)(layer, inputs, clips)
    return result


def run_replicas(
    layers: BatchNorm,
    inputs: list[StepInput],
    clips: Clips,
    platform: str,
    *,
    mesh: Mesh | None,
    training: bool,
    update_stats: bool,
) -> StepResult:
    """The same on several replicas at a time: all that goes in and comes out has an axis of replicas in front.

    Args:
        layers: the replicas' layers, whose axis name is `AXIS`.
        inputs: of each call.
        clips: of all.
        platform: to run on.
        mesh: over the axis `AXIS`, one device a replica; None: all on one device, by `jax.vmap`.
        training: as for `run_step`.
        update_stats: as for `run_step`.
    """
    result: StepResult = _compiled_for_replicas(platform, mesh, training, update_stats)(layers, inputs, clips)
    return result


@cache
def _compiled(platform: str, training: bool, update_stats: bool) -> Any:
    step = partial(_step, training=training, update_stats=update_stats)
    return jax.jit(step, compiler_options=_COMPILER_OPTIONS.get(platform))


@cache
def _compiled_for_replicas(platform: str, mesh: Mesh | None, training: bool, update_stats: bool) -> Any:
    step = partial(_step, training=training, update_stats=update_stats)

    def on_a_shard(layers: BatchNorm, inputs: list[StepInput], clips: Clips) -> Any:
        layer, own = jax.tree.map(lambda array: array[0], (layers, inputs))
        return jax.tree.map(lambda array: array[None], step(layer, own, clips))

    of_each, of_all = PartitionSpec(AXIS), PartitionSpec()  # type: ignore[no-untyped-call]
    if mesh is None:
        mapped: Any = jax.vmap(step, in_axes=(0, 0, None), axis_name=AXIS)
    else:
        mapped = jax.shard_map(on_a_shard, mesh=mesh, in_specs=(of_each, of_each, of_all), out_specs=of_each)
    return jax.jit(mapped, compiler_options=_COMPILER_OPTIONS.get(platform))


def _step(layer: BatchNorm, inputs: list[StepInput], clips: Clips, *, training: bool, update_stats: bool) -> StepResult:
    reached = [call for call in inputs if call.dy is not None]

    def forward(
        parameters: dict[str, jax.Array], differentiated: list[tuple[jax.Array, jax.Array | None]]
    ) -> tuple[list[jax.Array], tuple[list[jax.Array], BatchNorm]]:
        after, ys, answered, given = layer.with_parameters(parameters), [], [], iter(differentiated)
        for call in inputs:
            x, weights = (call.x, call.weights) if call.dy is None else next(given)
            y, after = after(
                x,
                training=training,
                weights=_of_present(call.mask if weights is None else weights, call.present),
                update_stats=update_stats,
                adjustment=call.adjustment,
                renorm_clips=clips,
            )
            ys.append(y)
            # A call that no gradient comes back to is left out: 0 times its non-finite values would be NaN.
            if call.dy is not None:
                answered.append(y)
        return answered, (ys, after)

    def backward(xs: list[jax.Array]) -> tuple[Any, tuple[list[jax.Array], BatchNorm]]:
        differentiated = [(x, call.weights) for x, call in zip(xs, reached, strict=True)]
        _, pull, aside = jax.vjp(forward, layer.parameters, differentiated, has_aux=True)
        return pull([call.dy for call in reached]), aside

    xs = [call.x for call in reached]
    second: list[jax.Array | None] = [None] * len(xs)
    if any(call.direction is not None for call in reached):
        # No gradient passes from one call to another, so one derivative along all the directions has each call's.
        along = [jnp.zeros_like(call.x) if call.direction is None else call.direction for call in reached]
        (parameters, calls), (_, change), aside = jax.jvp(backward, (xs,), (along,), has_aux=True)
        second = [dx if call.direction is not None else None for call, (dx, _) in zip(reached, change, strict=True)]
    else:
        (parameters, calls), aside = backward(xs)
    ys, after = aside
    return ys, after, StepGradients(parameters, calls, second)


def _of_present(weights: Any, present: Any) -> Any:
    """The weights, 0 in the rows that are not there."""
    if present is None or weights is None:
        return present if weights is None else weights
    # In each of the forms that weights have, the rows are the first axis, or that is 1 for all.
    return jnp.where(present.reshape(-1, *(1,) * (weights.ndim - 1)), weights, 0)
