"""`bnlayer_jax.linen.BatchNorm` in the place of `flax.linen.BatchNorm`."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")

import flax.errors
import flax.serialization
from flax import linen as nn

import bnlayer_jax
from bnlayer import BatchNormSpec, InputError, Renorm, SpecError, UnsupportedError
from bnlayer_jax.linen import BatchNorm

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
KEY = jax.random.key(0)
Accurate = partial(nn.BatchNorm, use_fast_variance=False)


def data(seed: int = 0, shape: tuple[int, ...] = (8, 5, 3)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(1.0, 2.0, shape), jnp.float32)


def train(layer: nn.Module, variables: Any, x: jax.Array, **arguments: Any) -> tuple[jax.Array, Any]:
    """y, and the variables after."""

    @jax.jit
    def step(variables: Any, x: jax.Array, arguments: Any) -> Any:
        return layer.apply(variables, x, **arguments, mutable=["batch_stats"])

    y, updates = step(variables, x, arguments)
    return y, {**variables, **updates}


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)


def test_the_fields_and_the_call_are_flaxs_and_what_is_ours_comes_by_keyword() -> None:
    theirs, ours = ({f.name: f for f in dataclasses.fields(kind)} for kind in (nn.BatchNorm, BatchNorm))
    names = list(theirs)
    assert list(ours)[: names.index("parent")] == names[: names.index("parent")]
    for name, field in theirs.items():
        if name in ("parent", "name"):  # Flax moves them behind every field of a subclass
            continue
        assert (ours[name].default, ours[name].kw_only) == (field.default, field.kw_only), name
    assert all(ours[name].kw_only for name in set(ours) - set(theirs))
    assert BatchNorm(False, -1, 0.5).momentum == 0.5
    call, flax_call = (inspect.signature(kind.__call__).parameters for kind in (BatchNorm, nn.BatchNorm))
    assert {n: (p.default, p.kind) for n, p in flax_call.items()}.items() <= {
        n: (p.default, p.kind) for n, p in call.items()
    }.items()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"momentum": 0.7, "epsilon": 1e-3}, {"use_bias": False, "use_scale": False}, {"axis": 1}, {"axis": (-1,)}],
    ids=str,
)
def test_training_and_eval_agree_with_flaxs_accurate_variance(arguments: dict[str, Any]) -> None:
    x = jnp.moveaxis(data(), -1, 1) if arguments.get("axis") == 1 else data()
    results = []
    for kind in (BatchNorm, Accurate):
        layer = kind(use_running_average=False, **arguments)
        y, variables = layer.init_with_output(KEY, x)
        first, variables = train(layer, variables, x)
        second, variables = train(layer, variables, x + 1)
        evaluated = kind(use_running_average=True, **arguments).apply(variables, x)
        results.append((y, first, second, evaluated, variables))
    assert_same(*results)


def test_init_does_not_update_and_asks_no_replicas() -> None:
    layer = BatchNorm(use_running_average=False, axis_name="nowhere", single_value="raise")
    variables = layer.init(KEY, data()[:1, 0])
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    with pytest.raises(InputError, match="'nowhere' is no mapped axis"):
        layer.apply(variables, data(), mutable=["batch_stats"])


@pytest.mark.parametrize("x_dtype", ["float16", "float32", "int32"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"param_dtype": jnp.float16},
        {"dtype": jnp.bfloat16},
        {"use_bias": False, "use_scale": False},
        {"force_float32_reductions": False, "param_dtype": jnp.float16},
    ],
    ids=["plain", "float16 parameters", "dtype bfloat16", "no parameters", "float16 statistics"],
)
@pytest.mark.parametrize("training", [True, False])
def test_y_and_the_variables_have_flaxs_dtypes(x_dtype: str, arguments: dict[str, Any], training: bool) -> None:
    def outcome(kind: Any) -> Any:
        layer = kind(**arguments, use_running_average=not training)
        shapes = jax.eval_shape(lambda x: layer.init_with_output(KEY, x), data(shape=(4, 3)).astype(x_dtype))
        return jax.tree.map(lambda a: (a.shape, a.dtype.name), shapes)

    assert outcome(BatchNorm) == outcome(nn.BatchNorm)


def test_half_statistics_of_a_checkpoint_stay_half() -> None:
    layer = BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(KEY, data())
    variables["batch_stats"] = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables["batch_stats"])
    _, after = train(layer, variables, data())
    assert {a.dtype for a in jax.tree.leaves(after["batch_stats"])} == {jnp.bfloat16.dtype}


def test_random_initializers_draw_what_flax_draws() -> None:
    arguments = {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()}
    assert_same(*(kind(False, **arguments).init(KEY, data()) for kind in (BatchNorm, nn.BatchNorm)))


def test_partitioned_parameters_keep_their_boxes() -> None:
    init = nn.with_partitioning(nn.initializers.ones, ("channels",))
    layer = BatchNorm(False, scale_init=init)
    variables = layer.init(KEY, data())
    assert nn.get_partition_spec(variables)["params"]["scale"] == jax.sharding.PartitionSpec("channels")
    y, _ = train(layer, variables, data())
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-6)


def test_who_says_whether_it_trains() -> None:
    variables = BatchNorm(True).init(KEY, data())
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm().apply(variables, data())
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm(True).apply(variables, data(), use_running_average=False)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        BatchNorm().apply(variables, data(), False)
    assert_same(BatchNorm().apply(variables, data(), True), BatchNorm(True).apply(variables, data()))
    # What changes no variable needs none to be mutable.
    for layer, words in ((BatchNorm(False), {"update_stats": False}), (BatchNorm(False, frozen_statistics=True), {})):
        assert layer.apply(variables, data(), **words).shape == (8, 5, 3)


def test_frozen_parameters_get_no_gradient() -> None:
    layer = BatchNorm(False, frozen_parameters=True)
    variables = layer.init(KEY, data())
    gradients = jax.grad(
        lambda p, x: (layer.apply({**variables, "params": p}, x, update_stats=False) ** 3).sum(), (0, 1)
    )
    parameters, x = gradients(variables["params"], data())
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), parameters)
    assert np.abs(x).min() > 0


OPTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "unbiased": ({"moving_variance_estimator": "unbiased", "nonfinite": "keep"}, set()),
    "ghosts": ({"virtual_batch_size": 3, "virtual_batch_layout": "consecutive"}, set()),
    "cumulative": ({"momentum": "cumulative"}, {"num_updates"}),
    "debias all": ({"zero_debias": "all"}, {"num_updates", "hidden_mean", "hidden_variance"}),
    "renorm": ({"renorm": Renorm(r_max=2.0, d_max=1.0)}, {"renorm_mean", "renorm_stddev", "moving_stddev"}),
}


@pytest.mark.parametrize(("options", "added"), OPTIONS.values(), ids=OPTIONS)
def test_options_are_the_specs_and_add_only_their_own_variables(options: dict[str, Any], added: set[str]) -> None:
    layer = BatchNorm(use_running_average=False, **options)
    variables = layer.init(KEY, data())
    assert set(variables["batch_stats"]) == {"mean", "var"} | added
    reference = bnlayer_jax.BatchNorm(layer.spec_of(3))
    for seed in range(2):
        y, variables = train(layer, variables, data(seed))
        expected, reference = reference(data(seed), training=True)
        np.testing.assert_allclose(y, expected, **CLOSE)
    names = {"mean": "moving_mean", "var": "moving_variance"}
    for name, value in variables["batch_stats"].items():
        np.testing.assert_allclose(value, getattr(reference.state, names.get(name, name)), **CLOSE)


def test_the_spec_is_of_the_fields() -> None:
    layer = BatchNorm(momentum=0.5, use_bias=False, axis=(1,), axis_name="i", param_dtype=jnp.bfloat16)
    expected = BatchNormSpec(
        4, axis=1, decay=0.5, center=False, synchronized=True, param_dtype="bfloat16", single_value="allow"
    )
    assert layer.spec_of(4) == expected


@pytest.mark.parametrize("shape", [(8, 5, 1), (5, 1), (8, 5, 3)])
@pytest.mark.parametrize("dtype", [bool, "float32"])
def test_masks_are_flaxs(shape: tuple[int, ...], dtype: Any) -> None:
    mask = (np.random.default_rng(1).random(shape) < 0.7).astype(dtype)
    variables = BatchNorm().init(KEY, data(), True)
    layers = [kind(use_running_average=False) for kind in (BatchNorm, Accurate)]
    assert_same(*(train(layer, variables, data(), mask=jnp.asarray(mask)) for layer in layers))


def test_weights_and_a_masked_whole_batch() -> None:
    layer = BatchNorm(False, momentum=0.0)
    variables = layer.init(KEY, data())
    weights = jnp.asarray([0, 1, 2, 0.5, 0, 0, 3, 1], jnp.float32)
    _, after = train(layer, variables, data(), weights=weights)
    np.testing.assert_allclose(after["batch_stats"]["mean"], np.average(data().mean(1), 0, weights), rtol=1e-5)
    y, after = train(layer, variables, data(), mask=jnp.zeros((8, 1, 1), bool))
    assert_same(after, variables)
    np.testing.assert_allclose(y, data() / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "call", "error", "message"),
    [
        ({"axis": (1, 2)}, {}, UnsupportedError, "axis must be one channel axis"),
        ({"axis_index_groups": [[0, 1]]}, {}, UnsupportedError, "axis_index_groups"),
        ({"epsilon": -1.0}, {}, SpecError, "epsilon"),
        ({"momentum": 1.5}, {}, SpecError, "decay"),
        ({}, {"x": jnp.ones((4, 3), complex)}, InputError, "complex64"),
        ({}, {"mask": jnp.ones((8, 1, 1)), "weights": jnp.ones(8)}, InputError, "give one of the two"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], call: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNorm(False, **fields).init(KEY, **{"x": data(), **call})


class Block(nn.Module):
    """A residual block, as compact modules have it."""

    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.relu(self.norm(use_running_average=False)(nn.Conv(3, (3,))(x)))


@pytest.mark.parametrize("lift", ["scan and remat", "vmap", "jit"])
def test_lifted_transforms(lift: str) -> None:
    class Model(nn.Module):
        norm: Any

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            if lift == "jit":
                return nn.jit(Block)(self.norm)(x)
            stack: dict[str, Any] = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
            if lift == "vmap":
                return nn.vmap(Block, **stack, in_axes=None, axis_size=2)(self.norm)(x)
            deep = nn.scan(lambda block, x: (block(x), None), **stack, length=2)
            return deep(nn.remat(Block)(self.norm), x)[0]

    results = []
    for norm in (BatchNorm, Accurate):
        model = Model(norm)
        variables = jax.jit(model.init)(KEY, data())

        @jax.jit
        def step(parameters: Any, statistics: Any, x: jax.Array, model: nn.Module = model) -> Any:
            def loss(parameters: Any) -> Any:
                y, after = model.apply({"params": parameters, "batch_stats": statistics}, x, mutable=["batch_stats"])
                return jnp.mean(y**3), after

            return jax.grad(loss, has_aux=True)(parameters)

        results.append((variables, step(variables["params"], variables["batch_stats"], data())))
    ours, theirs = results
    assert_same(ours, theirs)


def test_statistics_over_a_mapped_axis() -> None:
    layer, whole = BatchNorm(False, axis_name="replicas", momentum=0.0), BatchNorm(False, momentum=0.0)
    variables = whole.init(KEY, data())
    mask = jnp.asarray([True, True, False, False, True, False, True, True])[:, None, None]

    @jax.jit
    @partial(jax.vmap, in_axes=0, out_axes=(0, None), axis_name="replicas")
    def replica(x: jax.Array, mask: jax.Array) -> Any:
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    y, after = replica(data().reshape(4, 2, 5, 3), mask.reshape(4, 2, 1, 1))
    expected, joined = train(whole, variables, data(), mask=mask)
    np.testing.assert_allclose(y.reshape(8, 5, 3), expected, **CLOSE)
    assert_same(after["batch_stats"], joined["batch_stats"])


def test_single_examples_under_vmap() -> None:
    results = []
    for kind in (BatchNorm, Accurate):
        layer = kind(False, axis_name="batch")
        variables = layer.init(KEY, data()[0, 0])
        call = partial(layer.apply, variables, mutable=["batch_stats"])
        results.append(jax.jit(jax.vmap(call, axis_name="batch"))(data()[:, 0]))
    assert_same(*results)


@pytest.mark.parametrize("kinds", [(nn.BatchNorm, BatchNorm), (BatchNorm, nn.BatchNorm)], ids=["from Flax", "to Flax"])
def test_checkpoints_of_flax_load_and_back(kinds: tuple[Any, Any]) -> None:
    saver, loader = (Block(kind) for kind in kinds)
    _, saved = train(saver, saver.init(KEY, data()), data())
    into = loader.init(jax.random.key(1), data())
    loaded = flax.serialization.from_bytes(into, flax.serialization.to_bytes(saved))
    assert_same(loaded, saved)
    y = [
        Block(partial(kind)).apply(v, data(), mutable=["batch_stats"])[0]
        for kind, v in zip(kinds, (saved, loaded), strict=True)
    ]
    np.testing.assert_allclose(*y, rtol=1e-4, atol=1e-4)


def test_tabulate_shows_its_variables() -> None:
    table = nn.tabulate(BatchNorm(False, zero_debias="mean"), KEY, console_kwargs={"width": 200})(data())
    for name in ("BatchNorm", "mean", "var", "hidden_mean", "num_updates", "scale", "bias"):
        assert name in table
