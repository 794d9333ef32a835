"""`bnlayer_jax.nnx.BatchNorm` in the place of `flax.nnx.BatchNorm`."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")

import flax.serialization
from flax import nnx

import bnlayer_jax
from bnlayer import BatchNormSpec, InputError, Renorm, SpecError, StateError, UnsupportedError
from bnlayer_jax.nnx import BatchNorm

CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def data(seed: int = 0, shape: tuple[int, ...] = (8, 5, 3)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape), jnp.float32)


def pair(**arguments: Any) -> tuple[BatchNorm, nnx.BatchNorm]:
    """Ours, and Flax's with its accurate variance."""
    ours = BatchNorm(3, **arguments, rngs=nnx.Rngs(0))
    return ours, nnx.BatchNorm(3, **arguments, use_fast_variance=False, rngs=nnx.Rngs(0))


@nnx.jit
def call(layer: nnx.BatchNorm, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    return layer(x, mask=mask)


@nnx.jit
def call_replicas(layer: nnx.BatchNorm, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The first axis of x is the replicas'."""
    run = nnx.vmap(lambda layer, x, mask: layer(x, mask=mask), in_axes=(None, 0, 0), axis_name="replicas")
    return run(layer, x, mask)


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)


@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_the_signature_is_flaxs_and_what_is_ours_comes_by_keyword(method: str) -> None:
    theirs = inspect.signature(getattr(nnx.BatchNorm, method)).parameters
    ours = inspect.signature(getattr(BatchNorm, method)).parameters
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        if name.endswith("_init"):
            assert ours[name].default.__qualname__ == parameter.default.__qualname__
        else:
            assert ours[name].default == parameter.default, name
    assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in set(ours) - set(theirs))


def test_flaxs_tools_find_it() -> None:
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), BatchNorm(3, rngs=nnx.Rngs(1)))
    model.set_attributes(nnx.BatchNorm, momentum=0.5)
    assert [m.momentum for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)] == [0.5]


PLAIN: list[dict[str, Any]] = [
    {},
    {"momentum": 0.7, "epsilon": 1e-3},
    {"use_bias": False},
    {"use_scale": False, "use_bias": False},
    {"axis": 1},
    {"axis": (-1,)},
]


@pytest.mark.parametrize("arguments", PLAIN, ids=str)
def test_training_and_eval_agree_with_flaxs_accurate_variance(arguments: dict[str, Any]) -> None:
    ours, theirs = pair(**arguments)
    x = jnp.moveaxis(data(), -1, 1) if arguments.get("axis") == 1 else data()
    for step in range(3):
        np.testing.assert_allclose(call(ours, x + step), call(theirs, x + step), **CLOSE)
    assert_same(nnx.state(ours), nnx.state(theirs))
    ours.eval()
    theirs.eval()
    np.testing.assert_allclose(call(ours, x), call(theirs, x), **CLOSE)


def test_flaxs_default_variance_fails_where_ours_does_not() -> None:
    x = data(shape=(4096, 3)) + 1000
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(0)) / exact.std(0)
    error = {
        kind: np.abs(kind(3, rngs=nnx.Rngs(0))(x) - expected).max() for kind in (BatchNorm, nnx.BatchNorm)
    }  # fmt: skip
    assert error[BatchNorm] < 1e-3 < 1e-2 < error[nnx.BatchNorm]


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "int32"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"param_dtype": jnp.bfloat16}, {"dtype": jnp.float16}, {"use_bias": False, "use_scale": False}],
    ids=["plain", "bfloat16 parameters", "dtype float16", "no parameters"],
)
@pytest.mark.parametrize("training", [True, False])
def test_y_and_the_variables_have_flaxs_dtypes(x_dtype: str, arguments: dict[str, Any], training: bool) -> None:
    ours, theirs = pair(**arguments, use_running_average=not training)
    x = data(shape=(4, 3)).astype(x_dtype)

    def outcome(layer: nnx.BatchNorm) -> Any:
        shapes = nnx.eval_shape(lambda layer, x: (layer(x), nnx.to_pure_dict(nnx.state(layer))), layer, x)
        return jax.tree.map(lambda a: (a.shape, a.dtype.name), shapes)

    assert outcome(ours) == outcome(theirs)


def test_the_statistics_are_not_rounded_to_dtype() -> None:
    layer = BatchNorm(3, dtype=jnp.bfloat16, momentum=0.0, rngs=nnx.Rngs(0))
    x = (data() + 50).astype(jnp.bfloat16)
    layer(x)
    np.testing.assert_allclose(layer.mean[...], np.mean(np.asarray(x, np.float64), (0, 1)), rtol=1e-6)
    layer.eval()
    centered = np.asarray(layer(x), np.float64).mean((0, 1))
    np.testing.assert_allclose(centered, 0, atol=0.01)  # a mean rounded to bfloat16 is off by up to 0.125


def test_promote_dtype_is_asked_for_the_dtype() -> None:
    def half(values: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
        assert dtype is None
        return tuple(None if v is None else jnp.asarray(v, jnp.float16) for v in values)

    ours, theirs = pair(promote_dtype=half)
    assert ours(data()).dtype == theirs(data()).dtype == jnp.float16


def test_random_initializers_draw_what_flax_draws() -> None:
    ours, theirs = pair(scale_init=nnx.initializers.normal(), bias_init=nnx.initializers.normal())
    assert_same(nnx.state(ours), nnx.state(theirs))


def test_metadata_reaches_the_parameters() -> None:
    layer = BatchNorm(3, rngs=nnx.Rngs(0), scale_metadata={"note": "scale's"}, bias_metadata={"note": "bias's"})
    assert (layer.scale.note, layer.bias.note) == ("scale's", "bias's")


def test_who_says_whether_it_trains() -> None:
    x = data()
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    trained = layer(x)
    layer.eval()
    assert layer.use_running_average is True
    assert np.abs(layer(x) - trained).max() > 0.1
    np.testing.assert_array_equal(layer(x, use_running_average=False), trained)  # the call wins
    layer.train()
    np.testing.assert_array_equal(layer(x), trained)
    layer.use_running_average = None
    with pytest.raises(InputError, match="use_running_average must be True or False"):
        layer(x)
    if hasattr(nnx, "view"):  # Flax 0.12.4
        view = nnx.view(layer, use_running_average=True)
        assert np.abs(view(x) - trained).max() > 0.1


def test_frozen_statistics_survive_train() -> None:
    layer = BatchNorm(3, frozen_statistics=True, rngs=nnx.Rngs(0))
    layer.train()
    x = data()
    np.testing.assert_allclose(layer(x), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(layer.mean[...], 0)


def test_frozen_parameters_get_no_gradient_and_pass_it_on() -> None:
    layer = BatchNorm(3, frozen_parameters=True, rngs=nnx.Rngs(0))
    x = data()
    gradients = nnx.grad(lambda layer: (layer(x) ** 3).sum())(layer)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients)
    passed = jax.grad(lambda x: (layer(x, True) ** 3).sum())(x)
    assert np.abs(passed).min() > 0


def test_attributes_are_the_truth() -> None:
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    assert layer.spec == BatchNormSpec(3, decay=0.99, single_value="allow")
    layer.momentum, layer.epsilon, layer.nonfinite = 0.5, 1e-3, "keep"
    assert layer.spec == BatchNormSpec(3, decay=0.5, epsilon=1e-3, nonfinite="keep", single_value="allow")
    layer(data())
    np.testing.assert_allclose(layer.mean[...], 0.5 * data().mean((0, 1)), rtol=1e-5)
    layer.momentum = 1.5
    with pytest.raises(SpecError, match="decay"):
        layer(data())
    layer.momentum, layer.nonfinite = "cumulative", "propagate"
    with pytest.raises(StateError, match="built without num_updates"):
        layer(data())


OPTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "unbiased": ({"moving_variance_estimator": "unbiased"}, set()),
    "keep": ({"nonfinite": "keep"}, set()),
    "ghosts": ({"virtual_batch_size": 3}, set()),
    "consecutive": ({"virtual_batch_size": 3, "virtual_batch_layout": "consecutive"}, set()),
    "cumulative": ({"momentum": "cumulative"}, {"num_updates"}),
    "debias mean": ({"zero_debias": "mean"}, {"num_updates", "hidden_mean"}),
    "debias all": ({"zero_debias": "all"}, {"num_updates", "hidden_mean", "hidden_variance"}),
    "renorm": ({"renorm": Renorm(r_max=2.0, d_max=1.0)}, {"renorm_mean", "renorm_stddev", "moving_stddev"}),
}


@pytest.mark.parametrize(("options", "added"), OPTIONS.values(), ids=OPTIONS)
def test_options_are_the_specs_and_add_only_their_own_variables(options: dict[str, Any], added: set[str]) -> None:
    layer = BatchNorm(3, **options, rngs=nnx.Rngs(0))
    state = nnx.state(layer)
    assert set(state) == {"scale", "bias", "mean", "var"} | added
    assert all(isinstance(variable, nnx.BatchStat) for name, variable in state.items() if name in added)
    reference = bnlayer_jax.BatchNorm(layer.spec)

    @nnx.jit
    def step(layer: BatchNorm, x: jax.Array) -> jax.Array:
        return layer(x)

    for seed in range(2):
        y, reference = reference(data(seed), training=True)
        np.testing.assert_allclose(step(layer, data(seed)), y, **CLOSE)
    names = {"mean": "moving_mean", "var": "moving_variance"}
    for name in {"mean", "var"} | added:
        held = getattr(reference.state, names.get(name, name))
        np.testing.assert_allclose(getattr(layer, name)[...], held, **CLOSE)


def test_without_moving_statistics_there_are_no_variables_for_them() -> None:
    layer = BatchNorm(3, track_moving_stats=False, rngs=nnx.Rngs(0))
    assert set(nnx.state(layer)) == {"scale", "bias"}
    np.testing.assert_array_equal(layer(data(), True), layer(data(), False))


@pytest.mark.parametrize("shape", [(8, 5, 1), (5, 1), (8, 1, 1), (8, 5, 3), (3,)])
def test_masks_broadcast_as_flaxs(shape: tuple[int, ...]) -> None:
    mask = np.random.default_rng(1).random(shape) < 0.7
    mask.flat[0] = mask.flat[-1] = True
    if shape == (3,):  # every value of a masked channel is hidden, and Flax divides 0 by 0
        mask[:] = True
    ours, theirs = pair(momentum=0.0)
    np.testing.assert_allclose(call(ours, data(), jnp.asarray(mask)), call(theirs, data(), jnp.asarray(mask)), **CLOSE)
    assert_same(nnx.state(ours), nnx.state(theirs))


def test_a_channel_that_is_masked_whole_keeps_its_statistics() -> None:
    ours, _ = pair(momentum=0.0)
    y = call(ours, data(), jnp.array([True, False, True]))
    np.testing.assert_allclose(y[..., 1], data()[..., 1] / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert float(ours.mean[1]) == 0.0 != float(ours.mean[0])
    before = nnx.to_pure_dict(nnx.state(ours))
    call(ours, data(1), jnp.zeros((8, 1, 1), bool))
    assert_same(nnx.to_pure_dict(nnx.state(ours)), before)


def test_weights_and_the_other_words_of_a_call() -> None:
    layer = BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    weights = np.array([0, 1, 2, 0.5, 0, 0, 3, 1], np.float32)
    layer(data(), weights=weights)
    np.testing.assert_allclose(layer.mean[...], np.average(data().mean(1), 0, weights), rtol=1e-5)
    before = nnx.to_pure_dict(nnx.state(layer))
    plain = layer(data(1), update_stats=False)
    assert_same(nnx.to_pure_dict(nnx.state(layer)), before)
    adjusted = layer(data(1), update_stats=False, adjustment=(jnp.float32(2.0), jnp.float32(1.0)))
    np.testing.assert_allclose(adjusted, 2 * plain + 1, **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "call", "error", "message"),
    [
        ({"axis": (1, 2)}, {}, UnsupportedError, "axis must be one channel axis"),
        ({"axis_index_groups": [[0, 1]]}, {}, UnsupportedError, "axis_index_groups"),
        ({"epsilon": -1.0}, {}, SpecError, "epsilon"),
        ({"single_value": "raise"}, {"x": jnp.ones((1, 3))}, InputError, "more than one value per channel"),
        ({}, {"x": jnp.ones((4, 3), complex)}, InputError, "complex64"),
        ({}, {"x": jnp.ones((4, 2))}, InputError, "3 channels"),
        ({}, {"mask": jnp.ones((8, 1, 1))}, InputError, "give weights="),
        ({}, {"mask": jnp.ones((7, 1, 1), bool)}, InputError, "broadcast to x's shape"),
        ({}, {"mask": jnp.ones((8, 1, 1), bool), "weights": jnp.ones(8)}, InputError, "give one of the two"),
        ({"zero_debias": "all"}, {"mask": jnp.ones((8, 5, 3), bool)}, UnsupportedError, "one number of updates"),
        ({"param_dtype": jnp.float64}, {}, UnsupportedError, "x64"),
    ],
)
def test_what_is_refused_is_named(arguments: dict[str, Any], call: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNorm(3, **arguments, rngs=nnx.Rngs(0))(**{"x": data(), **call})


def test_a_single_value_is_taken_as_flax_takes_it() -> None:
    ours, theirs = pair()
    np.testing.assert_array_equal(ours(jnp.ones((1, 3))), theirs(jnp.ones((1, 3))))
    assert_same(nnx.state(ours), nnx.state(theirs))


def test_an_empty_batch_leaves_the_statistics() -> None:
    ours, _ = pair()
    assert ours(jnp.ones((0, 5, 3))).shape == (0, 5, 3)
    np.testing.assert_array_equal(ours.var[...], 1)


class Model(nnx.Module):
    """A residual block."""

    def __init__(self, norm: Any, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 3, (3,), rngs=rngs)
        self.norm = norm(3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jax.nn.relu(self.norm(self.conv(x)))


def test_jit_grad_split_and_merge() -> None:
    after = []
    for norm in (BatchNorm, lambda n, rngs: nnx.BatchNorm(n, use_fast_variance=False, rngs=rngs)):
        model = Model(norm, nnx.Rngs(0))
        graph, state = nnx.split(model)

        @jax.jit
        def step(state: Any, x: jax.Array, graph: Any = graph) -> Any:
            model = nnx.merge(graph, state)
            gradients = nnx.grad(lambda model: jnp.mean(model(x) ** 3))(model)
            return nnx.state(model), gradients

        after.append(step(state, data()))
        assert np.abs(after[-1][0]["norm"]["mean"][...]).max() > 0
    assert_same(*after)


def test_vmap_scan_and_remat() -> None:
    results = []
    for norm in (BatchNorm, lambda n, rngs: nnx.BatchNorm(n, use_fast_variance=False, rngs=rngs)):

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def create(rngs: nnx.Rngs) -> Model:
            return Model(norm, rngs)  # noqa: B023  (called at once)

        models = create(nnx.Rngs(0))
        assert models.norm.mean[...].shape == (2, 3)

        @nnx.jit
        def ensemble(models: Model, x: jax.Array) -> jax.Array:
            return nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, x)

        @nnx.jit
        def deep(models: Model, x: jax.Array) -> jax.Array:
            block = nnx.remat(lambda model, x: model(x))
            return nnx.scan(lambda x, model: block(model, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, models)

        y = ensemble(models, data())
        gradient = nnx.grad(lambda models: (deep(models, data()) ** 2).mean())(models)
        results.append((y, gradient, nnx.state(models)))
    assert_same(*results)


def test_statistics_over_a_mapped_axis() -> None:
    layer = BatchNorm(3, axis_name="replicas", momentum=0.0, rngs=nnx.Rngs(0))
    whole = BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    assert layer.spec.synchronized
    shards = data().reshape(4, 2, 5, 3)
    np.testing.assert_allclose(call_replicas(layer, shards).reshape(8, 5, 3), call(whole, data()), **CLOSE)
    assert_same(nnx.state(layer), nnx.state(whole))
    layer.eval()
    assert layer(data()).shape == (8, 5, 3)  # no replicas are asked


def test_masks_over_a_mapped_axis_are_weighed_by_what_they_leave() -> None:
    layer = BatchNorm(3, axis_name="replicas", momentum=0.0, rngs=nnx.Rngs(0))
    mask = np.array([[True, True], [False, False], [True, False], [True, True]])
    call_replicas(layer, data().reshape(4, 2, 5, 3), jnp.asarray(mask)[..., None, None])
    kept = np.asarray(data(), np.float64)[mask.reshape(-1)]
    np.testing.assert_allclose(layer.mean[...], kept.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], kept.var((0, 1)), rtol=1e-5)


@pytest.mark.parametrize(("axis", "shape"), [(-1, (3,)), (0, (3, 5))])
def test_single_examples_under_vmap(axis: int, shape: tuple[int, ...]) -> None:
    ours, theirs = pair(axis=axis, axis_name="replicas")
    x = data(shape=(8, *shape))
    np.testing.assert_allclose(call_replicas(ours, x), call_replicas(theirs, x), **CLOSE)
    assert_same(nnx.state(ours), nnx.state(theirs))


@nnx.jit
def call_model(model: Model, x: jax.Array) -> jax.Array:
    return model(x)


def trained(norm: Any, seed: int) -> Model:
    model = Model(norm, nnx.Rngs(seed))
    call_model(model, data(seed))
    return model


@pytest.mark.parametrize(
    "kinds", [(nnx.BatchNorm, BatchNorm), (BatchNorm, nnx.BatchNorm)], ids=["from Flax", "to Flax"]
)
def test_checkpoints_of_flax_load_and_back(kinds: tuple[Any, Any]) -> None:
    saved, into = trained(kinds[0], 1), trained(kinds[1], 2)
    stored = flax.serialization.msgpack_serialize(nnx.to_pure_dict(nnx.state(saved)))
    state = nnx.state(into)
    nnx.replace_by_pure_dict(state, flax.serialization.msgpack_restore(stored))
    nnx.update(into, state)
    for model in (saved, into):
        model.eval()
    np.testing.assert_allclose(call_model(into, data()), call_model(saved, data()), **CLOSE)


def test_checkpoints_of_orbax_load(tmp_path: Any) -> None:
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
    saved, into = trained(nnx.BatchNorm, 1), trained(BatchNorm, 2)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(saved))
        checkpointer.wait_until_finished()
        nnx.update(into, checkpointer.restore(tmp_path / "model", nnx.state(into)))
    assert_same(nnx.state(into), nnx.state(saved))
