"""BatchNormSpec and Renorm: what they accept, what they refuse, and that nothing is lost on the way through JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlayer import BatchNormSpec, Renorm, SpecError

FIELDS = [field.name for field in dataclasses.fields(BatchNormSpec)]
DTYPES = ["float16", "bfloat16", "float32", "float64"]

# Two sets of fields, each fine alone, that cannot stand together; and the field names that the refusal must mention.
CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"zero_debias": z}, {"decay": d}) for z in ("mean", "all") for d in ("cumulative", 1.0)),
    *(({"zero_debias": z}, {"renorm": Renorm()}) for z in ("mean", "all")),
    *(({"zero_debias": z}, {"nonfinite": "keep"}) for z in ("mean", "all")),
    *(({"zero_debias": z}, {"track_moving_stats": False}) for z in ("mean", "all")),
    ({"renorm": Renorm()}, {"moving_variance_estimator": "unbiased"}),
    ({"renorm": Renorm()}, {"decay": "cumulative"}),
    ({"renorm": Renorm()}, {"track_moving_stats": False}),
    ({"virtual_batch_size": 4}, {"synchronized": True}),
    ({"nonfinite": "keep"}, {"decay": "cumulative"}),
    ({"track_moving_stats": False}, {"decay": "cumulative"}),
]

finite = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
unit = st.floats(min_value=0, max_value=1)
positive = st.integers(min_value=1, max_value=2**63 - 1)
axes = st.integers(min_value=-(2**63), max_value=2**63 - 1).filter(bool)


@st.composite
def renorms(draw: st.DrawFn) -> Renorm:
    low, high = sorted((draw(finite), draw(finite)))
    return Renorm(
        r_max=draw(st.sampled_from([None, high])),
        r_min=draw(st.sampled_from([None, low])),
        d_max=draw(st.none() | finite),
        decay=draw(unit),
    )


fields = st.fixed_dictionaries(
    {"num_features": positive},
    optional={
        "axis": axes,
        "epsilon": finite,
        "decay": unit | st.just("cumulative"),
        "center": st.booleans(),
        "scale": st.booleans(),
        "moving_variance_estimator": st.sampled_from(["biased", "unbiased"]),
        "zero_debias": st.sampled_from(["none", "mean", "all"]),
        "renorm": st.none() | renorms(),
        "virtual_batch_size": st.none() | positive,
        "virtual_batch_layout": st.sampled_from(["strided", "consecutive"]),
        "track_moving_stats": st.booleans(),
        "single_value": st.sampled_from(["raise", "allow"]),
        "nonfinite": st.sampled_from(["propagate", "keep"]),
        "synchronized": st.booleans(),
        "param_dtype": st.sampled_from(DTYPES),
        "stats_dtype": st.sampled_from(DTYPES),
    },
)


def contains(chosen: dict[str, Any], part: dict[str, Any]) -> bool:
    """Whether these fields ask for `part`; any renorm and any ghost batch size counts as one."""
    for name, value in part.items():
        if name in ("renorm", "virtual_batch_size"):
            if chosen.get(name) is None:
                return False
        elif chosen.get(name) != value:
            return False
    return True


def contradictory(chosen: dict[str, Any]) -> bool:
    return any(contains(chosen, a) and contains(chosen, b) for a, b in CONTRADICTIONS)


specs = fields.filter(lambda chosen: not contradictory(chosen)).map(lambda chosen: BatchNormSpec(**chosen))


@given(fields)
def test_refused_exactly_where_two_fields_contradict(chosen: dict[str, Any]) -> None:
    if contradictory(chosen):
        with pytest.raises(SpecError, match="contradict each other"):
            BatchNormSpec(**chosen)
    else:
        spec = BatchNormSpec(**chosen)
        assert {name: getattr(spec, name) for name in chosen} == chosen


@pytest.mark.parametrize(("one", "other"), CONTRADICTIONS)
def test_a_contradiction_names_both_fields_and_each_is_fine_alone(one: dict[str, Any], other: dict[str, Any]) -> None:
    BatchNormSpec(3, **one)
    BatchNormSpec(3, **other)
    with pytest.raises(SpecError) as refusal:
        BatchNormSpec(3, **one, **other)
    for name in (*one, *other):
        assert name in str(refusal.value)


@given(specs)
def test_json_round_trip(spec: BatchNormSpec) -> None:
    text = spec.to_json()
    back = BatchNormSpec.from_json(text)
    assert back == spec
    assert hash(back) == hash(spec)
    assert back.to_json() == text
    assert list(json.loads(text)) == FIELDS  # every field, in the order of the class


@given(specs)
def test_dict_round_trip_and_replace_with_nothing(spec: BatchNormSpec) -> None:
    assert BatchNormSpec.from_dict(spec.to_dict()) == spec
    assert spec.replace() == spec


@given(specs, specs)
def test_equal_exactly_where_every_field_is(one: BatchNormSpec, other: BatchNormSpec) -> None:
    assert (one == other) == all(getattr(one, name) == getattr(other, name) for name in FIELDS)
    if one == other:
        assert hash(one) == hash(other)


@pytest.mark.parametrize("name", FIELDS)
def test_changing_any_one_field_makes_another_spec(name: str) -> None:
    changed = {
        "num_features": 4, "axis": 1, "epsilon": 1e-3, "decay": 0.5, "center": False, "scale": False,
        "moving_variance_estimator": "unbiased", "zero_debias": "mean", "renorm": Renorm(), "virtual_batch_size": 2,
        "virtual_batch_layout": "consecutive", "track_moving_stats": False, "single_value": "allow",
        "nonfinite": "keep", "synchronized": True, "param_dtype": "float16", "stats_dtype": "float64",
    }  # fmt: skip
    spec = BatchNormSpec(3)
    other = spec.replace(**{name: changed[name]})
    assert other != spec
    assert len({spec, other, spec.replace()}) == 2


@pytest.mark.parametrize("name", ["epsilon", "decay"])
def test_numbers_that_are_equal_make_equal_specs(name: str) -> None:
    specs = [BatchNormSpec(3, **{name: zero}) for zero in (0, 0.0, -0.0, np.float32(0), np.int8(0))]
    assert len(set(specs)) == 1
    assert len({spec.to_json() for spec in specs}) == 1
    assert math.copysign(1, getattr(specs[2], name)) == 1


def test_numpy_scalars_and_dtypes_become_plain_values() -> None:
    spec = BatchNormSpec(
        np.int64(3),  # type: ignore[arg-type]
        axis=np.int32(1),  # type: ignore[arg-type]
        epsilon=np.float64(0.5),
        center=np.bool_(False),  # type: ignore[arg-type]
        param_dtype=np.float16,  # type: ignore[arg-type]
        stats_dtype=np.dtype(ml_dtypes.bfloat16),  # type: ignore[arg-type]
    )
    assert spec == BatchNormSpec(3, axis=1, epsilon=0.5, center=False, param_dtype="float16", stats_dtype="bfloat16")
    assert {type(value) for value in spec.to_dict().values()} <= {int, float, bool, str, type(None)}


def test_a_spec_does_not_change() -> None:
    spec = BatchNormSpec(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.epsilon = 1.0  # type: ignore[misc]


HUGE = 10**5000  # more digits than Python prints
NOT_NUMBERS: list[Any] = [
    None,
    "1",
    "",
    True,
    False,
    [],
    [1.0],
    {},
    1j,
    math.nan,
    math.inf,
    -math.inf,
    -1.0,
    HUGE,
    -HUGE,
]
NOT_INTEGERS: list[Any] = [None, "1", True, False, 1.0, 2.5, [], [3], {}, math.nan, math.inf, 2**63, HUGE, -HUGE]
NOT_FLAGS: list[Any] = [None, 0, 1, 1.0, "true", "", [], {}, math.nan]
NOT_CHOICES: list[Any] = [None, "", "other", "BIASED", 0, True, 1.5, [], ["biased"], {}, math.nan, HUGE]
NOT_DTYPES: list[Any] = [
    *NOT_CHOICES,
    "f4",
    "int32",
    "complex64",
    "float8_e4m3fn",
    int,
    str,
    object,
    np.int32,
    {"a": 1},
]

BAD_VALUES = [
    *(("num_features", value) for value in [*NOT_INTEGERS, 0, -1]),
    *(("axis", value) for value in [*NOT_INTEGERS, 0]),
    *(("epsilon", value) for value in NOT_NUMBERS),
    *(("decay", value) for value in [*NOT_NUMBERS, 1.0000000000000002, 2, "Cumulative"]),
    *itertools.product(("center", "scale", "track_moving_stats", "synchronized"), NOT_FLAGS),
    *itertools.product(
        ("moving_variance_estimator", "zero_debias", "virtual_batch_layout", "single_value", "nonfinite"), NOT_CHOICES
    ),
    *(("renorm", value) for value in [True, 1, "", [], ["r_max"], Renorm, math.nan, HUGE]),
    *(("virtual_batch_size", value) for value in [*NOT_INTEGERS[1:], 0, -4]),
    *itertools.product(("param_dtype", "stats_dtype"), NOT_DTYPES),
]
BAD_RENORMS = [
    *itertools.product(("r_max", "r_min", "d_max"), NOT_NUMBERS[1:]),
    *(("decay", value) for value in [*NOT_NUMBERS, 1.5, "cumulative"]),
]


def shown(value: Any) -> str:
    return "huge" if value in (HUGE, -HUGE) else str(value)


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=shown)
def test_a_bad_value_is_refused_by_the_field_s_name(name: str, value: Any) -> None:
    chosen = {"num_features": 3, name: value}
    with pytest.raises(SpecError, match=name):
        BatchNormSpec(**chosen)
    with pytest.raises(SpecError, match=name):
        BatchNormSpec.from_dict(chosen)


@pytest.mark.parametrize(("name", "value"), BAD_RENORMS, ids=shown)
def test_a_bad_renorm_is_refused_by_the_field_s_name(name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"renorm\.{name}"):
        Renorm(**{name: value})
    with pytest.raises(SpecError, match=rf"renorm\.{name}"):
        BatchNormSpec.from_dict({"num_features": 3, "renorm": {name: value}})


def test_every_field_has_bad_values_above() -> None:
    assert {name for name, _ in BAD_VALUES} == set(FIELDS)
    assert {name for name, _ in BAD_RENORMS} == {field.name for field in dataclasses.fields(Renorm)}


def test_renorm_clips_in_the_wrong_order_are_refused() -> None:
    Renorm(r_min=2.0, r_max=2.0)
    with pytest.raises(SpecError, match=r"renorm\.r_min must be at most renorm\.r_max"):
        Renorm(r_min=2.0, r_max=1.0)


def test_names_that_are_no_fields_are_refused() -> None:
    with pytest.raises(SpecError, match="BatchNormSpec has no field eps, momentum; its fields are num_features"):
        BatchNormSpec.from_dict({"num_features": 3, "momentum": 0.1, "eps": 1e-5})
    with pytest.raises(SpecError, match="Renorm has no field rmax"):
        BatchNormSpec.from_dict({"num_features": 3, "renorm": {"rmax": 3}})
    with pytest.raises(SpecError, match="BatchNormSpec has no field momentum"):
        BatchNormSpec(3).replace(momentum=0.1)


def test_replace_checks_again() -> None:
    with pytest.raises(SpecError, match="zero_debias"):
        BatchNormSpec(3, decay="cumulative").replace(zero_debias="all")


def test_num_features_has_no_default() -> None:
    with pytest.raises(SpecError, match="num_features is missing"):
        BatchNormSpec.from_json("{}")


@pytest.mark.parametrize(
    "text", ["", "{", "3", "null", "[]", '"x"', "[" * 100_000, '{"num_features": ' + "9" * 5000 + "}"]
)
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="a spec"):
        BatchNormSpec.from_json(text)


def test_a_refusal_does_not_repeat_a_megabyte() -> None:
    with pytest.raises(SpecError, match="epsilon must be") as refusal:
        BatchNormSpec(3, epsilon="9" * 10**6)  # type: ignore[arg-type]
    assert len(str(refusal.value)) < 400


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("aeF01.-\u00b2", max_size=8)
    | st.sampled_from(DTYPES),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("aeF01.-\u00b2", max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
renorm_like = st.dictionaries(st.sampled_from(["r_max", "r_min", "d_max", "decay", "rmax"]), json_values, max_size=4)


@given(st.dictionaries(st.sampled_from([*FIELDS, "momentum"]), json_values | renorm_like, max_size=6))
def test_hostile_json_gives_a_spec_or_a_spec_error(document: dict[str, Any]) -> None:
    text = json.dumps({"num_features": 3, **document})
    try:
        spec = BatchNormSpec.from_json(text)
    except SpecError:
        return
    assert BatchNormSpec.from_json(spec.to_json()) == spec


@given(json_values)
def test_any_json_value_gives_a_spec_or_a_spec_error(document: Any) -> None:
    with contextlib.suppress(SpecError):
        BatchNormSpec.from_json(json.dumps(document))
