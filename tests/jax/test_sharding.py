"""Statistics over several replicas: a mapped axis, a mesh of devices, and arrays that jit finds spread over devices.

What needs devices runs in a process of its own with four virtual ones (`test_in_a_process_with_four_devices`); a mapped
axis on one device, by vmap, says the rest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import bnlayer_jax.step  # noqa: E402
from bnlayer import BatchNormSpec, BatchNormState, InputError  # noqa: E402
from bnlayer.contract import Call, Request  # noqa: E402
from bnlayer_conformance.runner import run_vector  # noqa: E402
from bnlayer_conformance.vector import load  # noqa: E402
from bnlayer_jax import BatchNorm, batch_norm  # noqa: E402
from bnlayer_jax.backend import BACKEND  # noqa: E402
from bnlayer_jax.replicas import padded  # noqa: E402
from bnlayer_numpy.backend import BACKEND as NUMPY  # noqa: E402

SPEC = BatchNormSpec(
    3,
    epsilon=1e-3,
    moving_variance_estimator="unbiased",
    synchronized=True,
    param_dtype="float64",
    stats_dtype="float64",
)
ALONE = SPEC.replace(synchronized=False)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
VECTORS = load("synchronized/*")


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh() -> Any:
    if jax.device_count() < 4:
        pytest.skip("needs four devices; test_in_a_process_with_four_devices runs it there")
    return Mesh(np.array(jax.devices()[:3]), ("data",))


def test_in_a_process_with_four_devices() -> None:
    if jax.device_count() >= 4:
        pytest.skip("this process has four devices")
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    names = [name for name, test in globals().items() if "mesh" in getattr(test, "__annotations__", ())]
    tests = [f"{__file__}::{name}" for name in names if name.startswith("test_")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > len(VECTORS)


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng([31, seed])
    return [rng.normal(1.0, 2.0, shape) for shape in shapes]


def layer_of(spec: BatchNormSpec, axis_name: Any = None) -> BatchNorm:
    gamma, beta, mean, spread = arrays(0, *[(3,)] * 4)
    state: Any = BatchNormState(
        gamma=gamma, beta=beta, moving_mean=mean, moving_variance=np.exp(spread / 4), num_updates=3
    )
    return BatchNorm(spec, state, axis_name=axis_name)


def assert_close(got: Any, want: Any, rtol: float = 1e-11) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a).reshape(np.shape(b)), b, rtol=rtol, atol=1e-12)


def first(tree: Any) -> Any:
    """What a replica has, all having the same."""
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], tree)


def split(array: Any, number: int = 3) -> Any:
    return None if array is None else array.reshape(number, -1, *array.shape[1:])


def count(compiled: Any) -> dict[str, int]:
    """The collectives in a compiled program, by name."""
    text = compiled.as_text()
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {name: number for name, number in found.items() if number}


# A mapped axis, by vmap


@pytest.mark.parametrize("kind", ["plain", "mask", "weights", "a replica without weight", "no weight"])
def test_replicas_are_one_batch_to_second_order(kind: str) -> None:
    x, slope, dx = arrays(1, *[(12, 2, 3)] * 3)
    (weights,) = np.abs(arrays(2, (12, 2)))
    weights[0, 1] = 0.0
    if kind == "a replica without weight":
        weights[:4] = 0.0
    given: Any = {"plain": None, "mask": weights > 1.0, "no weight": np.zeros(12)}.get(kind, weights)
    real = given is not None and given.dtype != bool

    def loss(x: Any, w: Any, parameters: Any, slope: Any, layer: BatchNorm) -> Any:
        y, after = layer.with_parameters(parameters)(x, training=True, weights=w if real else given_for(w))
        return jnp.sum(jnp.sin(y) * slope), (y, after.state)

    def given_for(w: Any) -> Any:
        return None if given is None else w > 0.5

    def everything(x: Any, w: Any, slope: Any, dx: Any, layer: BatchNorm) -> Any:
        gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        gradients, aside = gradient(x, w, layer.parameters, slope, layer)
        _, second = jax.jvp(lambda x: gradient(x, w, layer.parameters, slope, layer)[0], (x,), (dx,))
        return aside, gradients, second

    w = np.zeros((12, 2)) if given is None else np.asarray(given, np.float64)
    (y, state), gradients, second = jax.jit(everything)(x, w, slope, dx, layer_of(ALONE))
    each = jax.jit(jax.vmap(everything, in_axes=(0, 0, 0, 0, None), axis_name="data"))
    (ys, states), parts, seconds = each(*map(split, (x, w, slope, dx)), layer_of(SPEC, "data"))
    assert_close(ys, y)
    assert_close(first(states), state)
    for of_each, of_all in ((parts, gradients), (seconds, second)):
        assert_close(of_each[0], of_all[0])
        assert_close(of_each[1], of_all[1], rtol=1e-9)
        assert_close(jax.tree.map(lambda part: part.sum(0), of_each[2]), of_all[2], rtol=1e-9)


def test_forward_mode_goes_through_the_replicas_too() -> None:
    x, dx, slope = arrays(3, *[(4, 3)] * 3)

    def loss(ys: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: jnp.sum(jnp.sin(ys(x)) * slope)

    def one(x: Any) -> Any:
        return layer_of(ALONE)(x, training=True)[0]

    def two(x: Any) -> Any:
        call = jax.vmap(lambda x: layer_of(SPEC, "data")(x, training=True)[0], axis_name="data")
        return call(split(x, 2)).reshape(x.shape)

    def derivatives(ys: Callable[[Any], Any]) -> Any:
        return jax.jit(lambda x: (jax.jvp(ys, (x,), (dx,)), jax.hessian(loss(ys))(x), jax.jacfwd(jax.jacrev(ys))(x)))(x)

    assert_close(derivatives(two), derivatives(one), rtol=1e-9)


def test_one_dominant_weight_among_replicas_leaves_the_unbiased_variance_right() -> None:
    spec = SPEC.replace(decay=0.0, num_features=1, param_dtype="float32", stats_dtype="float32")
    x, weights = np.float32([[1.0], [2.0], [4.0]]), np.float32([1.0, 1e-9, 1e-10])
    with jax.enable_x64(False):
        call = jax.vmap(lambda x, w: BatchNorm(spec, axis_name="r")(x, training=True, weights=w)[1], axis_name="r")
        got = first(jax.jit(call)(x[:, None], weights[:, None])).state.moving_variance
    want = NUMPY.step(
        NUMPY.build(spec.replace(synchronized=False)), Request((Call(x, weights=weights),), training=True)
    )
    np.testing.assert_allclose(got, want[1].state.moving_variance, rtol=1e-5)


def test_a_wrong_weight_on_one_replica_is_seen_on_all() -> None:
    (x,) = arrays(4, (3, 4, 3))
    weights = np.ones((3, 4))
    weights[1, 2] = np.nan
    call = jax.vmap(lambda layer, x, w: layer(x, training=True, weights=w), in_axes=(None, 0, 0), axis_name="r")
    ys, after = jax.jit(call)(layer_of(SPEC, "r"), x, weights)
    assert np.isnan(ys).all()
    assert np.isnan(after.state.moving_mean).all()


@pytest.mark.parametrize("value", [0.1, 12345.678, -3.7e9])
def test_a_channel_that_is_constant_everywhere_has_no_variance(value: float) -> None:
    spec = BatchNormSpec(1, decay=0.0, epsilon=0.0, synchronized=True)
    x = np.full((3, 7, 10, 1), value, np.float32)
    with jax.enable_x64(False):
        call = jax.vmap(lambda x: BatchNorm(spec, axis_name="r")(x, training=True)[1], axis_name="r")
        variance = float(first(jax.jit(call)(x)).state.moving_variance[0])
    assert 0.0 <= variance <= abs(value) ** 2 * 2.0**-48


def test_several_axes_count_as_one() -> None:
    (x,) = arrays(5, (12, 3))
    y, after = layer_of(ALONE)(x, training=True)
    inner = jax.vmap(lambda x: layer_of(SPEC, ("a", "b"))(x, training=True), axis_name="b")
    ys, afters = jax.jit(jax.vmap(inner, axis_name="a"))(x.reshape(2, 3, 2, 3))
    assert_close(ys, y)
    assert_close(first(first(afters)).state, after.state)


def test_without_an_axis_a_synchronized_layer_is_one_replica() -> None:
    (x,) = arrays(6, (3, 4, 3))
    ys = jax.jit(jax.vmap(lambda x: layer_of(SPEC)(x, training=True)[0], axis_name="data"))(x)
    for y, own in zip(ys, x, strict=True):
        assert_close(y, layer_of(ALONE)(own, training=True)[0])


def test_an_axis_that_does_not_fit_is_refused() -> None:
    (x,) = arrays(7, (4, 3))
    for make in (
        lambda: BatchNorm(ALONE, axis_name="data"),
        lambda: layer_of(ALONE).replace(axis_name="data"),
        lambda: batch_norm(x, layer_of(ALONE).state, ALONE, training=False, axis_name="data"),
    ):
        with pytest.raises(InputError, match="needs a synchronized layer"):
            make()
    with pytest.raises(InputError, match="no mapped axis here"):
        layer_of(SPEC, "data")(x, training=True)
    y, _ = layer_of(SPEC, "data")(x, training=False)  # eval asks nobody
    frozen, _ = layer_of(SPEC, "data").replace(frozen_statistics=True)(x, training=True)
    np.testing.assert_array_equal(y, frozen)


def test_one_value_is_counted_over_all_replicas() -> None:
    def call(x: Any) -> Any:
        return jax.jit(jax.vmap(lambda x: layer_of(SPEC, "data")(x, training=True)[0], axis_name="data"))(x)

    (x,) = arrays(8, (3, 1, 3))
    assert_close(call(x), layer_of(ALONE)(x.reshape(3, 3), training=True)[0])
    with pytest.raises(InputError, match=r"\(1, 3\) on each of 1 replicas"):
        call(x[:1])


def test_rows_are_padded_for_replicas_that_have_fewer() -> None:
    x, present = padded(np.ones((2, 3), np.float32), 4)
    assert isinstance(x, np.ndarray)
    assert (x.shape, x.dtype, present.tolist()) == ((4, 3), np.float32, [True, True, False, False])
    traced = jax.eval_shape(lambda x: padded(x, 4)[0], jax.ShapeDtypeStruct((0, 3), jnp.bfloat16))
    assert (traced.shape, traced.dtype) == ((4, 3), jnp.bfloat16)
    with pytest.raises(InputError, match="at most so many; got 2"):
        padded(np.ones((2, 3)), 1)


def test_a_step_on_more_replicas_than_devices_runs_by_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = arrays(9, (11, 2, 3), (11, 2, 3))
    weights = np.abs(arrays(10, (1, 2))[0])  # for all rows alike: its gradient is the replicas' sum
    meshes = spied_meshes(monkeypatch)
    shards = (2, 1, 0, 3, 2, 0, 1, 1, 1)  # one row among them: its weights' one row is for all rows nevertheless
    layer, got = BACKEND.step(
        BACKEND.build(SPEC), Request((Call(x, dy=dy, weights=weights),), training=True, shards=shards)
    )
    assert meshes == [None]
    reference = Request((Call(x, dy=dy, weights=weights),), training=True)
    _, want = NUMPY.step(NUMPY.build(ALONE), reference)
    for name in ("y", "dx", "dweights"):
        assert_close(getattr(got.calls[0], name), getattr(want.calls[0], name), rtol=1e-9)
    assert_close((got.dgamma, got.dbeta, got.state), (want.dgamma, want.dbeta, want.state))
    assert_close(BACKEND.extract(layer)[1], want.state)
    assert layer.axis_name is None


def spied_meshes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    meshes: list[Any] = []
    run: Callable[..., Any] = bnlayer_jax.step.run_replicas

    def spy(*args: Any, **options: Any) -> Any:
        meshes.append(options["mesh"])
        return run(*args, **options)

    monkeypatch.setattr(bnlayer_jax.step, "run_replicas", spy)
    return meshes


# A mesh of devices


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_vectors_over_a_mesh(mesh: Any, vector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    meshes = spied_meshes(monkeypatch)
    with jax.enable_x64(False):
        result = run_vector(vector, BACKEND)
    assert result.status == "pass", result.reason
    sharded = [step.shards for step in vector.steps if step.shards is not None]
    assert [m.size for m in meshes] == [len(s) for s in sharded if vector.result == "valid"]


def train_step(layer: BatchNorm, x: Any, target: Any, weights: Any) -> Any:
    """One step of gradient descent on a sum of losses; over replicas, the parameters are the same on all."""

    def loss(parameters: Any) -> Any:
        y, after = layer.with_parameters(parameters)(x, training=True, weights=weights)
        there = 1.0 if weights is None else weights[:, None, None]
        return jnp.sum(there * (jnp.tanh(y) - target) ** 2), after

    gradients, after = jax.grad(loss, has_aux=True)(layer.parameters)
    return gradients, after


def descend(layer: BatchNorm, gradients: Any) -> BatchNorm:
    return layer.with_parameters({name: p - 0.01 * gradients[name] for name, p in layer.parameters.items()})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("check_vma", [True, False])
def test_data_parallel_training_is_training_on_the_whole_batch(mesh: Any, masked: bool, check_vma: bool) -> None:
    xs, targets = arrays(11, (4, 12, 2, 3), (4, 12, 2, 3))
    present = np.arange(12) % 4 < np.array([4, 1, 0])[np.arange(12) // 4] if masked else None

    def step(layer: BatchNorm, x: Any, target: Any, weights: Any) -> BatchNorm:
        gradients, after = train_step(layer, x, target, weights)
        if not check_vma:  # with it, JAX sums the gradients of what is the same on all replicas
            gradients = jax.lax.psum(gradients, "data")
        return descend(after, gradients)

    rows = P("data")
    parallel = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), rows, rows, P() if present is None else rows),
            out_specs=P(),  # with check_vma, JAX proves that parameters and statistics are the same on all replicas
            check_vma=check_vma,
        )
    )
    ours, reference = layer_of(SPEC, "data"), layer_of(ALONE)
    for x, target in zip(xs, targets, strict=True):
        ours = parallel(ours, x, target, present)
        own = slice(None) if present is None else present
        gradients, after = train_step(reference, x[own], target[own], None)
        reference = descend(after, gradients)
    assert_close(ours.state, reference.state)
    assert int(ours.state.num_updates) == 7


def test_scan_over_steps_inside_a_mesh(mesh: Any) -> None:
    (xs,) = arrays(12, (4, 12, 3))

    def steps(layer: BatchNorm, xs: Any) -> Any:
        return jax.lax.scan(lambda layer, x: layer(x, training=True)[::-1], layer, xs)

    sharded = jax.shard_map(steps, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=(P(), P(None, "data")))
    after, ys = jax.jit(sharded)(layer_of(SPEC, "data"), xs)
    want, reference = steps(layer_of(ALONE), xs)
    assert_close((after.state, ys), (want.state, reference))


@pytest.mark.parametrize(("weights", "forward"), [(None, 2), (bool, 2), (np.float64, 3)])
def test_how_many_collectives_there_are(mesh: Any, weights: Any, forward: int) -> None:
    (x,) = arrays(13, (12, 3))
    w = None if weights is None else np.arange(12).astype(weights)
    specs = (P("data"), P("data") if w is not None else P())

    def call(x: Any, w: Any, training: bool) -> Any:
        return layer_of(SPEC, "data")(x, training=training, weights=w)

    def compiled(function: Any, out: Any) -> dict[str, int]:
        return count(jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)).lower(x, w).compile())

    assert compiled(lambda x, w: call(x, w, True), (P("data"), P())) == {"all-reduce": forward}
    backward = jax.grad(lambda x, w: jnp.sum(call(x, w, True)[0] ** 3))
    assert compiled(backward, P("data")) == {"all-reduce": forward + 1}
    assert compiled(lambda x, w: call(x, w, False), (P("data"), P())) == {}
    assert compiled(jax.grad(lambda x, w: jnp.sum(call(x, w, False)[0] ** 3)), P("data")) == {}


def test_pmap_has_a_mapped_axis_as_well(mesh: Any) -> None:
    (x,) = arrays(14, (12, 3))
    y, after = layer_of(ALONE)(x, training=True)
    call = jax.pmap(lambda x: layer_of(SPEC, "data")(x, training=True), axis_name="data", devices=mesh.devices.tolist())
    ys, afters = call(split(x))
    assert_close(ys, y)
    assert_close(jax.tree.map(lambda leaf: leaf[0], afters).state, after.state)


# Arrays that are spread over devices, under jit


@pytest.mark.parametrize("spec", [ALONE, SPEC], ids=["alone", "synchronized"])
@pytest.mark.parametrize("explicit", [False, True])
def test_under_jit_statistics_are_global_whatever_the_flag_says(mesh: Any, spec: BatchNormSpec, explicit: bool) -> None:
    x, slope = arrays(15, (12, 2, 3), (12, 2, 3))
    layer = layer_of(spec)
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    over = jax.make_mesh((3,), ("data",), axis_types=(kind,), devices=jax.devices()[:3])
    spread, slopes = (jax.device_put(array, NamedSharding(over, P("data"))) for array in (x, slope))
    on_all = jax.device_put(layer, NamedSharding(over, P()))

    def loss(x: Any, layer: BatchNorm, slope: Any) -> Any:
        y, after = layer(x, training=True)
        return jnp.sum(jnp.sin(y) * slope), (y, after.state)

    step = jax.jit(jax.grad(loss, has_aux=True)).lower(spread, on_all, slopes).compile()
    assert count(step)["all-reduce"] >= 1
    assert_close(step(spread, on_all, slopes), jax.grad(loss, has_aux=True)(x, layer_of(ALONE), slope))
    evaluate = jax.jit(lambda x, layer: layer(x, training=False)[0]).lower(spread, on_all).compile()
    assert count(evaluate) == {}
    y = evaluate(spread, on_all)
    assert y.sharding.is_equivalent_to(spread.sharding, y.ndim)
    assert_close(y, layer(x, training=False)[0])
