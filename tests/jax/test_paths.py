"""The ways of computing a call in training: which is taken, and that each computes the same.

The vectors are small, so that a run of the whole suite judges "centered"; here they judge "one-pass", where its sums
may go wrong: all that is numerically hard, the derivatives, the dtypes, and what lies under a mask. What it shares with
"centered", averages and renorm among it, is left to that run: compiling a vector takes most of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from bnlayer import BatchNormSpec, BatchNormState, Renorm  # noqa: E402
from bnlayer_conformance.runner import run_vector  # noqa: E402
from bnlayer_conformance.vector import load  # noqa: E402
from bnlayer_jax import BatchNorm, batch_norm  # noqa: E402
from bnlayer_jax.backend import BACKEND  # noqa: E402
from bnlayer_jax.normalization import dominance, moments  # noqa: E402
from bnlayer_jax.paths import PATHS  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """A path is chosen while tracing: what is compiled already keeps its own."""
    jax.clear_caches()
    yield
    jax.clear_caches()


GROUPS = ("numerics", "nonfinite", "degenerate", "gradients", "second_order", "dtypes", "epsilon", "weights")
ROWS, CHANNELS = 4096, 8
EPSILON, U = 1e-3, 2.0**-24


@pytest.mark.parametrize("group", GROUPS)
def test_vectors_in_one_pass(group: str) -> None:
    with PATHS.forced("one-pass") as taken:
        results = [run_vector(vector, BACKEND) for vector in load(f"{group}/*")]
    assert [f"{r.vector}: {r.reason}" for r in results if r.status != "pass"] == []
    assert taken["one-pass"]
    assert not taken["centered"]


def test_the_vectors_of_a_conformance_run_are_centered() -> None:
    sizes = [int(np.prod(call.x.shape)) for v in load("*") for step in v.steps for call in step.calls]
    assert max(sizes) < ROWS * CHANNELS // 2
    with PATHS.forced() as taken:
        assert run_vector(load("numerics/mean-1e3-image")[0], BACKEND).status == "pass"
    assert set(taken) == {"centered"}


def large(seed: int, mean: float = 0.5) -> Any:
    return np.random.default_rng([77, seed]).normal(mean, 1.0, (ROWS, CHANNELS)).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_pass_is_what_a_large_batch_takes(weighted: bool) -> None:
    weights = np.ones(ROWS, bool) if weighted else None
    with PATHS.forced() as taken:
        jax.eval_shape(lambda x: BatchNorm(BatchNormSpec(CHANNELS))(x, training=True, weights=weights)[0], large(0))
        assert taken == {"one-pass": 1}
        jax.eval_shape(lambda x: BatchNorm(BatchNormSpec(CHANNELS))(x, training=False)[0], large(0))
        assert taken == {"one-pass": 1}  # eval has no statistics to take
        jax.eval_shape(lambda x: BatchNorm(BatchNormSpec(CHANNELS))(x, training=True)[0], large(0)[:64])
    assert taken == {"one-pass": 1, "centered": 1}


def test_one_pass_is_what_the_layers_for_flax_take() -> None:
    nnx, linen = pytest.importorskip("flax.nnx"), pytest.importorskip("flax.linen")
    import bnlayer_jax.linen
    import bnlayer_jax.nnx

    layer = bnlayer_jax.nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))
    module = bnlayer_jax.linen.BatchNorm(use_running_average=False)
    assert isinstance(module, linen.Module)
    with PATHS.forced() as taken:
        layer(jnp.asarray(large(0)))
        variables = module.init(jax.random.key(0), jnp.asarray(large(0)[:2]))
        assert taken == {"one-pass": 1, "centered": 1}
        module.apply(variables, jnp.asarray(large(0)), mutable=["batch_stats"])
    assert taken == {"one-pass": 2, "centered": 1}


def test_replicas_are_always_centered() -> None:
    layer = BatchNorm(BatchNormSpec(CHANNELS, synchronized=True), axis_name="r")
    with PATHS.forced("one-pass") as taken:
        jax.eval_shape(jax.vmap(lambda x: layer(x, training=True)[0], axis_name="r"), large(0).reshape(2, -1, CHANNELS))
    assert not taken


# Both sides of the guard


@pytest.fixture
def taken_in_one_pass() -> Callable[[Any, Any], Any]:
    """shift, rest, variance, y, dx, dgamma of a large batch, in numpy."""

    @jax.jit
    def call(x: Any, dy: Any) -> Any:
        found = moments(x, (0,), np.full((1, 1), ROWS, np.float32), None, None, one_pass=True)
        layer = BatchNorm(BatchNormSpec(CHANNELS, epsilon=EPSILON))
        y, back = jax.vjp(lambda p, x: layer.with_parameters(p)(x, training=True)[0], layer.parameters, x)
        gradients, dx = back(dy)
        return *found, y, dx, gradients["gamma"]

    return lambda x, dy: jax.device_get(call(x, dy))


def exact(x: Any, dy: Any) -> tuple[Any, ...]:
    """m, v, y, dx, dgamma in double precision, and the bounds that the vectors have for each."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    m, v = x.mean(0), x.var(0)
    sd = np.sqrt(v + EPSILON)
    xhat = (x - m) / sd
    ku, kappa = (8 + ROWS**0.5) * U, np.sqrt(m**2 + v) / sd
    rho = ku + (ku * kappa) ** 2 / 2
    s1, s2 = dy.mean(0), (dy * xhat).mean(0)
    dx = (dy - s1 - xhat * s2) / sd
    bounds = (
        ku * np.sqrt(m**2 + v),
        ku * v + ku**2 * (m**2 + v),
        ku * (kappa + np.abs(xhat)) + U * np.abs(xhat),
        (ku * (kappa + 2 * np.abs(xhat)) * np.abs(dy).mean(0) * (1 + np.abs(xhat)) + 2 * ku * np.abs(dy)) / sd
        + rho * np.abs(dx),
        (ku * np.abs(dy) * (kappa + 2 * np.abs(xhat))).sum(0),
    )
    return (m, v, xhat, dx, (dy * xhat).sum(0)), bounds


LIMIT = dominance(ROWS) ** 0.5  # in standard deviations


@pytest.mark.parametrize(
    ("means", "dominated"),
    [(0.0, False), (0.9 * LIMIT, False), (1.1 * LIMIT, True), (-1.1 * LIMIT, True), (1e3, True), (1e5, True),
     ((0.0,) * 7 + (1e4,), True)],
)  # fmt: skip
def test_each_side_of_the_guard_is_within_the_bounds(
    taken_in_one_pass: Callable[[Any, Any], Any], means: Any, dominated: bool
) -> None:
    x, dy = large(1, 0.0) + np.float32(means), large(2, 0.1)
    shift, rest, variance, y, dx, dgamma = taken_in_one_pass(x, dy)
    assert bool(shift.any()) is dominated
    got = (shift[0].astype(np.float64) + rest[0], variance[0], y, dx, dgamma)
    for name, value, want, bound in zip(("mean", "variance", "y", "dx", "dgamma"), got, *exact(x, dy), strict=True):
        assert (np.abs(value - want) <= bound).all(), name


@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678, -3.7e9])
def test_a_constant_channel_has_no_variance(taken_in_one_pass: Callable[[Any, Any], Any], value: float) -> None:
    x = large(3)
    x[:, 2] = value
    shift, rest, variance, y, *_ = taken_in_one_pass(x, x)
    assert variance[0, 2] == 0
    assert not y[:, 2].any()
    np.testing.assert_allclose(shift[0, 2] + rest[0, 2], np.float32(value), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_channel(taken_in_one_pass: Callable[[Any, Any], Any], value: float) -> None:
    x, dy = large(4), large(5)
    want = taken_in_one_pass(x, dy)[3:5]
    x[7, 2] = value
    others = np.arange(CHANNELS) != 2
    for got, expected in zip(taken_in_one_pass(x, dy)[3:5], want, strict=True):
        assert np.isnan(got[:, 2]).all()
        np.testing.assert_allclose(got[:, others], expected[:, others], rtol=1e-4, atol=1e-5)


# One pass and centered, in float64, where only a formula can differ


SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ghosts": {"virtual_batch_size": 3, "moving_variance_estimator": "unbiased"},
    "renorm": {"renorm": Renorm(r_max=1.1, d_max=0.1)},
}


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "weights"),
    [("plain", None), ("plain", "real"), ("plain", "mask"), ("ghosts", None), ("ghosts", "real"), ("renorm", None)],
)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_both_paths_have_the_same_derivatives(kind: str, weights: Any, mean: float) -> None:
    rng = np.random.default_rng(5)
    x, slope, along = rng.normal(mean, 1.0, (8, 2, 3)), rng.normal(size=(8, 2, 3)), rng.normal(size=(8, 2, 3))
    w = rng.uniform(0.0, 1.0, (8, 2))
    w[1, 0] = 0.0
    mask = w > 0.3
    spec = BatchNormSpec(3, **SPECS[kind], param_dtype="float64", stats_dtype="float64")
    names = BatchNormState.initial(spec).arrays()
    state = BatchNormState(**{name: rng.uniform(0.5, 1.5, 3) for name in names}, num_updates=2)

    def loss(x: Any, w: Any, gamma: Any, beta: Any) -> Any:
        given = {None: None, "real": w, "mask": mask}[weights]
        y, after = batch_norm(x, state.replace(gamma=gamma, beta=beta), spec, training=True, weights=given)
        return jnp.sum(jnp.sin(y) * slope), (y, after)

    inputs, whole = (x, w, np.ones(3), np.zeros(3)), (along, 0.1 * w, np.ones(3), np.ones(3))

    def everything(*inputs: Any) -> Any:
        gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        (found, aside), (second, _) = jax.jvp(gradient, inputs, whole)
        forward = jax.jvp(lambda *inputs: loss(*inputs)[1][0], inputs, whole)
        return found, aside, second, forward

    results = {}
    for path in PATHS.names:
        jax.clear_caches()
        with PATHS.forced(path) as taken:
            results[path] = jax.jit(everything)(*inputs)
        assert set(taken) == {path}
    for one, centered in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_allclose(one, centered, rtol=1e-8, atol=1e-9)


def test_vmap_takes_each_members_own_side() -> None:
    xs = np.stack([large(6), large(7, 100.0)])
    layer = BatchNorm(BatchNormSpec(CHANNELS))

    def slope(x: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.sin(layer(x, training=True)[0])))(x)

    with PATHS.forced() as taken:
        got = jax.jit(jax.vmap(slope))(xs)
    assert taken == {"one-pass": 1}
    for member, x in zip(got, xs, strict=True):
        np.testing.assert_allclose(member, jax.jit(slope)(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_replica_of_a_mesh_for_itself(check_vma: bool) -> None:
    layer, x = BatchNorm(BatchNormSpec(CHANNELS)), large(8)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    def gradients(x: Any, parameters: Any) -> Any:
        def loss(x: Any, parameters: Any) -> Any:
            return jnp.sum(jnp.sin(layer.with_parameters(parameters)(x, training=True)[0]))

        return jax.grad(loss, argnums=(0, 1))(x, parameters)

    def on_a_shard(x: Any, parameters: Any) -> Any:
        dx, found = gradients(x, parameters)
        return dx, found if check_vma else jax.lax.psum(found, "data")

    specs = (P("data"), P())
    sharded = jax.shard_map(on_a_shard, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma)
    with PATHS.forced() as taken:
        got = jax.jit(sharded)(x, layer.parameters)
    assert taken == {"one-pass": 1}
    want = jax.jit(gradients)(x, layer.parameters)
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_outside_of_jit_nothing_is_compiled_again() -> None:
    layer, x = BatchNorm(BatchNormSpec(CHANNELS)), jnp.asarray(large(9))
    compiled: list[str] = []

    def listener(event: str, _: float, **__: Any) -> None:
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        layer(x, training=True)
        assert any("compile" in event for event in compiled)
        compiled.clear()
        layer(x, training=True)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
