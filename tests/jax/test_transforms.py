"""The function and the layer under JAX's transformations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

from bnlayer import BatchNormSpec, BatchNormState, InputError  # noqa: E402
from bnlayer_jax import BatchNorm, batch_norm  # noqa: E402

SPEC = BatchNormSpec(2, axis=1, epsilon=1e-3, param_dtype="float64", stats_dtype="float64")
SHAPE = (3, 2, 2)


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng([21, seed])
    return [rng.normal(size=shape) for shape in shapes]


def layer_of(seed: int, spec: BatchNormSpec = SPEC) -> BatchNorm:
    gamma, beta, mean, spread = arrays(seed, *[(spec.num_features,)] * 4)
    return BatchNorm(
        spec, BatchNormState(gamma=gamma, beta=beta, moving_mean=mean, moving_variance=np.exp(spread), num_updates=3)
    )


def assert_trees_close(got: Any, want: Any, rtol: float = 1e-12) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_jit_changes_nothing(training: bool, weighted: bool) -> None:
    x, w = arrays(0, SHAPE, SHAPE[:1])
    weights = jnp.abs(w) if weighted else None

    def call(layer: BatchNorm, x: Any, weights: Any) -> Any:
        return layer(x, training=training, weights=weights)

    layer = layer_of(0)
    assert_trees_close(jax.jit(call)(layer, x, weights), call(layer, x, weights))


def objective(x: Any, weights: Any, parameters: dict[str, Any], training: bool = True) -> Any:
    """A scalar whose second derivatives are not 0, with a counter and statistics along the way."""
    layer = layer_of(1).with_parameters(parameters)
    y, layer = layer(x, training=training, weights=weights)
    z, _ = layer(jnp.sin(y), training=training)
    (slope,) = arrays(9, SHAPE)
    return jnp.sum(jnp.sin(z + slope) * slope)


def point() -> tuple[Any, Any, dict[str, Any]]:
    x, w = arrays(2, SHAPE, (3, 2))
    weights = np.abs(w)
    weights[1, 0] = 0.0
    return jnp.asarray(x + 1.0), jnp.asarray(weights), layer_of(1).parameters


def numeric(function: Any, value: Any, step: float = 1e-6) -> np.ndarray:
    """Central differences of an array-valued function, one column per element of `value`."""
    flat = np.asarray(value).reshape(-1)
    columns = []
    for i in range(flat.size):
        ahead, behind = flat.copy(), flat.copy()
        ahead[i] += step
        behind[i] -= step
        up, down = (np.asarray(function(jnp.asarray(v.reshape(value.shape)))) for v in (ahead, behind))
        columns.append((up - down).reshape(-1) / (2 * step))
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_x_and_weights(training: bool) -> None:
    x, weights, parameters = point()
    # A weight cannot go below 0, so differences need one above; the analytic formula covers 0 in test_agreement.
    weights = weights + 0.1
    value = jax.jit(lambda x, w: objective(x, w, parameters, training))
    dx, dw = jax.grad(value, argnums=(0, 1))(x, weights)
    np.testing.assert_allclose(dx.reshape(-1), numeric(lambda v: value(v, weights), x)[0], atol=1e-8)
    np.testing.assert_allclose(dw.reshape(-1), numeric(lambda v: value(x, v), weights)[0], atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_hessian_in_x_weights_and_parameters(training: bool) -> None:
    x, weights, parameters = point()
    weights = weights + 0.1
    sizes = [x.size, weights.size, 2, 2]

    def value(flat: Any) -> Any:
        a, b, gamma, beta = jnp.split(flat, np.cumsum(sizes)[:-1])
        return objective(a.reshape(x.shape), b.reshape(weights.shape), {"gamma": gamma, "beta": beta}, training)

    flat = jnp.concatenate([x.reshape(-1), weights.reshape(-1), parameters["gamma"], parameters["beta"]])
    hessian = jax.jit(jax.hessian(value))(flat)
    np.testing.assert_allclose(hessian, numeric(jax.jit(jax.grad(value)), flat), atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-11)


def test_hessian_vector_product_ignores_a_shift_of_x() -> None:
    x, weights, parameters = point()
    gradient = jax.grad(lambda v: objective(v, weights, parameters))
    _, product = jax.jit(lambda v: jax.jvp(gradient, (v,), (jnp.ones_like(v),)))(x)
    np.testing.assert_allclose(product, 0.0, atol=1e-12)


def test_jvp_is_the_transpose_of_vjp() -> None:
    x, weights, parameters = point()
    dx, dw, dy = arrays(4, x.shape, weights.shape, SHAPE)
    layer = layer_of(1).with_parameters(parameters)

    def value(x: Any, weights: Any) -> Any:
        return layer(x, training=True, weights=weights)[0]

    _, tangent = jax.jvp(value, (x, weights), (dx, dw))
    _, backward = jax.vjp(value, x, weights)
    back_x, back_w = backward(dy)
    np.testing.assert_allclose(jnp.vdot(tangent, dy), jnp.vdot(back_x, dx) + jnp.vdot(back_w, dw), rtol=1e-11)


def test_vmap_over_a_batch_of_layers() -> None:
    layers, (xs, ws) = [layer_of(i) for i in range(4)], arrays(5, (4, *SHAPE), (4, 3))
    ws = np.abs(ws)
    ws[2] = 0.0  # one of them has no weight at all
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    got = jax.jit(jax.vmap(lambda layer, x, w: layer(x, training=True, weights=w)))(stacked, xs, ws)
    one_by_one = [layer(x, training=True, weights=w) for layer, x, w in zip(layers, xs, ws, strict=True)]
    assert_trees_close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one))
    assert got[1].state.num_updates.tolist() == [4, 4, 3, 4]


@pytest.mark.parametrize("decay", [0.9, "cumulative"])
def test_scan_over_steps(decay: Any) -> None:
    spec = SPEC.replace(decay=decay, moving_variance_estimator="unbiased")
    (xs,) = arrays(6, (5, *SHAPE))

    def body(layer: BatchNorm, x: Any) -> tuple[BatchNorm, Any]:
        y, layer = layer(x, training=True)
        return layer, y

    layer, want = layer_of(0, spec), []
    after, ys = jax.lax.scan(body, layer, xs)
    for x in xs:
        layer, y = body(layer, x)
        want.append(y)
    assert_trees_close((after, ys), (layer, jnp.stack(want)))
    assert after.state.num_updates == 8


def test_remat_updates_once_and_differentiates_alike() -> None:
    x, weights, _ = point()
    layer = layer_of(0)

    def loss(x: Any) -> tuple[Any, BatchNorm]:
        y, after = layer(x, training=True, weights=weights)
        return jnp.sum(y**3), after

    plain = jax.grad(loss, has_aux=True)(x)
    assert_trees_close(jax.grad(jax.checkpoint(loss), has_aux=True)(x), plain, rtol=1e-9)
    assert plain[1].state.num_updates == 4


def test_remat_computes_the_statistics_again_and_keeps_one_state() -> None:
    x, _, _ = point()
    layer = layer_of(0)

    def chain(x: Any, wrap: Any) -> tuple[Any, BatchNorm]:
        call = wrap(lambda layer, x: layer(x, training=True))
        y, after = call(layer, x)
        y, after = call(after, jnp.sin(y))
        return jnp.sum(y**3), after

    def step(wrap: Any) -> Any:
        return jax.jit(jax.grad(lambda x: chain(x, wrap), has_aux=True))

    plain, again = step(lambda f: f), step(jax.checkpoint)
    assert_trees_close(again(x), plain(x), rtol=1e-9)
    assert again(x)[1].state.num_updates == 5
    # What was compiled: with checkpoint, the backward pass takes the square roots a second time.
    roots = [f.trace(x).jaxpr.pretty_print(use_color=False).count(" sqrt ") for f in (plain, again)]
    assert roots[1] > roots[0]


def test_every_transformation_gives_the_derivatives_of_the_others() -> None:
    x, weights, _ = point()
    direction, cotangent = arrays(7, x.shape, x.shape)

    def ys(x: Any) -> Any:
        return layer_of(1)(x, training=True, weights=weights)[0]

    def value(x: Any) -> Any:
        return jnp.sum(jnp.sin(ys(x)) * cotangent)

    @jax.jit
    def derivatives(x: Any) -> dict[str, Any]:
        out, linear = jax.linearize(ys, x)
        return {
            "jvp": jax.jvp(ys, (x,), (direction,)),
            "linearize": (out, linear(direction)),
            "transpose": jax.linear_transpose(linear, x)(cotangent),
            "vjp": jax.vjp(ys, x)[1](cotangent),
            "jacfwd": jax.jacfwd(ys)(x).reshape(x.size, x.size),
            "jacrev": jax.jacrev(ys)(x).reshape(x.size, x.size),
            "value_and_grad": jax.value_and_grad(value)(x),
            "value": (value(x), jax.grad(value)(x)),
            "hessian": jax.hessian(value)(x).reshape(x.size, x.size),
            "along": jax.grad(lambda x: jnp.vdot(jax.grad(value)(x), direction))(x),
        }

    got = derivatives(x)
    assert_trees_close(got["linearize"], got["jvp"])
    assert_trees_close(got["transpose"], got["vjp"], rtol=1e-9)
    assert_trees_close(got["value_and_grad"], got["value"])
    np.testing.assert_allclose(got["jvp"][1].reshape(-1), got["jacfwd"] @ direction.reshape(-1), atol=1e-12)
    np.testing.assert_allclose(got["vjp"][0].reshape(-1), cotangent.reshape(-1) @ got["jacfwd"], atol=1e-12)
    np.testing.assert_allclose(got["jacrev"], got["jacfwd"], atol=1e-12)
    np.testing.assert_allclose(got["jacfwd"], numeric(jax.jit(ys), x), atol=1e-8)
    np.testing.assert_allclose(got["along"].reshape(-1), got["hessian"] @ direction.reshape(-1), atol=1e-10)
    np.testing.assert_allclose(got["hessian"], numeric(jax.jit(jax.grad(value)), x), atol=1e-7)


def test_vmap_within_vmap_over_parameters_and_batches() -> None:
    xs, gammas = arrays(8, (2, *SHAPE), (3, 2))
    layer = layer_of(0)

    def call(gamma: Any, x: Any) -> Any:
        return layer.with_parameters({**layer.parameters, "gamma": gamma})(x, training=True)

    ys, afters = jax.jit(jax.vmap(jax.vmap(call, in_axes=(None, 0)), in_axes=(0, None)))(gammas, xs)
    assert ys.shape == (3, 2, *SHAPE)
    for i, gamma in enumerate(gammas):
        for j, x in enumerate(xs):
            got = jax.tree.map(lambda leaf, at=(i, j): leaf[at], (ys, afters))
            assert_trees_close(got, call(jnp.asarray(gamma), x))


def test_one_shape_is_traced_and_compiled_once() -> None:
    (xs,) = arrays(10, (3, *SHAPE))
    traced = []

    @jax.jit
    def step(layer: BatchNorm, x: Any) -> Any:
        traced.append(x.shape)
        return layer(x, training=True)

    layer = layer_of(0)
    for x in (*xs, xs[0, :2]):  # the layer after a step is the same kind of argument as the one before
        _, layer = step(layer, x)
    assert traced == [SHAPE, (2, *SHAPE[1:])]
    assert step._cache_size() == 2


def test_shapes_are_known_without_computing() -> None:
    layer = layer_of(0)
    y, after = jax.eval_shape(
        lambda layer, x: layer(x, training=True), layer, jax.ShapeDtypeStruct((10**9, 2), jnp.bfloat16)
    )
    assert (y.shape, y.dtype) == ((10**9, 2), jnp.bfloat16)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(layer), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_donated_state_is_reused_by_the_compiled_step() -> None:
    x, _, _ = point()
    layer, kept = layer_of(0), layer_of(0)
    lowered = jax.jit(lambda layer, x: layer(x, training=True), donate_argnums=0).lower(layer, x)
    compiled = lowered.compile()
    # Every array of the state is updated in its own memory.
    assert lowered.as_text().count("tf.aliasing_output") == len(jax.tree.leaves(layer))
    got = compiled(layer, x)
    assert_trees_close(got, kept(x, training=True))
    assert layer.state.moving_mean.is_deleted()


def test_export_carries_a_layer_through_bytes() -> None:
    x, weights, _ = point()
    layer = layer_of(0, SPEC.replace(synchronized=True))
    train = jax.jit(lambda layer, x, w: layer(x, training=True, weights=w))
    data = export.export(train)(layer, x, weights).serialize(vjp_order=1)
    again = export.deserialize(data)
    assert_trees_close(again.call(layer, x, weights), train(layer, x, weights))
    slope = jax.grad(lambda x: jnp.sum(again.call(layer, x, weights)[0] ** 3))(x)
    assert_trees_close(slope, jax.grad(lambda x: jnp.sum(train(layer, x, weights)[0] ** 3))(x), rtol=1e-9)
    states = jax.jit(lambda state, x: batch_norm(x, state, layer.spec, training=True)[1])
    of_states = export.deserialize(export.export(states)(layer.state, x).serialize())
    assert_trees_close(of_states.call(layer.state, x), states(layer.state, x))


def test_eval_is_exported_for_any_number_of_rows() -> None:
    layer = layer_of(0)
    (rows,) = export.symbolic_shape("n")
    evaluate = jax.jit(lambda x: layer(x, training=False)[0])
    shape = jax.ShapeDtypeStruct((rows, *SHAPE[1:]), jnp.float64)
    of_any = export.export(evaluate)(shape)
    for (x,) in (arrays(11, SHAPE), arrays(12, (7, *SHAPE[1:]))):
        assert_trees_close(of_any.call(x), evaluate(x))
    train = export.export(jax.jit(lambda x: layer(x, training=True)[0]))
    with pytest.raises(InputError, match="need lengths that are numbers"):
        train(shape)


def test_updated_statistics_carry_no_gradient() -> None:
    x, weights, _ = point()
    layer = layer_of(0)

    def loss(x: Any, weights: Any, parameters: dict[str, Any]) -> Any:
        _, after = layer.with_parameters(parameters)(x, training=True, weights=weights)
        return jnp.sum(after.state.moving_mean) + jnp.sum(after.state.moving_variance)

    for leaf in jax.tree.leaves(jax.grad(loss, argnums=(0, 1, 2))(x, weights, layer.parameters)):
        assert not leaf.any()


@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
def test_no_weight_at_all_under_a_trace(epsilon: float) -> None:
    x, _, _ = point()
    layer = layer_of(0, SPEC.replace(epsilon=epsilon))

    def value(x: Any, weights: Any) -> Any:
        y, after = layer(x, training=True, weights=weights)
        return jnp.sum(y**2), (y, after)

    gradients, (y, after) = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(x, jnp.zeros(3))
    eval_y, _ = layer(x, training=False)
    np.testing.assert_allclose(y, eval_y, rtol=1e-12)
    assert_trees_close(after, layer)
    want = jax.grad(lambda x: jnp.sum(layer(x, training=False)[0] ** 2))(x)
    np.testing.assert_allclose(gradients[0], want, rtol=1e-12)
    assert not gradients[1].any()


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_wrong_weights_under_a_trace_become_nan(wrong: float) -> None:
    x, _, _ = point()
    call = jax.jit(lambda w: layer_of(0)(x, training=True, weights=w))
    y, after = call(jnp.asarray([1.0, 2.0, wrong]))
    assert jnp.isnan(y).all()
    assert jnp.isnan(after.state.moving_mean).all()


def test_concrete_weights_are_checked_inside_jit() -> None:
    x, _, _ = point()
    with pytest.raises(InputError, match="not negative"):
        jax.jit(lambda x: layer_of(0)(x, training=True, weights=np.array([1.0, 2.0, -1.0])))(x)


def test_the_function_takes_numpy_too() -> None:
    state = BatchNormState.initial(SPEC)
    y, after = batch_norm(np.asarray(point()[0]), state, SPEC, training=True)
    assert y.dtype == jnp.float64
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((after.moving_mean, after.num_updates)))


def test_a_layer_can_be_built_of_traced_arrays() -> None:
    x, _, _ = point()
    layer = layer_of(0)
    got = jax.jit(lambda state: BatchNorm(SPEC, state)(x, training=True))(layer.state)
    assert_trees_close(got, layer(x, training=True))
