"""Whatever a format takes comes back bit-equal: names, dtypes, shapes, memory layout and order where it keeps them."""

from __future__ import annotations

import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnlayer import checkpoint
from bnlayer.checkpoint import Checkpoint, CheckpointError, Tensor

FORMATS = ("torch", "safetensors", "npz", "keras.h5", "tensorflow", "flax", "orbax", "haiku")
KEEPS_ORDER = ("torch", "npz", "flax")
KEEPS_LAYOUT = ("torch",)
DTYPES = [np.dtype(code) for code in "?bBhHiIlLefdF"] + [np.dtype(ml_dtypes.bfloat16)]
MORE = {
    "torch": [np.dtype("D"), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)],
    "safetensors": [np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)],
    "npz": [np.dtype("D"), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)],
    "flax": [np.dtype("D"), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)],
}
# Letters that formats use for something of their own, and some that none does; few, so that names meet each other.
NAMES = st.one_of(
    st.text("ab/.:", max_size=6),
    st.text("é\0\\ %\n'0😀\ud800", max_size=4),
    st.sampled_from(["dtypes", "__metadata__", "layers/bn/vars/0", "model_weights/a", "_METADATA", "d", "checkpoint"]),
)
PLAIN_NAMES = st.from_regex(r"[a-e]{1,3}(/[f-k]{1,3}){0,2}(/[l-p][0-9]?)", fullmatch=True)


@st.composite
def arrays(draw: st.DrawFn, dtypes: list[np.dtype[Any]]) -> np.ndarray[Any, Any]:
    """Any bits (NaNs with a payload among them) of any shape, in any order of axes, dense or strided."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    step = draw(st.integers(1, 2))
    whole = (*shape[:-1], shape[-1] * step) if shape else ()
    size = int(np.prod(whole, dtype=int)) * dtype.itemsize
    bits = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, size, np.uint8)
    data = (bits & 1 if dtype.kind == "b" else bits).tobytes()
    array = np.frombuffer(data, dtype).reshape(whole)
    array = array[..., ::step] if shape else array
    return array.transpose(draw(st.permutations(range(len(shape)))))


def checkpoints(format: str, names: st.SearchStrategy[str]) -> st.SearchStrategy[Checkpoint]:
    tensors = st.dictionaries(names, arrays(DTYPES + MORE.get(format, [])), min_size=1, max_size=5)
    return tensors.map(
        lambda found: Checkpoint("made", {n: Tensor.of(a) for n, a in found.items()}, order_is_meaningful=True)
    )


def bits(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def layout(array: np.ndarray[Any, Any]) -> list[int]:
    """The axes that matter, the outermost first."""
    axes = [axis for axis, n in enumerate(array.shape) if n > 1]
    return sorted(axes, key=lambda axis: -array.strides[axis]) if array.size else []


def assert_same(found: Checkpoint, made: Checkpoint, format: str) -> None:
    assert set(found) == set(made)
    if format in KEEPS_ORDER:
        assert list(found) == in_folders(made) if format == "flax" else list(found) == list(made)
    for name, array in made.items():
        again = found[name]
        assert bits(again) == bits(array), name
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (array.dtype, array.shape)
        if format in KEEPS_LAYOUT:
            assert layout(again) == layout(array), name


def in_folders(made: Checkpoint) -> list[str]:
    """The order when every folder is written whole, where its first tensor is."""
    tree: dict[str, Any] = {}
    for name in made:
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = name
    order: list[str] = []

    def walk(node: Any) -> None:
        for child in node.values():
            walk(child) if isinstance(child, dict) else order.append(child)

    walk(tree)
    return order


LIKE = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@settings(LIKE, max_examples=30)
@given(data=st.data())
def test_it_comes_back(format: str, data: st.DataObject) -> None:
    made = data.draw(checkpoints(format, PLAIN_NAMES))
    with tempfile.TemporaryDirectory() as room:
        made.save(Path(room) / "out", format)
        found = checkpoint.open(Path(room) / "out")
        assert found.format == format
        assert_same(found, made, format)


@pytest.mark.parametrize("format", FORMATS)
@settings(LIKE, max_examples=40)
@given(data=st.data())
def test_any_name_comes_back_or_is_refused(format: str, data: st.DataObject) -> None:
    made = data.draw(checkpoints(format, NAMES))
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "out"
        refusal = refused(made, path, format)
        if refusal is None:
            assert_same(checkpoint.open(path), made, format)
        else:
            assert any(repr(name) in refusal for name in made)
            assert list(Path(room).iterdir()) == []


def refused(made: Checkpoint, path: Path, format: str) -> str | None:
    """Why it cannot be written so; None once it is written."""
    try:
        made.save(path, format)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_from_any_format_to_any(source: str, format: str, tmp_path: Path) -> None:
    tensors = {"params/bn/scale": np.arange(4, dtype=np.float32), "batch_stats/bn/mean": np.ones(4, ml_dtypes.bfloat16),
               "step": np.array(3), "kernel": np.arange(6.0).reshape(2, 3).T}  # fmt: skip
    made = Checkpoint("made", {n: Tensor.of(a) for n, a in tensors.items()}, order_is_meaningful=True)
    made.save(tmp_path / "source", source)
    found = checkpoint.open(tmp_path / "source")
    found.save(tmp_path / "out", format)
    again = checkpoint.open(tmp_path / "out")
    assert {name: bits(again[name]) for name in again} == {name: bits(a) for name, a in tensors.items()}


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "orbax"])  # whose store draws file names
def test_the_same_checkpoint_gives_the_same_bytes(format: str, tmp_path: Path) -> None:
    made = Checkpoint("made", {n: Tensor.of(np.arange(3.0)) for n in "ba"}, order_is_meaningful=True)
    for name in ("first", "second"):
        made.save(tmp_path / name, format)
    first, second = (
        [p.read_bytes() for p in ([path] if path.is_file() else sorted(path.iterdir()))]
        for path in (tmp_path / "first", tmp_path / "second")
    )
    assert first == second


def test_a_flax_array_above_the_limit_lies_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlayer.checkpoint import flax_msgpack

    monkeypatch.setattr(flax_msgpack, "_CHUNK", 100)
    tensors = {"a/big": np.arange(60.0).reshape(5, 12).T, "small": np.arange(3), "edge": np.zeros(100, np.uint8)}
    made = Checkpoint("made", {n: Tensor.of(a) for n, a in tensors.items()}, order_is_meaningful=True)
    made.save(tmp_path / "x.msgpack")
    assert (tmp_path / "x.msgpack").read_bytes().count(b"__msgpack_chunked_array__") == 1
    assert_same(checkpoint.open(tmp_path / "x.msgpack"), made, "flax")


def test_a_torch_file_without_checksums_is_read(tmp_path: Path) -> None:
    """As torch.save writes it after torch.serialization.set_crc32_options(False): every CRC-32 is 0."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "model.pt"
    Checkpoint("torch", {"weight": Tensor.of(array)}, order_is_meaningful=True).save(path)
    with zipfile.ZipFile(path) as archive:
        checksums = [info.CRC for info in archive.infolist()]
    data = path.read_bytes()
    for checksum in checksums:
        data = data.replace(struct.pack("<I", checksum), bytes(4))
    path.write_bytes(data)
    np.testing.assert_array_equal(checkpoint.open(path)["weight"], array)
