"""Live models of Flax NNX, Flax Linen and Equinox: read as their files are, written, configured, run."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")
pytest.importorskip("equinox", reason="equinox is not installed")

import equinox as eqx
import flax.serialization
from flax import linen as nn
from flax import nnx

from bnlayer import UnsupportedError, checkpoint
from bnlayer.checkpoint import Checkpoint, CheckpointError, Tensor
from bnlayer.models import convert
from bnlayer_jax.linen import Inputs
from bnlayer_jax.model_equinox import ADAPTER as EQUINOX
from bnlayer_jax.model_linen import ADAPTER as LINEN
from bnlayer_jax.model_nnx import ADAPTER as NNX

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0.5, 1.5, (4, 8, 8, 3)).astype(np.float32)


class NnxNet(nnx.Module):
    """Names that do not sort as the layers lie."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 4, (3, 3), param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.75, epsilon=1e-3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.depth = nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.after = nnx.BatchNorm(8, use_scale=False, rngs=rngs)
        self.body = nnx.List([nnx.ConvTranspose(8, 4, (2, 2), transpose_kernel=True, rngs=rngs)])
        self.end = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.cell = nnx.LSTMCell(4, 4, rngs=rngs)
        self.classes = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        x = self.drop(self.norm(self.stem(x), use_running_average=not train))
        x = self.end(self.body[0](self.after(self.depth(x))))
        return {"logits": self.classes(x.mean((1, 2)))}


class LinenNet(nn.Module):
    """A compact model, whose dropout and batch norms train together."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.75, epsilon=1e-3)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.BatchNorm(name="after")(nn.ConvTranspose(4, (2, 2))(x), not train)
        return nn.Dense(5, name="classes")(nn.LayerNorm()(x.mean((1, 2))))


class EquinoxNet(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    more: list[Any]
    scale: jax.Array

    def __init__(self, mode: Any) -> None:
        self.stem = eqx.nn.Conv2d(3, 4, 3, groups=1, key=KEY)
        self.norm = eqx.nn.BatchNorm(4, "rows", mode=mode, momentum=0.75, eps=1e-3)
        self.drop = eqx.nn.Dropout(0.5)
        self.more = [eqx.nn.BatchNorm(4, "rows", mode=mode), eqx.nn.Linear(4, 5, dtype=jnp.bfloat16, key=KEY)]
        self.scale = jnp.ones(())

    def __call__(self, x: jax.Array, state: eqx.nn.State, *, key: Any) -> Any:
        x, state = self.norm(self.stem(x), state)
        x, state = self.more[0](self.drop(jax.nn.relu(x), key=key), state)
        return self.scale * self.more[1](x.mean((1, 2))), state


def linen_model() -> Any:
    module = LinenNet()
    variables = module.init(KEY, jnp.asarray(X))
    return module, variables, Inputs(jax.ShapeDtypeStruct(X.shape, jnp.float32), train=True)


def equinox_model(mode: str = "batch") -> Any:
    return eqx.nn.make_with_state(EquinoxNet)(mode)


CASES = [
    pytest.param(NNX, lambda: NnxNet(nnx.Rngs(0)), id="nnx"),
    pytest.param(LINEN, linen_model, id="linen"),
    pytest.param(EQUINOX, equinox_model, id="equinox"),
    pytest.param(EQUINOX, lambda: equinox_model("ema"), id="equinox-ema"),
]


def saved(model: Any, path: Path, like: Checkpoint) -> Checkpoint:
    """The file that the library itself writes, opened."""
    if isinstance(model, nnx.Module):
        state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
        path.write_bytes(flax.serialization.to_bytes(nnx.to_pure_dict(state)))
    elif isinstance(model[0], nn.Module):
        path.write_bytes(flax.serialization.to_bytes(model[1]))
    else:
        eqx.tree_serialise_leaves(path, model)
    return checkpoint.open(path, template=like)


def other(held: Checkpoint) -> Checkpoint:
    """Another value for every tensor."""
    new = {name: ~held[name] if held[name].dtype.kind == "b" else held[name] + 2 for name in held}
    return held.replace({name: array.astype(held[name].dtype) for name, array in new.items()})


def assert_equal(found: Checkpoint, wanted: Checkpoint) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name, strict=True)


@pytest.mark.parametrize(("adapter", "make"), CASES)
def test_a_model_reads_as_its_library_s_file_does(adapter: Any, make: Any, tmp_path: Path) -> None:
    model = make()
    found = adapter.read(model)
    assert_equal(saved(model, tmp_path / "x.eqx", found), found)
    assert found.order_is_meaningful
    stored = {one.name: one for one in found.batch_norms()}
    records = adapter.batch_norms(model)
    assert set(stored) == {record.name for record in records}
    for record in records:
        one = stored[record.name]
        assert (one.spec.epsilon, one.spec.decay) == (record.spec.epsilon, record.spec.decay)
        assert {one.sources["epsilon"], one.sources["decay"]} == {"file"}
        np.testing.assert_array_equal(one.state().moving_variance, record.state.moving_variance)


def test_layers_are_told_in_the_model_s_order() -> None:
    found = NNX.read(NnxNet(nnx.Rngs(0)))
    kinds = [(layer.name, layer.kind, layer.settings) for layer in found.layers if "cell" not in layer.name]
    flax = {"dialect": "flax"}
    assert [kind for kind in kinds if kind[1] != "flax.BatchNorm"] == [
        ("stem", "conv", {**flax, "groups": 1}),
        ("depth", "conv", {**flax, "groups": 4}),
        ("body.0", "conv transpose", {**flax, "transpose_kernel": True}),
        ("end", "norm", flax),
        ("classes", "dense", flax),
    ]
    assert [name for name, *_ in kinds] == ["stem", "norm", "depth", "after", "body.0", "end", "classes"]
    assert [layer.tensors for layer in found.layers if layer.name == "end"] == [
        {"gamma": "end/scale", "beta": "end/bias"}
    ]
    assert list(found)[:2] == ["stem/kernel", "stem/bias"]
    assert found["stem/kernel"].dtype == ml_dtypes.bfloat16
    assert [(layer.name, layer.kind) for layer in LINEN.read(linen_model()).layers] == [
        ("stem", "conv"), ("BatchNorm_0", "flax.BatchNorm"), ("ConvTranspose_0", "conv transpose"),
        ("after", "flax.BatchNorm"), ("LayerNorm_0", "norm"), ("classes", "dense"),
    ]  # fmt: skip
    assert [(layer.name, layer.kind) for layer in EQUINOX.read(equinox_model()).layers] == [
        ("", "EquinoxNet"), ("stem", "conv"), ("norm", "equinox.nn.BatchNorm"), ("more[0]", "equinox.nn.BatchNorm"),
        ("more[1]", "dense"),
    ]  # fmt: skip


def test_a_sorted_order_is_not_the_model_s() -> None:
    model = NnxNet(nnx.Rngs(0))
    nnx.jit(lambda model: None)(model)
    assert not NNX.read(model).order_is_meaningful
    module, variables, inputs = linen_model()
    bare = LINEN.read((module, variables))
    assert bare.order_is_meaningful and bare.layers == ()
    assert {"epsilon": "assumed"}.items() <= bare.batch_norms()[0].sources.items()
    variables = jax.tree.map(lambda leaf: leaf, variables)
    assert not LINEN.read((module, variables)).order_is_meaningful
    assert next(iter(LINEN.read((module, variables, inputs)))) == "params/stem/bias"
    assert LINEN.read((module, variables, inputs)).order_is_meaningful


@pytest.mark.parametrize(("adapter", "make"), CASES)
def test_what_is_written_is_read_back_in_the_model_s_dtypes(adapter: Any, make: Any) -> None:
    model = make()
    held = adapter.read(model)
    wanted = other(held)
    wide = {n: Tensor.of(a.astype(np.float64) if a.dtype.kind not in "bi" else a) for n, a in wanted.items()}
    written = adapter.write(model, Checkpoint("npz", wide, order_is_meaningful=False))
    assert type(written) is type(model) and (written is model) == isinstance(model, nnx.Module)
    assert_equal(adapter.read(written), wanted)
    assert jax.tree.structure(adapter.write(written, held)) == jax.tree.structure(model)


@pytest.mark.parametrize(("adapter", "make"), CASES)
def test_what_does_not_fit_is_refused_and_nothing_written(adapter: Any, make: Any) -> None:
    model = make()
    held = adapter.read(model)
    before = {name: held[name] for name in held}
    given = dict(other(held).tensors)
    last = next(name for name in given if given[name].shape)
    wrong = {
        f"{last} is missing": {n: t for n, t in given.items() if n != last},
        "more is none of the model's": {**given, "more": given[last]},
        rf"{last} is \(7,\), and": {**given, last: Tensor.of(np.zeros(7, np.float32))},
    }
    for message, tensors in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            adapter.write(model, Checkpoint("npz", tensors, order_is_meaningful=False))
    after = adapter.read(model)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_a_count_takes_no_fraction() -> None:
    model = equinox_model()
    held = EQUINOX.read(model)
    tensors = {**held.tensors, "norm.batch_counter": Tensor.of(np.array(0.5))}
    with pytest.raises(CheckpointError, match="batch_counter is int32 in the model"):
        EQUINOX.write(model, Checkpoint("npz", tensors, order_is_meaningful=True))


@pytest.mark.parametrize(("adapter", "make"), CASES)
def test_configured_layers_compute_so(adapter: Any, make: Any) -> None:
    model = make()
    plain = adapter.run(model, X, training=True).output
    specs = {r.name: r.spec.replace(epsilon=0.5, decay=0.25) for r in adapter.batch_norms(model)}
    configured = adapter.configure(make(), specs)
    assert {(r.spec.epsilon, r.spec.decay) for r in adapter.batch_norms(configured)} == {(0.5, 0.25)}
    run = adapter.run(configured, X, training=True, capture=True)
    assert np.abs(run.output - plain).max() > 1e-3 or (adapter is EQUINOX and "ema" in str(model))
    given, y = run.layers[adapter.batch_norms(model)[0].name]
    axis = 1 if adapter is EQUINOX else -1
    if "ema" not in str(jax.tree.leaves(model, is_leaf=lambda n: isinstance(n, eqx.nn.BatchNorm))):
        axes = tuple(i for i in range(4) if i != axis % 4)
        wanted = (given - given.mean(axes, keepdims=True)) / np.sqrt(given.var(axes, keepdims=True) + 0.5)
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="cumulative"):
        adapter.configure(
            make(), {name: spec.replace(decay="cumulative", zero_debias="none") for name, spec in specs.items()}
        )


def test_a_compact_layer_is_configured_through_inputs_only() -> None:
    module, variables, inputs = linen_model()
    specs = {r.name: r.spec.replace(epsilon=0.5) for r in LINEN.batch_norms((module, variables, inputs))}
    with pytest.raises(UnsupportedError, match="a @compact method of the model makes it"):
        LINEN.configure((module, variables), specs)
    native = LINEN.configure((module, variables, inputs), specs)
    ours = convert(native).model
    assert {r.spec.epsilon for r in LINEN.batch_norms(ours)} == {0.5}
    outputs = [LINEN.run(model, X, training=True).output for model in (native, ours)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)


def test_nnx_runs_as_its_own_training_call_without_dropout() -> None:
    model, twin = NnxNet(nnx.Rngs(0)), NnxNet(nnx.Rngs(0))
    model.drop.deterministic, model.after.use_running_average = False, True
    run = NNX.run(model, X, training=True, capture=True)
    twin.drop.deterministic = True
    expected = twin(jnp.asarray(X), train=True)["logits"]
    np.testing.assert_allclose(run.output, expected, rtol=1e-5, atol=1e-5)
    assert run.model is model
    assert_equal(NNX.read(model), NNX.read(twin))
    assert not model.drop.deterministic and model.after.use_running_average and not model.norm.use_running_average
    assert type(model.norm) is nnx.BatchNorm and type(model.drop) is nnx.Dropout
    assert run.calls == ("stem", "norm", "depth", "after", "body.0", "end", "classes")
    assert list(run.layers) == ["norm", "after"]
    before = NNX.read(twin)["norm/mean"]
    evaluated = NNX.run(model, X, training=False)
    twin.eval()
    np.testing.assert_allclose(evaluated.output, twin(jnp.asarray(X))["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(NNX.read(model)["norm/mean"], before)


def test_nnx_flags_come_back_after_a_failure() -> None:
    model = NnxNet(nnx.Rngs(0))
    with pytest.raises((TypeError, ValueError)):
        NNX.run(model, X[..., :2], training=True)
    assert type(model.norm) is nnx.BatchNorm and not model.norm.use_running_average and not model.drop.deterministic


@pytest.mark.parametrize("kind", ["native", "bnlayer"])
@pytest.mark.parametrize("train", [False, True])
def test_linen_runs_as_its_own_training_call_without_dropout(kind: Any, train: bool) -> None:
    class Plain(LinenNet):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = nn.relu(nn.BatchNorm(not train, momentum=0.75, epsilon=1e-3)(nn.Conv(4, (3, 3), name="stem")(x)))
            x = nn.BatchNorm(name="after")(nn.ConvTranspose(4, (2, 2))(x), not train)
            return nn.Dense(5, name="classes")(nn.LayerNorm()(x.mean((1, 2))))

    module, variables, _ = linen_model()
    model = convert((module, variables, Inputs(jnp.asarray(X), train=train)), kind).model
    expected, after = Plain().apply(variables, jnp.asarray(X), True, mutable=["batch_stats"])
    run = LINEN.run(model, X, training=True, capture=True)
    np.testing.assert_allclose(run.output, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run.model[1]["batch_stats"],
                 after["batch_stats"])  # fmt: skip
    assert set(run.model[1]) == {"params", "batch_stats"}
    assert run.calls == ("stem", "BatchNorm_0", "ConvTranspose_0", "after", "LayerNorm_0", "classes")
    assert {name: y.shape for name, (_, y) in run.layers.items()} == {
        "BatchNorm_0": (4, 8, 8, 4), "after": (4, 8, 8, 4)
    }  # fmt: skip
    evaluated = LINEN.run(run.model, X, training=False)
    expected = Plain().apply(run.model[1], jnp.asarray(X), False)
    np.testing.assert_allclose(evaluated.output, expected, rtol=1e-4, atol=1e-5)
    assert evaluated.model[1] is run.model[1] and evaluated.layers == {} and evaluated.calls == ()


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox_runs_as_its_own_training_call_without_dropout(mode: str) -> None:
    module, state = equinox_model(mode)
    run = EQUINOX.run((module, state), X, training=True, capture=True)
    still = eqx.tree_at(lambda m: m.drop.inference, module, replace=True)
    mapped = jax.vmap(lambda x, s: still(x, s, key=None), axis_name="rows", in_axes=(0, None), out_axes=(0, None))
    expected, after = mapped(jnp.moveaxis(jnp.asarray(X), -1, 1), state)
    np.testing.assert_allclose(run.output, expected, rtol=1e-5, atol=1e-5)
    assert run.output.dtype == np.float32
    assert_equal(EQUINOX.read(run.model), EQUINOX.read((module, after)))
    assert not run.model[0].drop.inference
    assert run.calls == ("", "stem", "norm", "more[0]", "more[1]")
    given, y = run.layers["norm"]
    assert given.shape == y.shape == (4, 4, 6, 6)
    evaluated = EQUINOX.run(run.model, X, training=False)
    assert_equal(EQUINOX.read(evaluated.model), EQUINOX.read(run.model))
    # The first update of "ema" enters whole, so that its eval is what its training was.
    assert (np.abs(evaluated.output - run.output).max() > 0) == (mode == "batch")


def test_equinox_s_arguments() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlp = eqx.nn.MLP(3, 5, 4, 1, key=KEY)
    assert EQUINOX.run(mlp, X[:, 0, 0], training=False, capture=True).calls == ("layers[0]", "layers[1]")
    with pytest.raises(UnsupportedError, match=r"asks for 'state'.*Give the pair"):
        EQUINOX.run(equinox_model()[0], X, training=True)


def test_equinox_files_are_written(tmp_path: Path) -> None:
    model = equinox_model()
    changed = other(EQUINOX.read(model))
    changed.save(tmp_path / "x.eqx")
    eqx.tree_serialise_leaves(tmp_path / "y.eqx", EQUINOX.write(model, changed))
    assert (tmp_path / "x.eqx").read_bytes() == (tmp_path / "y.eqx").read_bytes()
    assert_equal(EQUINOX.read(eqx.tree_deserialise_leaves(tmp_path / "x.eqx", model)), changed)


def test_haiku_pickles_are_pairs_of_modules(tmp_path: Path) -> None:
    arrays = {
        "params/net/~/bn/scale": np.ones(2, ml_dtypes.bfloat16),
        "state/net/~/bn/~/mean_ema/counter": np.array(3, np.int32),
        "params/net/~/conv/w": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
    }
    made = Checkpoint("made", {n: Tensor.of(a) for n, a in arrays.items()}, order_is_meaningful=True)
    made.save(tmp_path / "x.pkl")
    params, state = pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert list(params) == ["net/~/bn", "net/~/conv"] and state["net/~/bn/~/mean_ema"]["counter"] == 3
    assert params["net/~/bn"]["scale"].dtype == ml_dtypes.bfloat16
    assert_equal(checkpoint.open(tmp_path / "x.pkl"), made)
    made = Checkpoint("made", {n: Tensor.of(np.ones(2)) for n in ("linear/w", "linear/b")}, order_is_meaningful=True)
    made.save(tmp_path / "y.pkl")
    assert list(pickle.loads((tmp_path / "y.pkl").read_bytes())["linear"]) == ["w", "b"]
    clash = Checkpoint("made", {n: Tensor.of(np.ones(2)) for n in ("a", "a/b")}, order_is_meaningful=True)
    with pytest.raises(CheckpointError, match="'a' is also the module"):
        clash.save(tmp_path / "z.pkl")
