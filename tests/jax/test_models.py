"""Live models of Flax NNX, Flax Linen and Equinox: converted to our batch norms and back, frozen, trained on."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")
pytest.importorskip("equinox", reason="equinox is not installed")

import equinox as eqx
import flax.serialization
from flax import linen as nn
from flax import nnx

from bnlayer import InputError, UnsupportedError
from bnlayer.models import batch_norms, convert, freeze, unfreeze
from bnlayer_jax import equinox as our_equinox
from bnlayer_jax import linen as our_linen
from bnlayer_jax import nnx as our_nnx
from bnlayer_jax.linen import Inputs

CLOSE = {"rtol": 1e-5, "atol": 5e-6}
KEY = jax.random.key(0)


def data(seed: int = 0, shape: tuple[int, ...] = (6, 8, 3)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 1.5, shape), jnp.float32)


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), ours, theirs)


def test_the_adapters_import_no_framework() -> None:
    code = (
        "import sys, bnlayer_jax.model_nnx as a, bnlayer_jax.model_linen as b, bnlayer_jax.model_equinox as c;"
        "assert not any(m.ADAPTER.owns(object()) for m in (a, b, c));"
        "assert not {'jax', 'flax', 'equinox'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- Flax NNX


class NnxBlock(nnx.Module):
    """A residual block, and layers in containers, one of them a second time."""

    def __init__(self, norm: Any, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 3, (3,), rngs=rngs)
        self.norm = norm(3, momentum=0.9, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), norm(3, use_bias=False, rngs=rngs), jax.nn.relu)
        self.more = nnx.data({"held": (norm(3, rngs=rngs), self.head.layers[1])})

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + jax.nn.relu(self.norm(self.conv(x)))
        return self.more["held"][0](self.head(self.more["held"][1](x)))


NnxNative = partial(nnx.BatchNorm, use_fast_variance=False)


@nnx.jit
def nnx_step(model: nnx.Module, x: jax.Array) -> jax.Array:
    """One step of gradient descent; y before it."""
    gradients, y = nnx.grad(lambda model: (lambda y: ((y**3).mean(), y))(model(x)), has_aux=True)(model)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients))
    return y


def test_nnx_models_are_converted_in_place_and_back() -> None:
    model, twin = NnxBlock(NnxNative, nnx.Rngs(0)), NnxBlock(NnxNative, nnx.Rngs(0))
    for each in (model, twin):
        nnx_step(each, data())
    variables = jax.tree.leaves(nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable))
    scale, mean, norm = model.norm.scale, model.norm.mean, model.norm

    done = convert(model)
    assert done.model is model
    assert [record.name for record in done.replaced] == ["head.layers.1", "more.held.0", "norm"]
    assert type(model.norm) is our_nnx.BatchNorm is type(model.head.layers[1]) is type(model.more["held"][0])
    assert model.more["held"][1] is model.head.layers[1]
    assert model.norm is not norm
    assert model.norm.scale is scale and model.norm.mean is mean
    assert len(jax.tree.leaves(nnx.state(model))) == len(variables)
    np.testing.assert_allclose(nnx_step(model, data(1)), nnx_step(twin, data(1)), **CLOSE)
    assert_same(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(twin)))

    *_, first = batch_norms(model)
    assert first.spec is not None and first.state is not None
    assert (first.kind, first.spec.decay, first.spec.single_value) == ("bnlayer", 0.9, "allow")
    np.testing.assert_array_equal(first.state.moving_mean, mean[...])
    model.eval()
    assert str(convert(model, "native")).endswith("the framework's own: 3 replaced, 0 kept, 0 refused")
    assert type(model.norm) is nnx.BatchNorm and model.norm.scale is scale and not model.norm.use_fast_variance
    assert model.norm.use_running_average
    twin.eval()
    np.testing.assert_allclose(model(data()), twin(data()), **CLOSE)


def test_nnx_optimizers_go_on_with_a_converted_model() -> None:
    optax = pytest.importorskip("optax", reason="optax is not installed")
    model, twin = NnxBlock(NnxNative, nnx.Rngs(0)), NnxBlock(NnxNative, nnx.Rngs(0))

    @nnx.jit
    def step(model: nnx.Module, optimizer: Any, x: jax.Array) -> None:
        optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).mean())(model))

    optimizers = [nnx.Optimizer(each, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for each in (model, twin)]
    for round in range(2):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            step(each, optimizer, data(round))
        convert(model)
    assert_same(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(twin)))


def test_nnx_freezing_survives_train() -> None:
    model = NnxBlock(our_nnx.BatchNorm, nnx.Rngs(0))
    freeze(model, "norm", parameters=False)
    freeze(model, "head*", statistics=False)
    model.train()
    flags = {r.name: (r.layer.frozen_statistics, r.layer.frozen_parameters) for r in batch_norms(model)}
    assert flags == {"norm": (True, False), "head.layers.1": (False, True), "more.held.0": (False, False)}
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    nnx_step(model, data())
    after = nnx.to_pure_dict(nnx.state(model))
    np.testing.assert_array_equal(after["norm"]["mean"], before["norm"]["mean"])
    assert np.abs(after["norm"]["scale"] - before["norm"]["scale"]).max() > 0
    np.testing.assert_array_equal(after["head"]["layers"][1]["scale"], before["head"]["layers"][1]["scale"])
    assert np.abs(after["head"]["layers"][1]["mean"]).max() > 0
    with pytest.raises(UnsupportedError, match="no frozen_statistics=True"):
        convert(model, "native")
    unfreeze(model)
    assert len(convert(model, "native").replaced) == 3
    with pytest.raises(UnsupportedError, match="cannot freeze its statistics"):
        freeze(model)


def test_what_cannot_be_converted_is_refused_and_nothing_is() -> None:
    class Other(nnx.BatchNorm):
        pass

    rngs = nnx.Rngs(0)
    grouped = nnx.BatchNorm(3, axis_name="i", axis_index_groups=((0, 1),), rngs=rngs)
    model = nnx.List([nnx.BatchNorm(3, rngs=rngs), Other(3, rngs=rngs), grouped])
    with pytest.raises(UnsupportedError, match=r"(?s)2 batch norms cannot.*Other is a subclass.*2: axis_index"):
        convert(model)
    assert type(model[0]) is nnx.BatchNorm
    done = convert(model, allow_partial=True)
    assert (len(done.replaced), len(done.refused)) == (1, 2)
    assert [type(layer) for layer in model] == [our_nnx.BatchNorm, Other, nnx.BatchNorm]


def test_stacked_nnx_layers_are_converted_too() -> None:
    create = nnx.vmap(lambda rngs: nnx.List([NnxNative(3, rngs=rngs)]))
    model = nnx.split_rngs(splits=2)(create)(nnx.Rngs(0))
    (record,) = batch_norms(model)
    assert record.spec is not None and record.state is None and not record.reason
    run = nnx.jit(lambda model, x: nnx.vmap(lambda model, x: model[0](x), in_axes=(0, None))(model, x))
    expected = run(model, data())
    np.testing.assert_allclose(run(convert(model).model, data()), expected, **CLOSE)


def test_a_model_that_is_one_layer() -> None:
    done = convert(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert type(done.model) is our_nnx.BatchNorm


# -- Flax Linen

LinenNative = partial(nn.BatchNorm, use_fast_variance=False)


class LinenBlock(nn.Module):
    """A residual block whose norm is a field's, made in a compact method."""

    norm: Any = LinenNative

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return x + nn.relu(self.norm(use_running_average=not train, momentum=0.9)(nn.Conv(3, (3,))(x)))


class LinenNet(nn.Module):
    """Blocks of every kind: compact, lifted, and with names."""

    norm: Any = LinenNative

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = LinenBlock(self.norm)(x, train)
        deep = nn.scan(
            lambda block, x: (block(x, train), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = deep(nn.remat(LinenBlock, static_argnums=(2,))(self.norm, name="deep"), x)
        return self.norm(use_running_average=not train, name="last")(x)

    def mean(self, x: jax.Array) -> jax.Array:
        return self(x, False).mean()


class SetUp(nn.Module):
    """Norms held by setup, as attribute, list and dictionary, and by a field."""

    given: nn.Module

    def setup(self) -> None:
        self.norm = LinenNative()
        self.many = [LinenNative(epsilon=0.1, axis=[-1]), nn.Dense(3)]
        self.named = {"left_one": LinenNative(momentum=0.5)}

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for layer in (self.given, self.norm, self.many[0], self.named["left_one"]):
            x = layer(x, use_running_average=not train)
        return x


@pytest.fixture(scope="module")
def linen() -> Any:
    model = LinenNet()
    return model, jax.jit(model.init, static_argnums=2)(KEY, data(), True)


@partial(jax.jit, static_argnums=0)
def linen_step(model: nn.Module, variables: Any, x: jax.Array) -> Any:
    """One step of gradient descent: y before it, and the variables after."""

    def loss(parameters: Any) -> Any:
        y, updates = model.apply({**variables, "params": parameters}, x, True, mutable=["batch_stats"])
        return (y**3).mean(), (y, updates)

    gradients, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
    return y, {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients), **updates}


def test_linen_models_run_ours_on_the_same_variables_and_back(linen: Any) -> None:
    model, variables = linen
    done = convert((model, variables, Inputs(jax.ShapeDtypeStruct((6, 8, 3), jnp.float32), True)))
    names = ["LinenBlock_0/BatchNorm_0", "deep/BatchNorm_0", "last"]
    assert [record.name for record in done.replaced] == names
    ours, same, _ = done.model
    assert same is variables
    expected, after = linen_step(model, variables, data())
    y, our_after = linen_step(ours, variables, data())
    np.testing.assert_allclose(y, expected, **CLOSE)
    assert_same(our_after, after)
    evaluated = model.apply(after, data(), False)
    np.testing.assert_allclose(ours.apply(after, data(), False), evaluated, **CLOSE)
    for method in ("mean", LinenNet.mean):
        np.testing.assert_allclose(
            ours.apply(after, data(), method=method), model.apply(after, data(), False).mean(), atol=1e-5
        )

    records = {record.name: record for record in batch_norms((ours, after))}
    assert {record.kind for record in records.values()} == {"bnlayer"}
    assert records["last"].spec.decay == 0.99 and records["LinenBlock_0/BatchNorm_0"].spec.decay == 0.9
    np.testing.assert_array_equal(records["last"].state.moving_mean, after["batch_stats"]["last"]["mean"])
    assert records["deep/BatchNorm_0"].state is None  # of two layers, stacked
    back, _ = convert((ours, after), "native").model
    assert back is model


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize("compiled", [nn.jit(Inner), partial(nn.jit(nn.BatchNorm), use_running_average=False)])
def test_what_nn_jit_has_compiled_is_traced_anew(compiled: Any) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return compiled(name="inner")(x)  # one compiled function for every model that uses it

    x = data(shape=(512, 3)) + 10000
    model = Model()
    variables = model.init(KEY, x)
    run = lambda model: float(model.apply(variables, x, mutable=["batch_stats"])[0].std())  # noqa: E731
    first = run(model)
    ours = convert((model, variables, x)).model[0]
    assert abs(run(ours) - 1) < 1e-3 < 0.1 < abs(first - 1)
    assert run(model) == first


def test_linen_setup_and_fields_need_no_inputs() -> None:
    model = SetUp(LinenNative(name="given"))
    variables = model.init(KEY, data(), True)
    done = convert((model, variables))
    assert {record.name for record in done.replaced} == {"given", "norm", "many_0", "named_left_one"}
    assert {r.name: (r.spec.epsilon, r.spec.decay) for r in done.replaced}["many_0"] == (0.1, 0.99)
    assert_same(linen_step(done.model[0], variables, data()), linen_step(model, variables, data()))


def test_linen_compact_models_say_what_they_need(linen: Any) -> None:
    model, variables = linen
    with pytest.raises(UnsupportedError, match=r"last: no field and no setup.*give \(module, variables, inputs\)"):
        convert((model, variables))
    with pytest.raises(InputError, match="got a module alone"):
        convert(model)


def test_converted_linen_models_init_nest_and_load(linen: Any) -> None:
    model, variables = linen
    ours = convert((model, variables, Inputs(data(), False))).model[0]
    assert_same(jax.jit(ours.init, static_argnums=2)(KEY, data(), True), variables)
    stored = flax.serialization.to_bytes(variables)
    assert_same(flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, variables), stored), variables)

    class Larger(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            return nn.Dense(2)(self.backbone(x, train))

    larger = jax.jit(Larger(model).init, static_argnums=2)(KEY, data(), False)
    np.testing.assert_allclose(
        Larger(ours).apply(larger, data(), False), Larger(model).apply(larger, data(), False), **CLOSE
    )
    assert "LinenBlock_0/BatchNorm_0" in ours.tabulate(KEY, data(), True, console_kwargs={"width": 200})


def test_linen_freezing(linen: Any) -> None:
    model, variables = linen
    with pytest.raises(UnsupportedError, match="cannot freeze its statistics: last"):
        freeze((model, variables, Inputs(data(), True)), "last")
    own = LinenNet(our_linen.BatchNorm)  # ours by its own code: nothing to convert
    given = (own, variables, Inputs(data(), True))
    frozen = freeze(freeze(given, "last", parameters=False), "LinenBlock_0*", statistics=False)
    _, after = linen_step(frozen[0], variables, data())
    same = lambda *path: np.array_equal(leaf(after, path), leaf(variables, path))  # noqa: E731

    def leaf(tree: Any, path: tuple[str, ...]) -> Any:
        for name in path:
            tree = tree[name]
        return tree

    block = ("LinenBlock_0", "BatchNorm_0")
    assert same("batch_stats", "last", "mean") and not same("params", "last", "bias")
    assert same("params", *block, "bias") and not same("batch_stats", *block, "mean")
    with pytest.raises(UnsupportedError, match="no frozen_statistics=True"):
        convert(frozen, "native")
    assert unfreeze(frozen)[0] is own
    back = convert(given, "native").model[0]
    np.testing.assert_allclose(back.apply(after, data(), False), own.apply(after, data(), False), **CLOSE)


# -- Equinox


class EquinoxBlock(eqx.Module):
    """A residual block, and norms in a list."""

    conv: eqx.nn.Conv1d
    norm: Any
    more: list[Any]

    def __init__(self, norm: Any) -> None:
        self.conv = eqx.nn.Conv1d(3, 3, 3, padding=1, key=KEY)
        self.norm = norm(3, "batch", mode="batch", momentum=0.9)
        self.more = [norm(3, "batch", mode="batch", channelwise_affine=False)]

    def __call__(self, x: jax.Array, state: Any) -> Any:
        y, state = self.norm(self.conv(x), state)
        return self.more[0](x + jax.nn.relu(y), state)


@eqx.filter_jit
def equinox_step(model: Any, state: Any, x: jax.Array) -> Any:
    """One step of gradient descent: y before it, and model and state after."""

    def loss(model: Any) -> Any:
        y, after = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)
        return (y**3).mean(), (y, after)

    gradients, (y, after) = eqx.filter_grad(loss, has_aux=True)(model)
    return y, eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradients)), after


def examples(seed: int = 0) -> jax.Array:
    return jnp.moveaxis(data(seed), -1, 1)


def test_equinox_models_are_converted_and_back() -> None:
    model, state = eqx.nn.make_with_state(EquinoxBlock)(eqx.nn.BatchNorm)
    done = convert((model, state))
    assert [record.name for record in done.replaced] == ["norm", "more[0]"]
    ours, same = done.model
    assert same is state and type(ours.more[0]) is our_equinox.BatchNorm
    theirs, their_state = model, state
    for seed in range(2):
        expected, theirs, their_state = equinox_step(theirs, their_state, examples(seed))
        y, ours, state = equinox_step(ours, state, examples(seed))
        np.testing.assert_allclose(y, expected, **CLOSE)
    assert_same(jax.tree.leaves(eqx.filter(ours, eqx.is_array)), jax.tree.leaves(eqx.filter(theirs, eqx.is_array)))
    records = batch_norms((ours, state))
    assert [(r.kind, r.spec.decay, r.spec.zero_debias, int(r.state.num_updates)) for r in records] == [
        ("bnlayer", 0.9, "all", 2), ("bnlayer", 0.99, "all", 2)
    ]  # fmt: skip
    back, state = convert((ours, state), "native").model
    assert jax.tree.structure(back) == jax.tree.structure(model)
    inference = eqx.nn.inference_mode(back), eqx.nn.inference_mode(ours)
    run = [
        jax.vmap(m, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(examples(), state)[0] for m in inference
    ]
    np.testing.assert_allclose(*run, **CLOSE)


def test_equinox_modules_alone_and_mode_ema() -> None:
    model = EquinoxBlock(eqx.nn.BatchNorm)
    ours = convert(model).model
    assert type(ours) is EquinoxBlock and type(ours.norm) is our_equinox.BatchNorm
    assert all(record.state is None for record in batch_norms(ours))
    ema = eqx.tree_at(lambda m: m.norm, model, eqx.nn.BatchNorm(3, "batch", mode="ema"))
    with pytest.raises(UnsupportedError, match="normalizes with the moving average in training too"):
        convert(ema)


def test_equinox_freezing() -> None:
    model = eqx.nn.make_with_state(EquinoxBlock)(our_equinox.BatchNorm)
    frozen, state = freeze(freeze(model, "norm"), "more*", parameters=False)
    _, trained, after = equinox_step(eqx.nn.inference_mode(frozen, value=False), state, examples())
    assert_same(after, state)
    np.testing.assert_array_equal(trained.norm.weight, model[0].norm.weight)
    assert np.abs(trained.conv.weight - model[0].conv.weight).max() > 0
    with pytest.raises(UnsupportedError, match="frozen_statistics=True"):
        convert((frozen, state), "native")
    free, _ = unfreeze((frozen, state))
    assert jax.tree.structure(free) == jax.tree.structure(model[0])
    with pytest.raises(UnsupportedError, match="cannot freeze its statistics"):
        freeze(convert((free, state), "native").model)
