"""Ghost batches, renorm, zero-debiased averages and adjustments under JAX's transformations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="pip install 'bnlayer[jax]'")
import jax.numpy as jnp  # noqa: E402

from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm  # noqa: E402
from bnlayer.call import plan_call  # noqa: E402
from bnlayer_jax import BatchNorm, batch_norm  # noqa: E402
from bnlayer_jax.ghosts import groups_of  # noqa: E402

LAYOUTS = ("strided", "consecutive")
WIDE = BatchNormSpec(2, axis=1, epsilon=1e-3, param_dtype="float64", stats_dtype="float64")
SHAPE = (5, 2, 2)
# Clips that leave r and d no choice: constants, which differences see as the gradient does.
PINNED = Renorm(r_max=1.3, r_min=1.3, d_max=0.0)


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng([25, seed])
    return [rng.normal(size=shape) for shape in shapes]


def layer_of(seed: int, spec: BatchNormSpec) -> BatchNorm:
    gamma, beta, mean, spread = arrays(seed, *[(spec.num_features,)] * 4)
    state = BatchNormState(gamma=gamma, beta=beta, moving_mean=mean, moving_variance=np.exp(spread), num_updates=3)
    return BatchNorm(spec, state.astype(spec))


def assert_trees_close(got: Any, want: Any, rtol: float = 1e-11) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splitting_and_joining_keep_every_row_in_its_ghost(layout: Any) -> None:
    for rows in range(1, 10):
        for size in range(1, rows + 2):
            spec = BatchNormSpec(2, virtual_batch_size=size, virtual_batch_layout=layout, single_value="allow")
            plan = plan_call(spec, (rows, 3, 2), "float32", training=True)
            groups = groups_of(spec, plan, rows)
            x = np.arange(rows * 6.0, dtype=np.float32).reshape(rows, 3, 2)
            split = np.asarray(groups.split(jnp.asarray(x)))
            np.testing.assert_array_equal(groups.join(jnp.asarray(split)), x)
            assert groups.axis is not None or size >= rows
            for g, ghost in enumerate(plan.ghosts or ()):
                if groups.axis is None:
                    continue
                have = np.take(split, g, axis=groups.axis)
                if groups.present is not None:
                    have = have[np.take(groups.present, g, axis=groups.axis).reshape(-1)]
                np.testing.assert_array_equal(have, x[ghost])
                assert np.take(groups.counts, g, axis=groups.axis).item() == 3 * len(x[ghost])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [120, 119])
def test_the_graph_does_not_grow_with_the_number_of_ghosts(layout: Any, rows: int) -> None:
    def size(virtual: int) -> int:
        spec = BatchNormSpec(3, renorm=Renorm(), virtual_batch_size=virtual, virtual_batch_layout=layout)
        gradient = jax.grad(lambda x, layer, w: layer(x, training=True, weights=w)[0].sum())
        return len(jax.make_jaxpr(gradient)(jnp.zeros((rows, 3)), BatchNorm(spec), jnp.ones(rows)).jaxpr.eqns)

    assert size(60) == size(4)


HARD = {
    "ghosts": (WIDE.replace(virtual_batch_size=2, zero_debias="all"), False),
    "renorm": (WIDE.replace(virtual_batch_size=3, virtual_batch_layout="consecutive", renorm=PINNED), False),
    "adjustment": (WIDE.replace(renorm=PINNED), True),
}


@pytest.mark.parametrize("name", HARD)
def test_hessian_in_x_weights_and_adjustment(name: str) -> None:
    spec, adjusts = HARD[name]
    x, w, scale, bias, slope = arrays(1, SHAPE, SHAPE[:1], (2, 1), (5, 1, 1), SHAPE)
    sizes = np.cumsum([x.size, w.size, 2, 5])
    with jax.enable_x64(True):
        layer = layer_of(1, spec)

        def value(flat: Any) -> Any:
            a, b, s, t, _ = jnp.split(flat, sizes)
            y, _ = layer(
                a.reshape(SHAPE),
                training=True,
                weights=b,
                adjustment=(s.reshape(2, 1), t.reshape(5, 1, 1)) if adjusts else None,
            )
            return jnp.sum(jnp.sin(y + slope) * slope)

        flat = jnp.concatenate([jnp.ravel(v) for v in (x, np.abs(w) + 0.1, scale, bias)])
        gradient = jax.jit(jax.grad(value))
        hessian = jax.jit(jax.hessian(value))(flat)
        steps = 1e-6 * jnp.eye(flat.size)
        numeric = jax.jit(jax.vmap(lambda h: (gradient(flat + h) - gradient(flat - h)) / 2e-6))(steps)
        first = jax.jit(jax.vmap(lambda h: (value(flat + h) - value(flat - h)) / 2e-6))(steps)
        np.testing.assert_allclose(gradient(flat), first, atol=1e-8)
    np.testing.assert_allclose(hessian, numeric, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-11)
    assert bool(np.abs(hessian).max() > 0.1)


def test_r_and_d_carry_no_gradient() -> None:
    (x,) = arrays(2, SHAPE)
    with jax.enable_x64(True):
        layer = layer_of(2, WIDE.replace(renorm=Renorm(decay=0.5)))
        statistics = layer.state.replace(gamma=None, beta=None, num_updates=None)

        def value(x: Any, statistics: Any, r_max: Any) -> Any:
            state = statistics.replace(gamma=layer.state.gamma, beta=layer.state.beta, num_updates=3)
            y, after = batch_norm(x, state, layer.spec, training=True, renorm_clips={"r_max": r_max})
            return jnp.sum(y**3) + sum(jnp.sum(a) for n, a in after.arrays().items() if n not in ("gamma", "beta"))

        _, of_statistics, of_clip = jax.grad(value, argnums=(0, 1, 2))(x, statistics, 0.9)
    for leaf in jax.tree.leaves((of_statistics, of_clip)):
        assert not leaf.any()


@pytest.mark.parametrize(
    ("options", "layout"),
    [({"renorm": Renorm(d_max=0.1)}, "strided"), ({"zero_debias": "all", "decay": 0.5}, "consecutive")],
)
def test_scan_and_vmap_do_what_a_loop_does(options: dict[str, Any], layout: Any) -> None:
    spec = WIDE.replace(**options, virtual_batch_size=2, virtual_batch_layout=layout)
    xs, ws = arrays(3, (3, *SHAPE), (3, 5))
    ws = np.abs(ws)
    ws[1] = [0.0, 1.0, 0.0, 0.3, 0.0]
    ws[2] = 0.0
    schedule = np.array([1.0, 1.5, 2.0])

    def step(layer: BatchNorm, inputs: Any) -> tuple[BatchNorm, Any]:
        x, w, r_max = inputs
        y, layer = layer(x, training=True, weights=w, renorm_clips={"r_max": r_max} if spec.renorm else None)
        return layer, y

    with jax.enable_x64(True):
        one = jax.jit(step)
        layer, ys = layer_of(4, spec), []
        for inputs in zip(xs, ws, schedule, strict=True):
            layer, y = one(layer, inputs)
            ys.append(y)
        assert_trees_close(jax.lax.scan(step, layer_of(4, spec), (xs, ws, schedule)), (layer, jnp.stack(ys)))
        assert layer.state.num_updates == 5
        layers = [layer_of(i, spec) for i in range(3)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        got = jax.vmap(step)(stacked, (xs, ws, schedule))
        want = [one(a, b) for a, b in zip(layers, zip(xs, ws, schedule, strict=True), strict=True)]
        assert_trees_close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *want))


@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
def test_a_ghost_without_weight_is_normalized_as_in_eval_and_spoils_nothing(epsilon: float) -> None:
    (x,) = arrays(5, SHAPE)
    x[[1, 4]] = 7.0  # it has no variance either
    spec = WIDE.replace(epsilon=epsilon, virtual_batch_size=2, renorm=Renorm(r_max=2.0))
    weights = np.array([1.0, 0.0, 0.5, 2.0, 0.0])  # of 3 ghosts, the one of rows 1 and 4 has no weight
    with jax.enable_x64(True):
        layer = layer_of(5, spec)

        def value(x: Any, weights: Any) -> Any:
            y, after = layer(x, training=True, weights=weights)
            return jnp.sum(y**2), (y, after)

        (dx, dw), (y, after) = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(x, weights)
        want_y = layer(x, training=False)[0]
        want_dx = jax.jit(jax.grad(lambda x: jnp.sum(layer(x, training=False)[0] ** 2)))(x)
    alone = [1, 4]
    y, dx, dw, want_y, want_dx = (np.asarray(a) for a in (y, dx, dw, want_y, want_dx))
    np.testing.assert_allclose(y[alone], want_y[alone], rtol=1e-12)
    np.testing.assert_allclose(dx[alone], want_dx[alone], rtol=1e-12)
    assert not dw[alone].any()
    assert np.isfinite(y).all() and np.isfinite(dx).all() and np.isfinite(dw).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert int(after.state.num_updates) == 4


def test_an_adjustment_gets_its_gradients_in_training_only() -> None:
    x, dy, scale, bias = arrays(6, SHAPE, SHAPE, (5, 1, 1), (2, 1))
    with jax.enable_x64(True):
        layer = layer_of(6, WIDE)

        def value(scale: Any, bias: Any, training: bool) -> Any:
            return jnp.sum(dy * layer(x, training=training, adjustment=(scale, bias))[0])

        of_scale, of_bias = jax.grad(value, argnums=(0, 1))(scale, bias, True)
        in_eval = jax.grad(value, argnums=(0, 1))(scale, bias, False)
        _, after = layer(x, training=True, adjustment=(scale, bias))
        assert_trees_close(after, layer(x, training=True)[1])
    gamma = np.asarray(layer.state.gamma)[:, None]
    xhat = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + WIDE.epsilon)
    np.testing.assert_allclose(of_scale, (dy * gamma * xhat).sum((1, 2), keepdims=True), rtol=1e-10)
    np.testing.assert_allclose(of_bias, (dy * gamma).sum((0, 2))[:, None], rtol=1e-10)
    assert not any(leaf.any() for leaf in in_eval)


X = np.random.default_rng(0).normal(1.0, 2.0, (6, 3)).astype(np.float32)
RENORM = BatchNormSpec(3, renorm=Renorm(r_max=2.0))


def test_clips_may_be_numbers_or_traced_alike() -> None:
    layer = BatchNorm(RENORM)

    def call(clips: dict[str, Any]) -> Any:
        return layer(X, training=True, renorm_clips=clips)

    for clips in ({"r_max": 1.1, "d_max": 0.2}, {"r_max": None}, {"r_min": np.float32(1.5)}):
        assert_trees_close(jax.jit(call)(clips), call(clips), rtol=1e-6)
    assert_trees_close(call({"r_max": jnp.float32(1.1)}), call({"r_max": np.float32(1.1)}))


@pytest.mark.parametrize(
    ("spec", "clips", "message"),
    [
        (RENORM, {"r_max": -1.0}, "not be negative"),
        (RENORM, {"d_max": np.float32("nan")}, "not be negative"),
        (RENORM, {"r_min": 3.0}, "r_min must be at most r_max"),
        (RENORM, {"r_max": np.ones(3)}, r"r_max has shape \(3,\)"),
        (RENORM, {"rmax": 1.0}, "no rmax"),
        (BatchNormSpec(3), {"r_max": 1.0}, "need a layer with renorm"),
    ],
)
def test_wrong_clips_are_refused(spec: BatchNormSpec, clips: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchNorm(spec)(X, training=True, renorm_clips=clips)
    # What is concrete is looked at inside jit too.
    with pytest.raises(InputError, match=message):
        jax.jit(lambda x: BatchNorm(spec)(x, training=True, renorm_clips=clips)[0])(X)


@pytest.mark.parametrize(
    ("adjustment", "message"),
    [
        ((np.ones(3),), "pair"),
        (np.ones((2, 3)), "pair"),
        ((np.ones(3), np.ones(3, np.complex64)), "real numbers; got complex64"),
        ((np.ones(4), 0.0), "scale must broadcast"),
        ((1.0, np.ones((1, 6, 3))), "bias must broadcast"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_adjustments_are_refused(adjustment: Any, message: str, training: bool) -> None:
    with pytest.raises(InputError, match=message):
        BatchNorm(BatchNormSpec(3))(X, training=training, adjustment=adjustment)


OPTIONS: dict[str, dict[str, Any]] = {
    "renorm": {"renorm": Renorm(r_max=1.5), "virtual_batch_size": 4},
    "mean": {"zero_debias": "mean", "virtual_batch_size": 5, "virtual_batch_layout": "consecutive"},
    "all": {"zero_debias": "all", "moving_variance_estimator": "unbiased"},
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(("name", "leaves"), [("renorm", 8), ("mean", 6), ("all", 7)])
def test_the_state_keeps_its_leaves_and_their_dtypes(name: str, leaves: int, x64: bool) -> None:
    with jax.enable_x64(x64):
        layer = BatchNorm(BatchNormSpec(3, stats_dtype="bfloat16", **OPTIONS[name]))
        assert len(jax.tree.leaves(layer)) == leaves
        y, after = jax.jit(lambda layer, x, w: layer(x, training=True, weights=w))(
            layer, jnp.asarray(X, "float16"), np.ones(6, np.float32)
        )
        assert y.dtype == jnp.float16
        assert jax.tree.structure(after) == jax.tree.structure(layer)
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(layer), strict=True):
            assert (new.dtype, new.weak_type, new.shape) == (old.dtype, old.weak_type, old.shape)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0 - 1e-7])
def test_the_first_debiased_average_is_the_batch(decay: float) -> None:
    _, after = BatchNorm(BatchNormSpec(3, zero_debias="all", decay=decay))(X, training=True)
    # In float32, 1 - decay**t itself would be off by half of 1e-7.
    np.testing.assert_allclose(after.state.moving_mean, X.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(after.state.moving_variance, X.astype(np.float64).var(0), rtol=1e-6)
