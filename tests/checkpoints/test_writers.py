"""What bnlayer writes is what the real frameworks load, with equal outputs; and what it cannot write it says."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bnlayer import checkpoint
from bnlayer.checkpoint import FORMATS, Checkpoint, CheckpointError, Tensor
from bnlayer.checkpoint.formats import named
from bnlayer.errors import BackendUnavailable

CHECKS = {"torch": 11, "keras": 10, "flax": 11}


def of(**tensors: np.ndarray) -> Checkpoint:
    return Checkpoint("made", {name: Tensor.of(array) for name, array in tensors.items()}, order_is_meaningful=True)


@pytest.mark.parametrize("framework", CHECKS)
def test_the_framework_loads_it_with_equal_outputs(framework: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("frameworks.py")
    done = subprocess.run(
        [sys.executable, str(script), framework, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert {name: said for name, said in results.items() if said} == {}
    assert len(results) == CHECKS[framework]


def test_numpy_loads_an_npz(tmp_path: Path) -> None:
    arrays = {"a/b": np.arange(6.0).reshape(2, 3).T, "half": np.ones(3, np.float16), "n": np.array(3)}
    of(**arrays).save(tmp_path / "x.npz")
    program = """
import sys
import numpy as np
for name, array in np.load(sys.argv[1], allow_pickle=False).items():
    print(name, array.dtype, array.shape, array.tobytes().hex(), sep=";")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x.npz")], capture_output=True, text=True, check=True
    )
    wanted = [f"{name};{a.dtype};{a.shape};{a.tobytes().hex()}" for name, a in arrays.items()]
    assert done.stdout.splitlines() == wanted


# TensorFlow's several files


@pytest.mark.parametrize("name", ["net.ckpt", "net.ckpt-100", "net.ckpt.index", "net.index"])
def test_a_prefix_is_what_tensorflow_calls_a_checkpoint(name: str, tmp_path: Path) -> None:
    of(a=np.arange(3.0)).save(tmp_path / name, "tensorflow")
    prefix = name.removesuffix(".index")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{prefix}.data-00000-of-00001", f"{prefix}.index"]
    for opened in (prefix, f"{prefix}.index"):
        assert checkpoint.open(tmp_path / opened)["a"].tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(CheckpointError, match="--force"):
        of(a=np.arange(3.0)).save(tmp_path / name, "tensorflow")


def test_another_name_is_a_folder_that_tensorflow_finds_the_latest_in(tmp_path: Path) -> None:
    of(a=np.arange(3.0)).save(tmp_path / "net", "tensorflow")
    inside = sorted(p.name for p in (tmp_path / "net").iterdir())
    assert inside == ["checkpoint", "model.ckpt.data-00000-of-00001", "model.ckpt.index"]


def test_replacing_a_prefix_leaves_no_old_files(tmp_path: Path) -> None:
    for value in range(4):
        of(a=np.full(3, value)).save(tmp_path / "net.ckpt", force=True)
        assert checkpoint.open(tmp_path / "net.ckpt")["a"].tolist() == [value] * 3
    assert len(list(tmp_path.glob("net.ckpt.data*"))) == 2  # the one with the tensors, and an empty one
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_leaves_the_files_of_a_prefix(tmp_path: Path) -> None:
    def fails() -> np.ndarray:
        raise OSError("the disk is gone")

    of(a=np.arange(3.0)).save(tmp_path / "net.ckpt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    broken = Checkpoint("made", {"a": Tensor(np.dtype("f8"), (3,), fails)}, order_is_meaningful=True)
    with pytest.raises(OSError, match="disk"):
        broken.save(tmp_path / "net.ckpt", force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_prefix_is_whole_at_any_moment(tmp_path: Path) -> None:
    """Stopped at random moments: the index that is there belongs to the data that is there."""
    writer = """
import sys
import numpy as np
from bnlayer.checkpoint import Checkpoint, Tensor, save
for i in range(10**9):
    tensors = {n: Tensor.of(np.full(5000, float(i % 2), np.float32)) for n in "abc"}
    save(Checkpoint("x", tensors, order_is_meaningful=True), sys.argv[1], force=True)
    if i == 0:
        print("ready", flush=True)
"""
    path, chosen = tmp_path / "net.ckpt", random.Random(5)
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(12):
                time.sleep(chosen.uniform(0.0, 0.02))
                os.kill(process.pid, signal.SIGSTOP)
                found = checkpoint.open(path)
                assert {float(v) for name in found for v in np.unique(found[name])} in ({0.0}, {1.0})
                os.kill(process.pid, signal.SIGCONT)
            process.kill()


# What is refused, or said


@pytest.mark.parametrize(
    ("format", "name", "cause"),
    [
        ("npz", "", "is empty"),
        ("npz", "a\0b", "NUL"),
        ("keras.h5", "a\0b", "NUL"),
        ("keras.h5", "a//b", "empty"),
        ("keras.h5", "/a", "empty"),
        ("keras.h5", "a/../b", "a dot or two"),
        ("keras.h5", "a/" * 70 + "b", "71 parts"),
        ("keras.h5", "other/a", "folder of other"),
        ("flax", "a/", "empty"),
        ("flax", "other/a", "folder of other"),
        ("orbax", "", "empty"),
        ("orbax", "other.a.b", "is stored where"),
        ("tensorflow", "", "empty"),
        ("tensorflow", "_CHECKPOINTABLE_OBJECT_GRAPH", "graph of objects"),
        ("safetensors", "__metadata__", "metadata"),
        *[(name, "\ud800", "UTF-8") for name in FORMATS if FORMATS[name].writes and name != "onnx"],
        *[(name, "a" * 20_000, "20000 bytes") for name in FORMATS if FORMATS[name].writes and name != "onnx"],
    ],
)
def test_a_name_that_the_format_cannot_hold_is_refused(format: str, name: str, cause: str, tmp_path: Path) -> None:
    tensors = {key: Tensor.of(np.zeros(2)) for key in ("first", "other/a/b", name)}
    made = Checkpoint("made", tensors, order_is_meaningful=True)
    with pytest.raises(CheckpointError, match=cause) as caught:
        made.save(tmp_path / "out", format)
    assert repr(name[:200]) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("keras.h5", ml_dtypes.float8_e5m2), ("tensorflow", ml_dtypes.float8_e5m2), ("orbax", ml_dtypes.float8_e5m2),
     ("safetensors", np.complex128), ("torch", np.longdouble), ("npz", np.longdouble), ("flax", ml_dtypes.int4)],
)  # fmt: skip
def test_a_dtype_that_the_format_lacks_is_refused(format: str, dtype: type, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"odd is {np.dtype(dtype).name}.*convert it"):
        of(fine=np.zeros(2), odd=np.zeros(2, dtype)).save(tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor"):
        of().save(tmp_path / "x.npz")


def test_onnx_is_written_into_its_own_graph(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.zeros(2, np.float32), "w")
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [value], [weight])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "a.onnx")
    found = checkpoint.open(tmp_path / "a.onnx")
    found.replace({"w": np.ones(2, np.float32)}).save(tmp_path / "b.onnx")
    assert checkpoint.open(tmp_path / "b.onnx")["w"].tolist() == [1.0, 1.0]
    for wrong in (np.ones(3, np.float32), np.ones(2)):
        with pytest.raises(CheckpointError, match=r"w is float32 \(2,\) in the graph"):
            found.replace({"w": wrong}).save(tmp_path / "c.onnx")
    more = Checkpoint("onnx", {**found.tensors, "v": Tensor.of(np.ones(2))}, order_is_meaningful=True, path=found.path)
    with pytest.raises(CheckpointError, match="no initializers v"):
        more.save(tmp_path / "c.onnx")
    with pytest.raises(CheckpointError, match="needs a graph"):
        of(w=np.ones(2, np.float32)).save(tmp_path / "c.onnx")


def test_a_file_s_own_texts_are_written_back(tmp_path: Path) -> None:
    of(a=np.ones(2)).save(tmp_path / "a.safetensors")
    assert checkpoint.open(tmp_path / "a.safetensors").metadata == {}
    about = Checkpoint("safetensors", of(a=np.ones(2)).tensors, order_is_meaningful=False, metadata={"by": "me"})
    about.save(tmp_path / "b.safetensors")
    assert checkpoint.open(tmp_path / "b.safetensors").metadata == {"by": "me"}
    np.savez(tmp_path / "a.npz", a=np.ones(2), note=np.array("hello"))
    checkpoint.open(tmp_path / "a.npz").save(tmp_path / "b.npz")
    assert np.load(tmp_path / "b.npz")["note"] == "hello"


def test_the_format_is_the_name_s_or_the_one_given(tmp_path: Path) -> None:
    wanted = {"a.pt": "torch", "a.safetensors": "safetensors", "a.weights.h5": "keras.h5", "a.npz": "npz",
              "a.msgpack": "flax", "a.ckpt": "tensorflow", "a.orbax": "orbax", "a.onnx": "onnx",
              "a.eqx": "equinox", "a.haiku.pkl": "haiku", "a.pkl": "haiku"}  # fmt: skip
    assert {name: named(Path(name), None).name for name in wanted} == wanted
    with pytest.raises(CheckpointError, match="tells no format"):
        of(a=np.ones(2)).save(tmp_path / "a.zip")
    with pytest.raises(CheckpointError, match="got 'savedmodel'"):
        of(a=np.ones(2)).save(tmp_path / "a.zip", "savedmodel")


@pytest.mark.parametrize(
    ("format", "library"),
    [
        ("keras.h5", "h5py"),
        ("flax", "msgpack"),
        ("orbax", "tensorstore"),
        ("onnx", "onnx"),
        ("onnx", "google.protobuf"),
    ],
)
def test_a_missing_library_is_named_with_the_command(format: str, library: str) -> None:
    program = f"""
import sys
sys.modules[{library!r}] = None
from bnlayer import checkpoint
from bnlayer.errors import BackendUnavailable
for reads in ("torch", "safetensors", "npz", "tensorflow"):
    checkpoint.FORMATS[reads].load()
try:
    checkpoint.FORMATS[{format!r}].load()
except BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert library in done.stdout
    assert "pip install 'bnlayer[checkpoints]'" in done.stdout
    assert issubclass(BackendUnavailable, ImportError)
