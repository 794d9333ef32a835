"""Files that attack or are damaged, one of each kind: how each is made, and what the refusal has to say."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np

from bnlayer.checkpoint import Checkpoint, Tensor, leveldb, protobuf, save
from bnlayer.checkpoint.crc32c import crc32c, masked

Maker = Callable[[Path], Path]
SECRET = "the secret of another file"


class Attack:
    """A pickle of this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.marker)!r}, 'w').write('ran')",))


def small() -> Checkpoint:
    arrays = {"bn.weight": np.ones(4, np.float32), "bn.bias": np.zeros(4, np.float32),
              "bn.running_mean": np.ones(4, np.float32), "bn.running_var": np.ones(4, np.float32),
              "bn.num_batches_tracked": np.array(3)}  # fmt: skip
    return Checkpoint("torch", {n: Tensor.of(a) for n, a in arrays.items()}, order_is_meaningful=True)


def zipped(members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def torch_zip(pkl: bytes, storages: dict[str, bytes] | None = None, **how: Any) -> bytes:
    inside = {"m/data.pkl": pkl, "m/version": b"3\n"}
    inside.update({f"m/data/{key}": data for key, data in (storages or {}).items()})
    return zipped(inside, **how)


def tensor_pickle(
    *, size: str = "K\x04", shape: str = "(K\x04t", stride: str = "(K\x01t", offset: str = "K\x00", key: str = "0",
    storage: str = "FloatStorage", function: str = "torch._utils\n_rebuild_tensor_v2",
) -> bytes:  # fmt: skip
    """A pickled {"w": tensor}, its numbers as opcodes."""
    text = (
        f"\x80\x02}}X\x01\x00\x00\x00wc{function}\n((X\x07\x00\x00\x00storagectorch\n{storage}\n"
        f"X\x01\x00\x00\x00{key}X\x03\x00\x00\x00cpu{size}tQ{offset}{shape}{stride}\x89"
        "ccollections\nOrderedDict\n)RtRs."
    )
    return text.encode("latin-1")


def long(number: int) -> str:
    data = number.to_bytes(9, "little", signed=True)
    return "\x8a\x09" + data.decode("latin-1")


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def array_header(shape: Any, descr: str = "<f4") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


def hdf5(fill: Callable[[Any, Path], None]) -> Maker:
    def make(folder: Path) -> Path:
        (folder / "other.txt").write_text(SECRET * 10)
        with h5py.File(folder / "other.h5", "w") as other:
            other["secret"] = np.ones(4)
        path = folder / "x.weights.h5"
        with h5py.File(path, "w") as root:
            root["layers/batch_normalization/vars/0"] = np.ones(4, np.float32)
            fill(root, folder)
        return path

    return make


def raw(name: str, data: bytes | Callable[[], bytes]) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data())
        return path

    return make


def bundle(entries: list[tuple[bytes, bytes]], data: bytes = bytes(64), *, table: bytes | None = None) -> Maker:
    def make(folder: Path) -> Path:
        header = protobuf.encode([(1, 0, 1)])
        (folder / "x.index").write_bytes(leveldb.write([(b"", header), *entries]) if table is None else table)
        (folder / "x.data-00000-of-00001").write_bytes(data)
        return folder / "x.index"

    return make


def entry(dtype: int = 1, shape: tuple[int, ...] = (4,), offset: int = 0, size: int = 16, shard: int = 0) -> bytes:
    dims = protobuf.encode((2, 2, protobuf.encode([(1, 0, n)])) for n in shape)
    crc = masked(crc32c(bytes(size))) if size < 1000 else 0
    return protobuf.encode(
        [(1, 0, dtype), (2, 2, dims), (3, 0, shard), (4, 0, offset), (5, 0, size), (6, 5, crc)]
    )  # fmt: skip


def flax(tree: Any) -> bytes:
    return msgpack.packb(tree, strict_types=True)  # type: ignore[no-any-return]


def flax_array(shape: Any, dtype: str, data: bytes) -> Any:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def cut(name: str, format: str, at: float) -> Maker:
    """A sound file, cut off."""

    def make(folder: Path) -> Path:
        path = folder / name
        save(small(), path, format)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * at)])
        return path

    return make


def flipped(name: str, format: str, find: bytes, put: bytes) -> Maker:
    """A sound file with some bytes changed."""

    def make(folder: Path) -> Path:
        path = folder / name
        save(small(), path, format)
        data = path.read_bytes()
        assert find in data
        path.write_bytes(data.replace(find, put))
        return path

    return make


def attacked(wrap: Callable[[bytes], bytes], name: str) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(wrap(pickle.dumps({"w": Attack(folder / "ran")}, 2)))
        return path

    return make


def orbax(change: Callable[[Path], None], tree: Any = None) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / "x"
        (path / "params.w").mkdir(parents=True)
        zarray = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "<f4", "compressor": None, "fill_value": None,
                  "filters": None, "order": "C", "dimension_separator": "."}  # fmt: skip
        (path / "params.w" / ".zarray").write_text(json.dumps(zarray))
        (path / "params.w" / "0").write_bytes(bytes(16))
        keys = [{"key": "params", "key_type": 2}, {"key": "w", "key_type": 2}]
        plain = {"tree_metadata": {"('params', 'w')": {"key_metadata": keys, "value_metadata": {"value_type": "np.ndarray"}}},
                 "use_ocdbt": False}  # fmt: skip
        (path / "_METADATA").write_text(json.dumps(plain if tree is None else tree))
        change(path)
        return path

    return make


def large_zarr(path: Path) -> None:
    zarray = json.loads((path / "params.w" / ".zarray").read_text())
    zarray.update(shape=[2**40], chunks=[2**20])
    (path / "params.w" / ".zarray").write_text(json.dumps(zarray))


def linked(path: Path) -> None:
    (path / "params.w" / "0").unlink()
    (path / "params.w" / "0").symlink_to("/etc/hostname")


def without_tree(path: Path) -> None:
    (path / "_METADATA").write_text("{}")


def escaping(keys: list[str]) -> Any:
    parts = [{"key": key, "key_type": 2} for key in keys]
    return {"tree_metadata": {"x": {"key_metadata": parts, "value_metadata": {"value_type": "np.ndarray"}}},
            "use_ocdbt": False}  # fmt: skip


def onnx_model(**tensor: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        import onnx
        from onnx import helper

        node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])
        weights = [helper.make_tensor(name, 1, [4], np.ones(4, np.float32)) for name in "sbmv"]
        graph = helper.make_graph([node], "g", [], [], weights)
        model = helper.make_model(graph)
        first = model.graph.initializer[0]
        if "external" in tensor:
            first.ClearField("float_data")
            first.data_location = onnx.TensorProto.EXTERNAL
            item = first.external_data.add()
            item.key, item.value = "location", tensor["external"]
        if "dims" in tensor:
            first.ClearField("float_data")
            first.raw_data = bytes(16)
            first.dims[0] = tensor["dims"]
        if "twice" in tensor:
            model.graph.initializer.add().CopyFrom(first)
        return model.SerializeToString()  # type: ignore[no-any-return]

    return make


def hdf5_external_storage(root: Any, folder: Path) -> None:
    root.create_dataset("stolen", (4,), "f4", external=[(str(folder / "other.txt"), 0, 16)])


def hdf5_virtual(root: Any, folder: Path) -> None:
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "secret", (4,))
    root.create_virtual_dataset("stolen", layout)


def hdf5_loop(root: Any, folder: Path) -> None:
    root["layers/again"] = root["layers"]


def hdf5_deep(root: Any, folder: Path) -> None:
    node = root
    for _ in range(100):
        node = node.create_group("a")


def hdf5_large(root: Any, folder: Path) -> None:
    root.create_dataset("bomb", (10**11,), "f4", chunks=(10**6,))


def hdf5_listed(root: Any, folder: Path) -> None:
    root.attrs["layer_names"] = [b"a"]
    root.create_group("a").attrs["weight_names"] = [b"a/gamma:0"]


def nested_json(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def doubled(data: bytes) -> bytes:
    """An archive with a member twice."""
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        first = archive.infolist()[0]
        archive.writestr(first.filename, archive.read(first))
    return out.getvalue()


def keras(config: bytes, weights: bytes = b"no HDF5") -> bytes:
    return zipped({"config.json": config, "model.weights.h5": weights})


def misplaced(data: bytes, member: bytes) -> bytes:
    """An archive whose directory has a member begin inside of its data."""
    at = data.rindex(member) - 46 + 42  # a directory entry has 46 bytes before the name; the place is the last
    (place,) = struct.unpack_from("<I", data, at)
    return data[:at] + struct.pack("<I", place + 31) + data[at + 4 :]


def resized(data: bytes, member: bytes) -> bytes:
    """An archive whose directory has a plain member unpack to 32 MB."""
    at = data.rindex(member) - 46 + 24
    return data[:at] + struct.pack("<I", 2**25) + data[at + 4 :]


def nested_pickle(depth: int) -> bytes:
    return b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"}" + b"s" * depth + b"."


def laughs() -> bytes:
    """A dict of a dict of ... each twice: 2**60 leaves in a few hundred bytes."""
    out = b"\x80\x02}q\x00X\x01\x00\x00\x00lK\x01s"
    for i in range(60):
        out += (
            b"}"
            + b"q"
            + bytes([i + 1])
            + b"(X\x01\x00\x00\x00ah"
            + bytes([i])
            + b"X\x01\x00\x00\x00bh"
            + bytes([i])
            + b"u"
        )
    return out + b"."


ZEROS = {"0": bytes(16)}
CASES: dict[str, tuple[Maker, str]] = {
    # torch
    "torch-runs-code": (attacked(lambda p: torch_zip(p), "x.pt"), "no state_dict"),
    "torch-legacy-runs-code": (
        attacked(lambda p: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}." + p + b"\x80\x02].", "x.pt"),
        "no state_dict"),
    "torch-no-storage": (raw("x.pt", torch_zip(tensor_pickle())), "storage '0' is not in the file"),
    "torch-shape-too-large": (raw("x.pt", torch_zip(tensor_pickle(shape="(K\x05t"), ZEROS)), "needs 20 bytes"),
    "torch-shape-bomb": (raw("x.pt", torch_zip(tensor_pickle(shape=f"({long(2**40)}t"), ZEROS)), "needs"),
    "torch-expanded-bomb": (
        raw("x.pt", torch_zip(tensor_pickle(shape=f"({long(2**40)}t", stride="(K\x00t"), ZEROS)), "needs"),
    "torch-offset": (raw("x.pt", torch_zip(tensor_pickle(offset="K\x04"), ZEROS)), "needs 32 bytes"),
    "torch-offset-negative": (raw("x.pt", torch_zip(tensor_pickle(offset=long(-4)), ZEROS)), "make no sense"),
    "torch-stride": (raw("x.pt", torch_zip(tensor_pickle(stride="(K\xfft"), ZEROS)), "needs"),
    "torch-stride-negative": (raw("x.pt", torch_zip(tensor_pickle(stride=f"({long(-1)}t"), ZEROS)), "make no sense"),
    "torch-dtype": (raw("x.pt", torch_zip(tensor_pickle(storage="QuantStorage"), ZEROS)), "dtype"),
    "torch-sparse": (
        raw("x.pt", torch_zip(tensor_pickle(function="torch._utils\n_rebuild_sparse_tensor"), ZEROS)), "not read here"),
    "torch-member-twice": (raw("x.pt", doubled(torch_zip(tensor_pickle(), ZEROS))), "twice"),
    "torch-compressed": (
        raw("x.pt", lambda: torch_zip(tensor_pickle(), {"0": bytes(2**20)}, compression=zipfile.ZIP_DEFLATED)), "compressed"),
    "torch-storage-flipped": (
        raw("x.pt", lambda: torch_zip(tensor_pickle(), {"0": b"\x5a" * 16}).replace(b"\x5a" * 16, b"\x5a" * 15 + b"\x5b")),
        "CRC-32"),
    "torch-member-under-two-names": (
        raw("x.pt", lambda: torch_zip(tensor_pickle(), ZEROS).replace(b"/data/0", b"/data/1", 1)), "name it differently"),
    "torch-pickle-cut": (raw("x.pt", torch_zip(tensor_pickle()[:60], ZEROS)), "pickle is damaged"),
    "torch-pickle-endless": (raw("x.pt", torch_zip(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", ZEROS)), "no state_dict"),
    "torch-nested": (raw("x.pt", torch_zip(nested_pickle(5000))), "no state_dict"),
    "torch-memo-bomb": (raw("x.pt", torch_zip(b"\x80\x02Nr\xff\xff\xff\xff.")), "no state_dict"),
    "torch-string-bomb": (raw("x.pt", torch_zip(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.")), "damaged"),
    "torch-stack": (raw("x.pt", torch_zip(b"\x80\x02R.")), "empty stack"),
    "torch-extension": (raw("x.pt", torch_zip(b"\x80\x02\x82\x01.")), "no checkpoint needs"),
    "torch-cut": (cut("x.pt", "torch", 0.6), "damaged"),
    "torch-big-endian": (
        raw("x.pt", zipped({"m/data.pkl": tensor_pickle(), "m/byteorder": b"big", "m/data/0": bytes(16)})), "little-endian"),
    "torch-number-too-long": (
        raw("x.pt", torch_zip(b"\x80\x02}\x8b" + struct.pack("<i", 6000) + b"\x7f" * 6000 + b"K\x01s.")), "47999 bits"),
    "torch-key-nested": (raw("x.pt", torch_zip(b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.")), "nested too deep"),
    "torch-shape-nested": (
        raw("x.pt", torch_zip(tensor_pickle(shape=")" + "\x85" * 50_000), ZEROS)), "nested too deep"),
    "haiku-key-nested": (raw("x.pkl", b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."), "nested too deep"),
    "torch-tensor-of-nothing": (
        raw("x.pt", torch_zip(b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n)Rs.")), "over a storage"),
    "torch-script": (raw("x.pt", zipped({"m/data.pkl": tensor_pickle(), "m/code/a.py": b"", "m/data/0": bytes(16)})),
                     "TorchScript"),
    # safetensors
    "safetensors-header-length": (raw("x", safetensors({}, length=2**39)), "declared"),
    "safetensors-cut": (cut("x.safetensors", "safetensors", 0.9), "stored"),
    "safetensors-overlap": (
        raw("x", safetensors({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}, bytes(16))), "begins at"),
    "safetensors-shape": (
        raw("x", safetensors({"a": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 16]}}, bytes(16))), "needs"),
    "safetensors-negative": (
        raw("x", safetensors({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16))), "list of counts"),
    "safetensors-dtype": (
        raw("x", safetensors({"a": {"dtype": "O", "shape": [4], "data_offsets": [0, 16]}}, bytes(16))), "dtype"),
    "safetensors-twice": (raw("x", safetensors(b'{"a": 1, "a": 2}')), "twice"),
    "safetensors-nested": (raw("x", safetensors(b'{"a":' + nested_json(100_000) + b"}")), "JSON"),
    "safetensors-nan": (raw("x", safetensors(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}')), "counts"),
    "index-escapes": (raw("x.index.json", json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode()), "plain name"),
    "index-absolute": (raw("x.index.json", json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode()), "plain name"),
    "index-missing": (raw("x.index.json", json.dumps({"weight_map": {"a": "no.safetensors"}}).encode()), "not beside it"),
    # npz, eqx
    "npz-objects": (raw("x.npz", zipped({"a.npy": npy(array_header("(1,)", "|O"), b"cos")})), "plain numbers"),
    "npz-shape-bomb": (raw("x.npz", zipped({"a.npy": npy(array_header("(1099511627776,)"))})), "does not fit"),
    "npz-zip-bomb": (
        raw("x.npz", lambda: zipped({"a.npy": npy(array_header(f"({2**25},)"), bytes(2**27))}, compression=zipfile.ZIP_DEFLATED)),
        "would become"),
    "npz-header": (raw("x.npz", zipped({"a.npy": npy("__import__('os').system('true')")})), "no array of numpy"),
    "npz-cut": (cut("x.npz", "npz", 0.7), "damaged"),
    "eqx-cut": (raw("x.eqx", npy(array_header("(4,)"), bytes(8))), "ends before"),
    "eqx-shape": (raw("x.eqx", npy(array_header("(-4,)"), bytes(16))), "makes no sense"),
    # HDF5
    "hdf5-soft-link": (hdf5(lambda root, _: root.__setitem__("a", h5py.SoftLink("/layers"))), "SoftLink"),
    "hdf5-external-link": (hdf5(lambda root, f: root.__setitem__("a", h5py.ExternalLink(str(f / "other.h5"), "/"))),
                           "ExternalLink"),
    "hdf5-external-storage": (hdf5(hdf5_external_storage), "other files"),
    "hdf5-virtual": (hdf5(hdf5_virtual), "other files"),
    "hdf5-loop": (hdf5(hdf5_loop), "inside of itself"),
    "hdf5-deep": (hdf5(hdf5_deep), "too deep"),
    "hdf5-bomb": (hdf5(hdf5_large), "declared"),
    "hdf5-cut": (raw("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(100)), "damaged"),
    "hdf5-lists-what-is-not-there": (
        hdf5(hdf5_listed), "does not hold it"),
    "keras-no-weights": (raw("x.keras", zipped({"config.json": b"{}"})), "expected in it"),
    "keras-weights-damaged": (raw("x.keras", keras(b"{}")), "HDF5"),
    "keras-weights-misplaced": (raw("x.keras", lambda: misplaced(keras(b"{}"), b"model.weights.h5")), "directory says"),
    "keras-weights-sizes": (raw("x.keras", lambda: resized(keras(b"{}"), b"model.weights.h5")), "sizes differ"),
    "keras-config-nested": (raw("x.keras", keras(nested_json(100_000))), "JSON"),
    # TensorFlow
    "tf-dtype-size": (bundle([(b"a", entry(size=12))]), "does not fit"),
    "tf-offset": (bundle([(b"a", entry(offset=2**60))]), "declared"),
    "tf-shard": (bundle([(b"a", entry(shard=7))]), "data file 7"),
    "tf-shape-bomb": (bundle([(b"a", entry(shape=(2**31, 2**31)))]), "does not fit"),
    "tf-order": (bundle([(b"b", entry()), (b"a", entry())]), "in order"),
    "tf-block": (bundle([], table=leveldb.write([(b"", b"")])[:-48] + b"\xff" * 40 + leveldb.MAGIC.to_bytes(8, "little")),
                 "damaged|past the end"),
    "tf-checksum": (bundle([], table=b"\x01" + leveldb.write([(b"", b"xyz")])[1:]), "checksum"),
    "tf-no-data": (raw("x.index", leveldb.write([(b"", protobuf.encode([(1, 0, 1)]))])), "not beside it"),
    "tf-header": (bundle([], table=leveldb.write([(b"", protobuf.encode([(1, 0, 10**9)]))])), "data files"),
    # Flax, Haiku
    "flax-array": (raw("x", flax({"params": {"w": flax_array((2**40,), "float32", b"1234")}})), "does not fit"),
    "flax-dtype": (raw("x", flax({"params": {"w": flax_array((1,), "object", b"12345678")}})), "does not fit|unknown"),
    "flax-extension": (raw("x", flax({"a": msgpack.ExtType(99, b"")})), "extension"),
    "flax-cut": (raw("x", flax({"params": {"w": flax_array((1,), "float32", b"1234")}})[:-3]), "damaged"),
    "flax-twice": (raw("x", b"\x82\xa1a\x01\xa1a\x02"), "twice"),
    "flax-nested": (raw("x", b"\x81\xa1a" * 3000 + b"\x01"), "damaged|deep"),
    "haiku-runs-code": (attacked(lambda p: p, "x.pkl"), "no array and is not made"),
    "haiku-laughs": (raw("x.pkl", laughs()), "more than"),
    "haiku-nested": (raw("x.pkl", nested_pickle(5000)), "deep"),
    "haiku-endless": (raw("x.pkl", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."), "deep"),
    # Orbax
    "orbax-escapes": (orbax(lambda _: None, escaping(["..", "..", "etc"])), "cannot be"),
    "orbax-escapes-by-slash": (orbax(lambda _: None, escaping(["../../etc/x"])), "cannot be the name"),
    "orbax-link": (orbax(linked), "link"),
    "orbax-bomb": (orbax(large_zarr), "more than the files can hold"),
    "orbax-tree": (orbax(without_tree), "object was expected"),
    # ONNX
    "onnx-external": (raw("x.onnx", onnx_model(external="../../etc/passwd")), "another file"),
    "onnx-shape": (raw("x.onnx", onnx_model(dims=2**40)), "does not fit"),
    "onnx-twice": (raw("x.onnx", onnx_model(twice=True)), "twice"),
    "onnx-cut": (raw("x.onnx", lambda: onnx_model()()[:-20]), "no ONNX model|damaged"),
    # none of them
    "empty": (raw("x.pt", b""), "is empty"),
    "text": (raw("x.pt", b"hello"), "begins with"),
    "zip-of-nothing": (raw("x.pt", zipped({"readme.txt": b"hello"})), "begins with"),
}  # fmt: skip


def made(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every case's file."""
    for name, (maker, _) in CASES.items():
        room = folder / name
        room.mkdir()
        yield name, maker(room)
