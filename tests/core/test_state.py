"""BatchNormState: what fits a spec, and files that come back bit for bit or are refused."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlayer import BatchNormSpec, BatchNormState, FileError, Renorm, StateError
from bnlayer.state import MAX_COUNTER, array_dtype, array_names, numpy_dtype

DTYPES = ["float16", "bfloat16", "float32", "float64"]
PLAIN = BatchNormSpec(3)
NAMES = [
    "gamma", "beta", "moving_mean", "moving_variance", "hidden_mean", "hidden_variance", "renorm_mean",
    "renorm_stddev", "moving_stddev",
]  # fmt: skip
NOT_NEGATIVE = ["moving_variance", "hidden_variance", "renorm_stddev", "moving_stddev"]
SPECS = {
    "plain": PLAIN,
    "bare": BatchNormSpec(3, center=False, scale=False),
    "untracked": BatchNormSpec(3, track_moving_stats=False),
    "nothing": BatchNormSpec(3, center=False, scale=False, track_moving_stats=False),
    "cumulative": BatchNormSpec(3, decay="cumulative"),
    "debiased mean": BatchNormSpec(3, zero_debias="mean"),
    "debiased": BatchNormSpec(3, zero_debias="all"),
    "renorm": BatchNormSpec(3, renorm=Renorm()),
    "mixed": BatchNormSpec(3, param_dtype="bfloat16", stats_dtype="float64"),
}


def same(one: BatchNormState[Any], other: BatchNormState[Any]) -> bool:
    """Equal in names, dtypes, every bit (NaN's too) and the counter."""
    a, b = one.arrays(), other.arrays()
    return (
        a.keys() == b.keys()
        and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a)
        and one.num_updates == other.num_updates
    )


def saved(state: BatchNormState[Any], folder: Path) -> bytes:
    path = folder / "state.npz"
    state.to_npz(path)
    return path.read_bytes()


def read(content: bytes, folder: Path) -> BatchNormState[Any]:
    path = folder / "given.npz"
    path.write_bytes(content)
    return BatchNormState.from_npz(path)


# Which arrays there are


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("plain", "gamma beta moving_mean moving_variance"),
        ("bare", "moving_mean moving_variance"),
        ("untracked", "gamma beta"),
        ("nothing", ""),
        ("debiased mean", "gamma beta moving_mean moving_variance hidden_mean"),
        ("debiased", "gamma beta moving_mean moving_variance hidden_mean hidden_variance"),
        ("renorm", "gamma beta moving_mean moving_variance renorm_mean renorm_stddev moving_stddev"),
    ],
)
def test_the_arrays_follow_from_the_spec(spec: str, names: str) -> None:
    assert array_names(SPECS[spec]) == tuple(names.split())
    assert list(BatchNormState.initial(SPECS[spec]).arrays()) == names.split()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_initial_state_fits_and_has_not_been_updated(spec: BatchNormSpec) -> None:
    state = BatchNormState.initial(spec)
    assert same(state, state.checked(spec))
    assert state.num_updates == 0
    sd = (1 + spec.epsilon) ** 0.5
    starts = dict.fromkeys(NAMES, 0.0) | {
        "gamma": 1.0,
        "moving_variance": 1.0,
        "renorm_stddev": sd,
        "moving_stddev": sd,
    }
    for name, array in state.arrays().items():
        dtype = spec.param_dtype if name in ("gamma", "beta") else spec.stats_dtype
        assert array.dtype == numpy_dtype(dtype) == array_dtype(spec, name)
        assert array.tolist() == [array.dtype.type(starts[name])] * 3


def test_a_copy_shares_no_memory() -> None:
    state = BatchNormState.initial(PLAIN)
    for other in (state.copy(), state.checked(PLAIN)):
        assert same(state, other)
        for name, array in other.arrays().items():
            assert not np.shares_memory(array, state.arrays()[name])


def test_replace_knows_its_arrays() -> None:
    state = BatchNormState.initial(PLAIN)
    assert state.replace(num_updates=7).num_updates == 7
    assert state.replace(gamma=None).gamma is None
    with pytest.raises(StateError, match="BatchNormState has no running_mean, weight; it has gamma"):
        state.replace(weight=1, running_mean=0)


def test_astype_is_the_explicit_word_for_another_dtype() -> None:
    state = BatchNormState.initial(SPECS["mixed"]).replace(num_updates=5)
    with pytest.raises(StateError, match="gamma must be float32; got bfloat16"):
        state.checked(PLAIN)
    converted = state.astype(PLAIN).checked(PLAIN)
    assert same(converted, BatchNormState.initial(PLAIN).replace(num_updates=5))


# What `checked` refuses

EVERY = [(label, name) for label, spec in SPECS.items() for name in array_names(spec)]


BEHIND = ("hidden_mean", "hidden_variance", "renorm_mean", "renorm_stddev", "moving_stddev")


@pytest.mark.parametrize(("label", "name"), [pair for pair in EVERY if pair[1] not in BEHIND])
def test_a_missing_array_is_named(label: str, name: str) -> None:
    state = BatchNormState.initial(SPECS[label]).replace(**{name: None})
    with pytest.raises(StateError, match=rf"the state lacks {name}, which this spec needs"):
        state.checked(SPECS[label])


def test_a_plain_state_fits_a_debiased_spec_if_it_counted() -> None:
    spec = BatchNormSpec(2, decay=0.5, zero_debias="all")
    plain = BatchNormState(
        gamma=np.ones(2, np.float32),
        beta=np.zeros(2, np.float32),
        moving_mean=np.array([1.0, -2.0], np.float32),
        moving_variance=np.array([4.0, 0.5], np.float32),
        num_updates=2,
    )
    state = plain.checked(spec)
    np.testing.assert_array_equal(state.hidden_mean, np.array([0.75, -1.5], np.float32))  # times 1 - 0.5**2
    np.testing.assert_array_equal(state.hidden_variance, np.array([3.0, 0.375], np.float32))
    with pytest.raises(StateError, match="give num_updates"):
        plain.replace(num_updates=None).checked(spec)


def test_a_plain_state_fits_a_renorm_spec() -> None:
    spec = BatchNormSpec(2, epsilon=0.25, renorm=Renorm())
    plain = BatchNormState.initial(BatchNormSpec(2, epsilon=0.25)).replace(
        moving_mean=np.array([1.0, -2.0], np.float32), moving_variance=np.array([2.0, 0.75], np.float32)
    )
    state = plain.checked(spec)
    np.testing.assert_array_equal(state.renorm_mean, plain.moving_mean)
    for stddev in (state.renorm_stddev, state.moving_stddev):
        np.testing.assert_array_equal(stddev, np.array([1.5, 1.0], np.float32))


@pytest.mark.parametrize(("label", "name"), [pair for pair in itertools.product(SPECS, NAMES) if pair not in EVERY])
def test_an_array_without_a_place_is_named(label: str, name: str) -> None:
    state = BatchNormState.initial(SPECS[label]).replace(**{name: np.ones(3, np.float32)})
    with pytest.raises(StateError, match=rf"the state has {name}, which this spec has no place for"):
        state.checked(SPECS[label])


@pytest.mark.parametrize(("label", "name"), EVERY)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (4,), (3, 1), (1, 3)], ids=str)
def test_another_shape_is_refused(label: str, name: str, shape: tuple[int, ...]) -> None:
    spec = SPECS[label]
    state = BatchNormState.initial(spec).replace(**{name: np.ones(shape, array_dtype(spec, name))})
    with pytest.raises(StateError, match=rf"^{name} must have shape \(3,\); got \("):
        state.checked(spec)


@pytest.mark.parametrize(
    ("label", "name", "dtype"),
    [
        (label, name, dtype)
        for label, name in EVERY
        for dtype in (*DTYPES, "int32", "bool", "complex64", "object", "str")
        if dtype != array_dtype(SPECS[label], name).name
    ],
)
def test_another_dtype_is_refused(label: str, name: str, dtype: str) -> None:
    spec = SPECS[label]
    wanted = array_dtype(spec, name)
    state = BatchNormState.initial(spec).replace(**{name: np.ones(3).astype(numpy_dtype(dtype))})
    with pytest.raises(StateError, match=rf"^{name} must be {wanted.name}; got {dtype}.*state\.astype\(spec\)"):
        state.checked(spec)


@pytest.mark.parametrize(("label", "name"), [pair for pair in EVERY if pair[1] in NOT_NEGATIVE])
@pytest.mark.parametrize("value", [-1.0, -np.inf])
def test_a_negative_variance_is_refused_with_its_channel(label: str, name: str, value: float) -> None:
    spec = SPECS[label]
    array = np.ones(3, array_dtype(spec, name))
    array[1] = value
    with pytest.raises(StateError, match=rf"^{name} must not be negative; channel 1 has -"):
        BatchNormState.initial(spec).replace(**{name: array}).checked(spec)


@pytest.mark.parametrize("value", [0.0, -0.0, np.nan, np.inf])
def test_zero_and_what_a_nonfinite_batch_left_are_kept(value: float) -> None:
    state = BatchNormState.initial(PLAIN).replace(moving_variance=np.full(3, value, np.float32))
    assert same(state.checked(PLAIN), state)


def test_the_other_arrays_may_be_negative() -> None:
    state = BatchNormState.initial(SPECS["renorm"])
    minus = {name: -array for name, array in state.arrays().items() if name not in NOT_NEGATIVE}
    assert same(state.replace(**minus).checked(SPECS["renorm"]), state.replace(**minus))


def test_byte_order_is_no_dtype() -> None:
    swapped = BatchNormState.initial(PLAIN).replace(gamma=np.array([1, 2, 3], ">f4"))
    gamma = swapped.checked(PLAIN).gamma
    assert gamma is not None
    assert gamma.dtype == np.dtype("=f4")
    assert gamma.dtype.isnative
    assert gamma.tolist() == [1, 2, 3]


@pytest.mark.parametrize("counter", [0, 1, MAX_COUNTER, np.int32(5), np.uint64(MAX_COUNTER), np.array(5)])
def test_a_counter_becomes_an_int(counter: Any) -> None:
    checked = BatchNormState.initial(PLAIN).replace(num_updates=counter).checked(PLAIN)
    assert type(checked.num_updates) is int
    assert checked.num_updates == int(counter)


@pytest.mark.parametrize("counter", [-1, 1.0, "1", True, MAX_COUNTER + 1, 2**70, np.array([1]), np.nan, 1j])
def test_what_is_no_count_is_refused(counter: Any, tmp_path: Path) -> None:
    state = BatchNormState.initial(PLAIN).replace(num_updates=counter)
    with pytest.raises(StateError, match="num_updates must be an integer from 0"):
        state.checked(PLAIN)
    with pytest.raises(StateError, match="num_updates must be an integer from 0"):
        state.to_npz(tmp_path / "state.npz")
    assert not list(tmp_path.iterdir())


def test_an_unknown_counter_is_refused_only_where_the_average_depends_on_it() -> None:
    for label, spec in SPECS.items():
        state = BatchNormState.initial(spec).replace(num_updates=None)
        if label in ("cumulative", "debiased", "debiased mean"):
            with pytest.raises(StateError, match="num_updates is unknown"):
                state.checked(spec)
        else:
            assert state.checked(spec).num_updates == 0


# Files


@st.composite
def states(draw: st.DrawFn) -> BatchNormState[Any]:
    """Any subset of arrays, each of any length and dtype, holding any bits."""
    arrays = {}
    for name in draw(st.sets(st.sampled_from(NAMES))):
        dtype = numpy_dtype(draw(st.sampled_from(DTYPES)))
        bits = draw(st.binary(max_size=5 * dtype.itemsize))
        arrays[name] = np.frombuffer(bits[: len(bits) // dtype.itemsize * dtype.itemsize], dtype)
    return BatchNormState(**arrays, num_updates=draw(st.none() | st.integers(0, MAX_COUNTER)))


@given(state=states())
def test_a_file_comes_back_bit_for_bit(state: BatchNormState[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("round-trip")
    content = saved(state, folder)
    assert same(read(content, folder), state)
    assert saved(read(content, folder), folder) == content


def test_what_is_read_can_be_written_to(tmp_path: Path) -> None:
    state = read(saved(BatchNormState.initial(SPECS["mixed"]), tmp_path), tmp_path)
    assert all(array.flags.writeable and array.dtype.isnative for array in state.arrays().values())


def test_the_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state.of.layer"
    BatchNormState.initial(PLAIN).to_npz(str(path))
    assert same(BatchNormState.from_npz(str(path)), BatchNormState.initial(PLAIN))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.of.layer"]


def test_numpy_reads_the_file_too(tmp_path: Path) -> None:
    BatchNormState.initial(SPECS["mixed"]).to_npz(tmp_path / "state.npz")
    with np.load(tmp_path / "state.npz", allow_pickle=False) as members:
        assert members["gamma"].view(ml_dtypes.bfloat16).tolist() == [1, 1, 1]
        assert members["moving_variance"].tolist() == [1, 1, 1]
        assert json.loads(str(members["dtypes"]))["gamma"] == "bfloat16"


@pytest.mark.parametrize("array", [np.ones((2, 2)), np.float32(1), np.arange(3), np.array([None]), ["a"]], ids=repr)
def test_what_could_not_be_read_back_is_not_written(array: Any, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"^beta must be of shape \(num_features,\)"):
        BatchNormState(beta=array).to_npz(tmp_path / "state.npz")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_opened_is_the_system_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BatchNormState.from_npz(tmp_path / "absent.npz")
    with pytest.raises(IsADirectoryError):
        BatchNormState.from_npz(tmp_path)


# Damaged and hostile files

SAMPLE = BatchNormState.initial(SPECS["mixed"]).replace(num_updates=12)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    content = saved(SAMPLE, tmp_path)
    for length in range(len(content)):
        with pytest.raises(FileError, match=r"given\.npz"):
            read(content[:length], tmp_path)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_damaged_byte_is_refused_or_does_not_matter(flip: int, tmp_path: Path) -> None:
    """The zip format has bytes that mean nothing here, such as dates: then the state must be the one that was saved."""
    content = saved(SAMPLE, tmp_path)
    harmless = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= flip
        try:
            state = read(bytes(damaged), tmp_path)
        except FileError:
            continue
        assert same(state, SAMPLE), f"byte {position} changed the state silently"
        harmless += 1
    assert harmless < len(content) // 4


@given(cut=st.tuples(st.floats(0, 1), st.floats(0, 1)), filling=st.binary(max_size=40))
def test_a_replaced_region_is_refused_or_does_not_matter(
    cut: tuple[float, float], filling: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    content = saved(SAMPLE, folder)
    start, stop = sorted(int(part * len(content)) for part in cut)
    try:
        state = read(content[:start] + filling + content[stop:], folder)
    except FileError:
        return
    assert same(state, SAMPLE)


@given(content=st.binary(max_size=200))
def test_other_bytes_are_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FileError, match="not a batch norm state"):
        read(content, tmp_path_factory.mktemp("noise"))


def npy(array: Any, *, version: tuple[int, int] = (1, 0), pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), version=version, allow_pickle=pickled)
    return stream.getvalue()


def header(text: str) -> bytes:
    """An array file with this header, and no data."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


GOOD = {"gamma.npy": npy(np.ones(3, np.float32)), "dtypes.npy": npy('{"gamma": "float32"}')}


def test_the_hostile_files_below_differ_from_this_good_one(tmp_path: Path) -> None:
    gamma = read(archive(GOOD), tmp_path).gamma
    assert gamma is not None
    assert gamma.tolist() == [1, 1, 1]


HOSTILE = {
    "no member": ({}, "'dtypes' is missing"),
    "no dtypes": ({"gamma.npy": GOOD["gamma.npy"]}, "'dtypes' is missing"),
    "dtypes of numbers": ({"dtypes.npy": npy(1.0)}, "'dtypes' is missing"),
    "dtypes not JSON": ({"dtypes.npy": npy("{")}, "damaged"),
    "dtypes endlessly deep": ({"dtypes.npy": npy("[" * 100_000)}, "damaged"),
    "dtypes a list": ({**GOOD, "dtypes.npy": npy('["gamma"]')}, "must name each array"),
    "dtypes of another array": ({**GOOD, "dtypes.npy": npy('{"beta": "float32"}')}, "must name each array"),
    "dtypes several": ({**GOOD, "dtypes.npy": npy(["{}", "{}"])}, "'dtypes' is missing"),
    "dtypes no text": ({**GOOD, "dtypes.npy": npy(np.array(0x7FFFFFFF, "<u4").view("<U1"))}, "damaged"),
    "another dtype": ({**GOOD, "dtypes.npy": npy('{"gamma": "float64"}')}, "'dtypes' says 'float64'"),
    "bfloat16 over float32": ({**GOOD, "dtypes.npy": npy('{"gamma": "bfloat16"}')}, "'dtypes' says 'bfloat16'"),
    "a dtype that is a list": ({**GOOD, "dtypes.npy": npy('{"gamma": ["float32"]}')}, "'dtypes' says"),
    "a stranger's member": ({**GOOD, "weight.npy": npy(1.0)}, r"unexpected member 'weight\.npy'"),
    "a path": ({**GOOD, "../gamma.npy": npy(1.0)}, r"unexpected member '\.\./gamma\.npy'"),
    "a member twice": ({**GOOD, "gamma": npy(1.0)}, "unexpected member 'gamma'"),
    "a pickle": ({**GOOD, "gamma.npy": npy([print, print], pickled=True)}, "expected one number or a vector"),
    "a record with an object": ({**GOOD, "gamma.npy": npy(np.zeros(1, "O,f4"), pickled=True)}, "expected one number"),
    "a matrix": ({**GOOD, "gamma.npy": npy(np.ones((1, 3)))}, "expected one number or a vector"),
    "a newer array format": ({**GOOD, "gamma.npy": npy(1.0, version=(2, 0))}, r"array format 1\.0"),
    "not an array": ({**GOOD, "gamma.npy": b"gamma"}, "damaged"),
    "an empty array file": ({**GOOD, "gamma.npy": b""}, "damaged"),
    "more data than declared": ({**GOOD, "gamma.npy": GOOD["gamma.npy"] + b"\0"}, "needs 12 bytes; 13 are stored"),
    "less data than declared": ({**GOOD, "gamma.npy": GOOD["gamma.npy"][:-1]}, "needs 12 bytes; 11 are stored"),
    "a terabyte declared": (
        {**GOOD, "gamma.npy": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }")},
        "needs 4000000000000 bytes; 0 are stored",
    ),
    "a negative length": (
        {**GOOD, "gamma.npy": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }")},
        "needs -12 bytes",
    ),
    "code as header": ({**GOOD, "gamma.npy": header("__import__('os').abort()")}, "damaged"),
    "an open bracket as header": ({**GOOD, "gamma.npy": header("(((((")}, "damaged"),
    "an endless header": ({**GOOD, "gamma.npy": header("{" * 60_000)}, "damaged"),
    "an unknown descr": (
        {**GOOD, "gamma.npy": header("{'descr': '<q9', 'fortran_order': False, 'shape': (), }")},
        "damaged",
    ),
    "a counter of another dtype": ({**GOOD, "num_updates.npy": npy(np.float64(3))}, "num_updates must be one int64"),
    "several counters": ({**GOOD, "num_updates.npy": npy(np.array([1, 2]))}, "num_updates must be one int64"),
}  # fmt: skip


@pytest.mark.parametrize(("members", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message) as refusal:
        read(archive(members), tmp_path)
    assert "given.npz" in str(refusal.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_bomb_is_refused_before_it_is_unpacked(compression: int, tmp_path: Path) -> None:
    bomb = npy(np.zeros(4_000_000, np.float32))
    content = archive({**GOOD, "gamma.npy": bomb}, compression)
    assert len(content) < len(bomb) // 100
    with pytest.raises(FileError, match=r"'gamma\.npy' is compressed; a state is stored plain"):
        read(content, tmp_path)


def test_a_member_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    """The sizes in the zip directory and in the array's header agree, and both lie."""
    lying = header("{'descr': '<f4', 'fortran_order': False, 'shape': (250000000,), }")
    content = archive({**GOOD, "gamma.npy": lying})
    true_size, claimed = len(lying).to_bytes(4, "little"), (len(lying) + 10**9).to_bytes(4, "little")
    with pytest.raises(FileError, match=r"given\.npz"):
        read(content.replace(true_size * 2, claimed * 2), tmp_path)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    content = archive(GOOD).replace(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01")
    content = content.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    with pytest.raises(FileError, match="encrypted"):
        read(content, tmp_path)
