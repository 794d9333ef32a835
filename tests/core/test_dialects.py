"""The dialect table: what it says, that it says it both ways, and that the frameworks agree."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bnlayer import BatchNormSpec, BatchNormState, DialectError, Renorm, SpecError
from bnlayer.dialects import DIALECTS, complement, dialect
from bnlayer.words import REQUIRED

FIELDS = [f.name for f in dataclasses.fields(BatchNormSpec)]

# What must be given even for the defaults.
NEEDED: dict[str, dict[str, Any]] = {
    "haiku": {"create_scale": True, "create_offset": True, "decay_rate": 0.9},
    "equinox": {"mode": "batch"},
}

unit = st.floats(0.0, 1.0)
flags = st.booleans()
dtypes = st.sampled_from(["float16", "bfloat16", "float32", "float64"])


def clip(low: float) -> st.SearchStrategy[float | None]:
    return st.none() | st.floats(low, low + 5.0)


@st.composite
def specs(draw: st.DrawFn) -> BatchNormSpec:
    """Any spec at all, most of them beyond any one framework."""
    fields = {
        "axis": draw(st.sampled_from([1, 2, 3, -1, -2])),
        "epsilon": draw(st.floats(0.0, 1.0)),
        "decay": draw(unit | st.just("cumulative")),
        "center": draw(flags),
        "scale": draw(flags),
        "moving_variance_estimator": draw(st.sampled_from(["biased", "unbiased"])),
        "zero_debias": draw(st.sampled_from(["none", "none", "mean", "all"])),
        "renorm": draw(
            st.none() | st.builds(Renorm, r_max=clip(1.0), r_min=st.none() | unit, d_max=clip(0.0), decay=unit)
        ),
        "virtual_batch_size": draw(st.none() | st.integers(1, 8)),
        "virtual_batch_layout": draw(st.sampled_from(["strided", "consecutive"])),
        "track_moving_stats": draw(flags),
        "single_value": draw(st.sampled_from(["raise", "allow"])),
        "nonfinite": draw(st.sampled_from(["propagate", "keep"])),
        "synchronized": draw(flags),
        "param_dtype": draw(dtypes),
        "stats_dtype": draw(dtypes),
    }
    kept = draw(st.sets(st.sampled_from(sorted(fields))))
    try:
        return BatchNormSpec(draw(st.integers(1, 5)), **{name: fields[name] for name in kept})
    except SpecError:
        assume(False)
        raise


keras_like: dict[str, st.SearchStrategy[Any]] = {
    "axis": st.sampled_from([-2, -1, 1, 2]),
    "momentum": unit,
    "epsilon": unit,
    "center": flags,
    "scale": flags,
    "renorm": flags,
    "renorm_clipping": st.none()
    | st.fixed_dictionaries({}, optional={"rmax": st.floats(1, 5), "rmin": unit, "dmax": st.floats(0, 5)}),
    "renorm_momentum": unit,
    "name": st.text(max_size=3),
}
tf_like = {
    **keras_like,
    "axis": keras_like["axis"] | st.sampled_from([-1, 1]).map(lambda axis: [axis]),
    "fused": st.sampled_from([None, False]),
    "virtual_batch_size": st.none() | st.integers(1, 4),
}
ARGUMENTS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "torch": {
        "eps": unit,
        "momentum": st.none() | st.integers(0, 10**15).map(lambda k: k / 10**15),
        "affine": flags,
        "bias": flags,
        "dtype": st.none() | dtypes,
    },
    "keras": {**keras_like, "synchronized": flags, "dtype": st.none() | dtypes | st.just("mixed_float16")},
    "tf_keras": {**tf_like, "dtype": st.none() | dtypes | st.just("mixed_bfloat16")},
    "tf_layers": tf_like,
    "contrib": {
        "decay": st.floats(0.0, 1.0, exclude_max=True),
        "epsilon": unit,
        "center": flags,
        "scale": flags,
        "data_format": st.sampled_from(["NHWC", "NCHW"]),
        "zero_debias_moving_mean": flags,
        "fused": st.sampled_from([None, True, False]),
        "updates_collections": st.sampled_from(["update_ops", None]),
    },
    "flax": {
        "axis": st.sampled_from([-1, 1, (2,)]),
        "momentum": unit,
        "epsilon": unit,
        "use_bias": flags,
        "use_scale": flags,
        "axis_name": st.none() | st.text(min_size=1, max_size=3),
        "param_dtype": dtypes,
        "use_running_average": st.none() | flags,
    },
    "haiku": {
        "create_scale": flags,
        "create_offset": flags,
        "decay_rate": st.floats(0.0, 1.0, exclude_max=True),
        "eps": unit,
        "data_format": st.sampled_from(["channels_last", "channels_first", "NCHW", "NHWC", "N...C", "NC...", "BTD"]),
        "cross_replica_axis": st.none() | st.just("i"),
    },
    "equinox": {
        "axis_name": st.sampled_from(["batch", ("batch",), ("batch", "devices")]),
        "eps": unit,
        "momentum": st.floats(0.0, 1.0, exclude_max=True),
        "channelwise_affine": flags,
        "dtype": st.none() | dtypes,
        "inference": flags,
    },
    "onnx": {"epsilon": unit, "momentum": unit, "training_mode": st.sampled_from([0, 1])},
}


def read(name: str, arguments: dict[str, Any], rank: int | None, num_features: int) -> BatchNormSpec:
    """The spec of what `to_dialect` returned, with the channels where the framework does not take them."""
    counted = {} if DIALECTS[name].features else {"num_features": num_features}
    return BatchNormSpec.from_dialect(name, rank=rank, **counted, **arguments)


# --- complement


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.1, 0.9), (0.01, 0.99), (0.001, 0.999), (0.3, 0.7), (0.0, 1.0), (0.5, 0.5), (0.0003, 0.9997)],
)
def test_complement_of_what_people_write(value: float, expected: float) -> None:
    assert complement(value) == expected
    assert complement(expected) == value


@given(st.floats(0.5, 1.0))
def test_complement_of_a_decay_always_comes_back(value: float) -> None:
    assert complement(complement(value)) == value


@given(st.integers(0, 15).flatmap(lambda places: st.tuples(st.integers(0, 10**places), st.just(places))))
def test_complement_of_a_decimal_always_comes_back(decimal: tuple[int, int]) -> None:
    digits, places = decimal
    value = float(f"{digits}e-{places}")
    assert complement(complement(value)) == value


@given(unit)
def test_complement_is_one_minus_the_value_to_the_last_bit(value: float) -> None:
    assert abs(complement(value) - (1.0 - value)) <= 2**-53
    assert abs(complement(complement(value)) - value) <= 2**-53


# --- the table


@pytest.mark.parametrize("name", DIALECTS)
def test_each_field_is_decided_exactly_once(name: str) -> None:
    said = [field for word in DIALECTS[name].words for field in word.fields]
    assert sorted([*said, *DIALECTS[name].fixed, "num_features"]) == sorted(FIELDS)


@pytest.mark.parametrize("name", DIALECTS)
def test_each_argument_is_named_once_and_hints_are_fields(name: str) -> None:
    named = [argument for word in DIALECTS[name].words for argument in word.arguments]
    assert len(named) == len(set(named))
    assert set(DIALECTS[name].hints) <= set(FIELDS)


DEFAULTS: dict[str, dict[str, Any]] = {
    "torch": {
        "axis": 1,
        "epsilon": 1e-5,
        "decay": 0.9,
        "moving_variance_estimator": "unbiased",
        "single_value": "raise",
    },
    "keras": {"axis": -1, "epsilon": 1e-3, "decay": 0.99},
    "tf_keras": {"axis": -1, "epsilon": 1e-3, "decay": 0.99, "moving_variance_estimator": "unbiased"},
    "tf_layers": {"axis": -1, "epsilon": 1e-3, "decay": 0.99, "moving_variance_estimator": "unbiased"},
    "contrib": {
        "axis": -1,
        "epsilon": 1e-3,
        "decay": 0.999,
        "scale": False,
        "moving_variance_estimator": "unbiased",
    },
    "flax": {"axis": -1, "epsilon": 1e-5, "decay": 0.99},
    "haiku": {"axis": -1, "epsilon": 1e-5, "decay": 0.9, "zero_debias": "all"},
    "equinox": {"axis": 1, "epsilon": 1e-5, "decay": 0.99, "zero_debias": "all"},
    "onnx": {"axis": 1, "epsilon": 1e-5, "decay": 0.9},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_defaults_mean_what_the_framework_means(name: str) -> None:
    spec = BatchNormSpec.from_dialect(name, num_features=3, rank=4, **NEEDED.get(name, {}))
    assert spec == BatchNormSpec(3, **{"single_value": "allow", **DEFAULTS[name]})


@pytest.mark.parametrize("name", DIALECTS)
def test_defaults_come_back_as_the_frameworks_values(name: str) -> None:
    spec = BatchNormSpec.from_dialect(name, num_features=3, rank=4, **NEEDED.get(name, {}))
    defaults = {**DIALECTS[name].defaults, **NEEDED.get(name, {})}
    written = spec.to_dialect(name, rank=4)
    if DIALECTS[name].features:
        assert written.pop(DIALECTS[name].features) == 3
    assert written == {argument: defaults[argument] for argument in written}


# --- both ways


@pytest.mark.parametrize("name", DIALECTS)
@given(data=st.data())
def test_what_a_framework_can_say_comes_back(name: str, data: st.DataObject) -> None:
    optional = {key: value for key, value in ARGUMENTS[name].items() if key not in NEEDED.get(name, {})}
    arguments = NEEDED.get(name, {}) | data.draw(st.fixed_dictionaries({}, optional=optional))
    rank = data.draw(st.sampled_from([2, 3, 4, 5]))
    try:
        spec = BatchNormSpec.from_dialect(name, num_features=3, rank=rank, **arguments)
    except DialectError:
        assume(False)  # a combination that no spec allows, such as renorm with rmin > rmax
        raise
    assert read(name, spec.to_dialect(name, rank=rank), rank, 3) == spec


@pytest.mark.parametrize("name", DIALECTS)
@given(spec=specs(), rank=st.sampled_from([None, 2, 3, 4, 5]))
def test_any_spec_is_said_exactly_or_refused_by_name(name: str, spec: BatchNormSpec, rank: int | None) -> None:
    try:
        arguments = spec.to_dialect(name, rank=rank)
    except DialectError as error:
        refusal = str(error)
    else:
        assert read(name, arguments, rank, spec.num_features) == spec
        return
    assert refusal.startswith(name)
    assert any(field in refusal for field in FIELDS) or "rank=" in refusal


@pytest.mark.parametrize("name", DIALECTS)
@given(spec=specs())
def test_only_what_is_allowed_is_lost(name: str, spec: BatchNormSpec) -> None:
    assume(spec.decay not in ("cumulative", 1.0))  # Haiku and Equinox have nothing near them
    every = tuple(field for field in FIELDS if field != "num_features")
    lossy = read(name, spec.to_dialect(name, rank=4, lossy=every), 4, spec.num_features)
    lost = {field for field in every if getattr(lossy, field) != getattr(spec, field)}
    for field in lost:
        with pytest.raises(DialectError, match=field):
            spec.to_dialect(name, rank=4, lossy=tuple(lost - {field}))
    assert read(name, spec.to_dialect(name, rank=4, lossy=tuple(lost)), 4, spec.num_features) == lossy


def test_the_refusal_names_every_field_and_the_way_out() -> None:
    spec = BatchNormSpec.from_dialect("torch", num_features=3)
    with pytest.raises(DialectError) as refusal:
        spec.to_dialect("keras")
    assert str(refusal.value) == (
        "keras cannot express moving_variance_estimator='unbiased' (it would be 'biased'), single_value='raise' (it"
        " would be 'allow'). Change it with spec.replace(...), or give lossy=('moving_variance_estimator',"
        " 'single_value') to lose it."
    )
    arguments = spec.to_dialect("keras", lossy=("moving_variance_estimator", "single_value"))
    assert arguments == {"axis": 1, "momentum": 0.9, "epsilon": 1e-5, "center": True, "scale": True}


def test_a_decay_that_torch_would_round_is_refused() -> None:
    decay = 0.1234567890123456789
    assert complement(complement(decay)) != decay
    with pytest.raises(DialectError, match=r"decay=0\.1234"):
        BatchNormSpec(3, axis=1, decay=decay).to_dialect("torch", lossy=("moving_variance_estimator", "single_value"))


# --- single words


def test_torch_cumulative_and_affine() -> None:
    def torch(**arguments: Any) -> BatchNormSpec:
        return BatchNormSpec.from_dialect("torch", num_features=3, **arguments)

    assert torch(momentum=None).decay == "cumulative"
    assert torch(momentum=None).to_dialect("torch")["momentum"] is None
    assert (torch(affine=False).scale, torch(affine=False).center) == (False, False)
    assert (torch(bias=False).scale, torch(bias=False).center) == (True, False)
    assert torch(affine=False, bias=True).to_dialect("torch")["affine"] is False
    assert torch(bias=False).to_dialect("torch")["bias"] is False
    assert "bias" not in torch().to_dialect("torch")  # older versions do not take it
    assert torch(track_running_stats=False).track_moving_stats is False
    with pytest.raises(DialectError, match="scale=False"):
        torch().replace(scale=False).to_dialect("torch")


def test_renorm_words() -> None:
    clipping = {"rmax": 3.0, "dmax": 5.0}
    keras = BatchNormSpec.from_dialect(
        "keras", num_features=3, renorm=True, renorm_clipping=clipping, renorm_momentum=0.8
    )
    assert keras.renorm == Renorm(r_max=3.0, d_max=5.0, decay=0.8)
    assert keras.to_dialect("keras")["renorm_clipping"] == clipping
    contrib = keras.to_dialect("contrib", rank=4)
    assert (contrib["renorm_clipping"], contrib["renorm_decay"]) == (clipping, 0.8)
    with pytest.raises(DialectError, match="rmax, rmin, dmax"):
        BatchNormSpec.from_dialect("keras", num_features=3, renorm=True, renorm_clipping={"r_max": 3.0})
    with pytest.raises(DialectError, match=r"keras: renorm\.r_min must be at most renorm\.r_max"):
        BatchNormSpec.from_dialect("keras", num_features=3, renorm=True, renorm_clipping={"rmax": 1.0, "rmin": 2.0})


# The moving variance that the frameworks stored, measured: the ranks at which it was unbiased.
UNBIASED_AT: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("tf_keras", {}, (4, 5)),
    ("tf_keras", {"axis": 1}, (4, 5)),
    ("tf_keras", {"axis": [-1]}, (4, 5)),
    ("tf_keras", {"axis": 3}, (4,)),
    ("tf_keras", {"axis": -3}, (4,)),
    ("tf_keras", {"axis": 4}, (5,)),
    ("tf_keras", {"axis": 2}, ()),
    ("tf_keras", {"axis": -2}, ()),
    ("tf_keras", {"fused": False}, ()),
    ("tf_keras", {"dtype": "float64"}, ()),
    ("tf_keras", {"dtype": "float16"}, (4, 5)),
    ("tf_keras", {"synchronized": True}, ()),
    ("tf_keras", {"renorm": True}, ()),
    ("tf_keras", {"virtual_batch_size": 2}, ()),
    ("tf_layers", {}, (4, 5)),
    ("tf_layers", {"axis": 3}, (4,)),
    ("tf_layers", {"axis": 2}, ()),
    ("tf_layers", {"fused": True}, (4, 5)),
    ("tf_layers", {"fused": False}, ()),
    ("contrib", {}, (2, 4, 5)),
    ("contrib", {"data_format": "NCHW"}, (2, 4, 5)),
    ("contrib", {"fused": False}, ()),
    ("contrib", {"zero_debias_moving_mean": True}, (2, 4)),
    ("contrib", {"updates_collections": None}, (2, 4)),
    ("contrib", {"renorm": True}, ()),
]


@pytest.mark.parametrize(("name", "arguments", "ranks"), UNBIASED_AT)
def test_estimator_by_rank(name: str, arguments: dict[str, Any], ranks: tuple[int, ...]) -> None:
    for rank in (2, 3, 4, 5):
        spec = BatchNormSpec.from_dialect(name, num_features=3, rank=rank, **arguments)
        assert spec.moving_variance_estimator == ("unbiased" if rank in ranks else "biased"), rank
    if ranks:
        with pytest.raises(DialectError, match="rank="):
            BatchNormSpec.from_dialect(name, num_features=3, **arguments)
    else:
        assert BatchNormSpec.from_dialect(name, num_features=3, **arguments).moving_variance_estimator == "biased"


def test_biased_is_written_without_a_rank() -> None:
    spec = BatchNormSpec.from_dialect("keras", num_features=3)
    for name in ("tf_keras", "tf_layers"):
        assert spec.to_dialect(name)["fused"] is False
        assert "fused" not in spec.to_dialect(name, rank=2)


def test_fused_where_it_cannot_be() -> None:
    with pytest.raises(DialectError, match="fused=True is refused"):
        BatchNormSpec.from_dialect("tf_keras", num_features=3, rank=2, fused=True)
    fallen_back = BatchNormSpec.from_dialect("tf_layers", num_features=3, rank=2, fused=True)
    assert fallen_back.moving_variance_estimator == "biased"


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("torch", {"epsilon": 1e-5}, "has no argument 'epsilon'; known are num_features, eps, momentum"),
        ("torch", {"momentum": 1.5}, "momentum must be in [0, 1] or None; got 1.5"),
        ("torch", {"momentum": "0.1"}, "momentum must be a number"),
        ("torch", {"affine": 1}, "affine must be True or False; got 1"),
        ("torch", {"eps": -1.0}, "epsilon must be a finite number of at least 0; got -1.0"),
        ("torch", {"dtype": "int8"}, "'int8'"),
        ("torch", {"momentum": None, "track_running_stats": False}, "contradict"),
        ("keras", {"momentum": "cumulative"}, "momentum must be a number"),
        ("keras", {"axis": [3]}, "axis must be an integer; got [3]"),
        ("keras", {"trainable": False}, "frozen_statistics"),
        ("keras", {"gamma_initializer": "zeros"}, "BatchNormState"),
        ("keras", {"beta_regularizer": "l2"}, "beta_regularizer='l2' cannot be said as a spec"),
        ("tf_keras", {"axis": [1, 3], "fused": False}, "exactly one"),
        ("tf_keras", {"adjustment": len}, "argument of the call"),
        ("tf_layers", {"trainable": False}, "update_stats=False"),
        ("contrib", {"data_format": "NCDHW"}, "data_format must be a layout"),
        ("contrib", {"activation_fn": len}, "layer of its own"),
        ("contrib", {"trainable": False}, "update_stats=False"),
        ("contrib", {"renorm": True, "zero_debias_moving_mean": True}, "contradict"),
        ("flax", {"dtype": "float16"}, "x's dtype"),
        ("flax", {"force_float32_reductions": False}, "float32 or wider"),
        ("haiku", {}, "haiku has no default for create_scale, create_offset, decay_rate"),
        ("haiku", {**NEEDED["haiku"], "axis": [0, 1]}, "data_format"),
        ("equinox", {}, "normalizes with the moving average in training too"),
        ("equinox", {"mode": "ema"}, "only mode='batch' is batch normalization"),
        ("onnx", {"spatial": 0}, "spatial=0"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(DialectError) as refusal:
        BatchNormSpec.from_dialect(name, num_features=3, **arguments)
    assert told in str(refusal.value)
    assert str(refusal.value).startswith(name)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("keras", {}), ("equinox", {"mode": "batch"}), ("equinox", {"mode": "batch", "input_size": 3, "num_features": 3})],
)
def test_the_number_of_channels_is_given_once(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(DialectError, match="give the number of channels once"):
        BatchNormSpec.from_dialect(name, **arguments)


def test_either_name_for_the_number_of_channels() -> None:
    assert BatchNormSpec.from_dialect("equinox", input_size=3, mode="batch") == BatchNormSpec.from_dialect(
        "equinox", num_features=3, mode="batch"
    )


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(DialectError, match="unknown dialect 'pytorch'; known are torch, keras"):
        dialect("pytorch")
    with pytest.raises(DialectError, match=r"lossy must be a tuple of spec fields; got \('momentum',\)"):
        BatchNormSpec(3).to_dialect("keras", lossy=("momentum",))
    with pytest.raises(DialectError, match="lossy must be a tuple"):
        BatchNormSpec(3).to_dialect("keras", lossy="single_value")  # type: ignore[arg-type]
    with pytest.raises(DialectError, match="rank must be the number of axes"):
        BatchNormSpec.from_dialect("tf_keras", num_features=3, rank=1)


@pytest.mark.parametrize("name", ["haiku", "equinox"])
def test_a_cumulative_average_has_nothing_near_it(name: str) -> None:
    spec = BatchNormSpec(3, decay="cumulative")
    with pytest.raises(DialectError, match="decay"):
        spec.to_dialect(name, lossy=("axis", "zero_debias", "single_value"))


# --- initial statistics


def test_initial_states() -> None:
    def values(name: str, **arguments: Any) -> dict[str, float]:
        spec = BatchNormSpec.from_dialect(name, num_features=2, rank=4, **arguments)
        state = DIALECTS[name].initial_state(spec)
        assert isinstance(state.checked(spec), BatchNormState)
        return {array: float(value[0]) for array, value in state.arrays().items()}

    plain = {"gamma": 1.0, "beta": 0.0, "moving_mean": 0.0, "moving_variance": 1.0}
    assert values("torch") == plain
    assert values("contrib") == {k: v for k, v in plain.items() if k != "gamma"}
    hidden = {"hidden_mean": 0.0, "hidden_variance": 0.0}
    assert values("haiku", **NEEDED["haiku"]) == {**plain, "moving_variance": 0.0, **hidden}
    assert values("equinox", **NEEDED["equinox"]) == {**plain, "hidden_mean": 0.0, "hidden_variance": 1.0}
    renorm = {"renorm_mean": 0.0, "renorm_stddev": 1.0, "moving_stddev": 1.0}
    assert values("keras", renorm=True) == {**plain, **renorm}


# --- the frameworks agree


def agree(name: str, *layers: Any, elsewhere: tuple[str, ...] = ()) -> None:
    """The table's arguments are the layer's, with its defaults; `elsewhere` are those that it takes by **kwargs."""
    taken: dict[str, Any] = {}
    for layer in layers:
        taken.update(inspect.signature(layer.__init__ if isinstance(layer, type) else layer).parameters)
    for argument, default in DIALECTS[name].defaults.items():
        if argument in elsewhere:
            continue
        assert argument in taken, f"{name} has no {argument}"
        theirs = taken[argument].default
        if default is REQUIRED:
            assert theirs is inspect.Parameter.empty, argument
        elif isinstance(default, (bool, int, float)) and not isinstance(theirs, type):
            assert theirs == default, argument


def test_torch_agrees() -> None:
    torch = pytest.importorskip("torch")
    agree("torch", torch.nn.BatchNorm2d)
    spec = BatchNormSpec.from_dialect("torch", num_features=3, momentum=0.01, affine=False, dtype=torch.float64)
    assert (spec.param_dtype, spec.stats_dtype) == ("float64", "float64")
    layer = torch.nn.BatchNorm2d(**spec.replace(param_dtype="float32", stats_dtype="float32").to_dialect("torch"))
    assert (layer.momentum, layer.eps, layer.weight) == (0.01, 1e-5, None)


def test_keras_agrees() -> None:
    keras = pytest.importorskip("keras", minversion="3.15")
    agree("keras", keras.layers.BatchNormalization, elsewhere=("dtype", "trainable", "name"))
    layer = keras.layers.BatchNormalization(momentum=0.9, scale=False, renorm=True, renorm_clipping={"rmax": 2.0})
    spec = BatchNormSpec.from_dialect("keras", num_features=3, **layer.get_config())
    assert spec == BatchNormSpec(
        3, epsilon=1e-3, decay=0.9, scale=False, single_value="allow", renorm=Renorm(r_max=2.0, decay=0.99)
    )
    layer = keras.layers.BatchNormalization(**spec.to_dialect("keras"))
    layer.build((None, 3))
    state = DIALECTS["keras"].initial_state(spec)
    for array, value in state.arrays().items():
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(getattr(layer, array)), value)
    config = keras.layers.BatchNormalization(gamma_initializer="zeros").get_config()
    with pytest.raises(DialectError, match="BatchNormState"):
        BatchNormSpec.from_dialect("keras", num_features=3, **config)
    for policy, stored in [("mixed_float16", "float32"), ("float16", "float16"), ("float64", "float64")]:
        layer = keras.layers.BatchNormalization(dtype=policy)
        layer.build((None, 3))
        spec = BatchNormSpec.from_dialect("keras", num_features=3, **layer.get_config())
        assert spec.param_dtype == spec.stats_dtype == layer.moving_mean.dtype == stored


def test_tf_keras_agrees() -> None:
    tf_keras = pytest.importorskip("tf_keras")
    public = tf_keras.layers.BatchNormalization
    agree("tf_keras", public.__mro__[1], public, elsewhere=("dtype",))  # its base takes renorm, fused and the like
    rng = np.random.default_rng(7)
    for rank in (2, 3, 4, 5):
        x = rng.normal(size=(4, *[2] * (rank - 2), 3)).astype(np.float32)
        layer = tf_keras.layers.BatchNormalization(momentum=0.0)
        layer(x, training=True)
        spec = BatchNormSpec.from_dialect("tf_keras", num_features=3, rank=rank, **layer.get_config())
        ddof = int(spec.moving_variance_estimator == "unbiased")
        np.testing.assert_allclose(layer.moving_variance, x.reshape(-1, 3).var(0, ddof=ddof), rtol=1e-5)


def test_tf_slim_agrees() -> None:
    tf_slim = pytest.importorskip("tf_slim")
    agree("contrib", tf_slim.batch_norm)


def test_flax_agrees() -> None:
    linen = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    agree("flax", nnx.BatchNorm, linen.BatchNorm)
    import jax.numpy as jnp

    spec = BatchNormSpec.from_dialect("flax", num_features=3, param_dtype=jnp.bfloat16, use_bias=False)
    assert spec.param_dtype == "bfloat16"
    layer = linen.BatchNorm(**spec.to_dialect("flax"))
    assert (layer.momentum, layer.epsilon, layer.use_bias, jnp.dtype(layer.param_dtype)) == (
        0.99,
        1e-5,
        False,
        jnp.bfloat16,
    )
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **spec.to_dialect("flax"))
    assert (layer.bias, layer.scale[...].dtype, layer.mean[...].dtype) == (None, jnp.bfloat16, jnp.float32)


def test_haiku_agrees() -> None:
    haiku = pytest.importorskip("haiku")
    agree("haiku", haiku.BatchNorm)
    import jax

    spec = BatchNormSpec.from_dialect("haiku", num_features=3, create_scale=True, create_offset=False, decay_rate=0.9)
    f = haiku.transform_with_state(lambda x: haiku.BatchNorm(**spec.to_dialect("haiku"))(x, is_training=True))
    params, state = f.init(jax.random.key(0), np.zeros((4, 3), np.float32))
    assert sorted(params["batch_norm"]) == ["scale"]
    initial = DIALECTS["haiku"].initial_state(spec)
    assert initial.moving_variance is not None
    average = np.asarray(state["batch_norm/~/var_ema"]["average"]).reshape(-1)
    np.testing.assert_array_equal(average, initial.moving_variance)
    for layout in ("channels_first", "channels_last", "NCHW", "NHWC", "N...C", "NC...", "BTD", "NCDHW"):
        read_back = BatchNormSpec.from_dialect("haiku", num_features=3, data_format=layout, **NEEDED["haiku"])
        assert read_back.axis == haiku.get_channel_index(layout)


def test_equinox_agrees() -> None:
    equinox = pytest.importorskip("equinox")
    agree("equinox", equinox.nn.BatchNorm)
    spec = BatchNormSpec.from_dialect("equinox", num_features=3, mode="batch", momentum=0.9)
    layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(**spec.to_dialect("equinox"))
    assert (layer.input_size, layer.momentum, layer.eps, layer.mode) == (3, 0.9, 1e-5, "batch")
    mean, variance = state.get(layer.batch_state_index)
    initial = DIALECTS["equinox"].initial_state(spec)
    assert initial.hidden_mean is not None
    assert initial.hidden_variance is not None
    np.testing.assert_array_equal(mean, initial.hidden_mean)
    np.testing.assert_array_equal(variance, initial.hidden_variance)


def test_onnx_agrees() -> None:
    onnx = pytest.importorskip("onnx")
    schema = onnx.defs.get_schema("BatchNormalization", 15)
    assert set(schema.attributes) == {"epsilon", "momentum", "training_mode"}
    for name, attribute in schema.attributes.items():
        theirs = onnx.helper.get_attribute_value(attribute.default_value)
        assert math.isclose(theirs, DIALECTS["onnx"].defaults[name], rel_tol=2**-24)  # attributes are float32


def test_an_infinite_renorm_clip_is_none() -> None:
    """Keras takes an infinite rmax for no clip."""
    clipping = {"rmax": float("inf"), "rmin": 0.5}
    spec = BatchNormSpec.from_dialect("keras", num_features=3, renorm=True, renorm_clipping=clipping)
    assert spec.renorm is not None
    assert (spec.renorm.r_max, spec.renorm.r_min, spec.renorm.d_max) == (None, 0.5, None)
    assert spec.to_dialect("keras")["renorm_clipping"] == {"rmin": 0.5}
