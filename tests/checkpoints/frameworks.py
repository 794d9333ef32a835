"""Load what bnlayer wrote into the real frameworks and evaluate it there.

    python tests/checkpoints/frameworks.py FRAMEWORK FOLDER      # torch, keras, flax

A trained model is saved by its framework, read and written anew by bnlayer in a process without frameworks, and loaded
into a model that was initialized differently. Prints one JSON object: check to "" or what differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

REWRITE = """
import json, sys
from bnlayer import checkpoint
from bnlayer.checkpoint import flax_msgpack
for source, destination, format, options in json.loads(sys.argv[1]):
    flax_msgpack._CHUNK = options.pop("chunk", 2**30)
    checkpoint.open(source, **options).save(destination, format)
frameworks = ("torch", "tensorflow", "keras", "jax", "flax", "orbax")
assert not [name for name in frameworks if name in sys.modules]
"""
RESULTS: dict[str, str] = {}


def rewritten(*jobs: tuple[Path, Path, str | None, Mapping[str, Any]]) -> None:
    """Have bnlayer read each source and write it to the destination."""
    plain = [(str(source), str(destination), format, options) for source, destination, format, options in jobs]
    subprocess.run([sys.executable, "-c", REWRITE, json.dumps(plain)], check=True)


def check(name: str, compute: Callable[[], Any], expected: Any) -> None:
    """Note whether two results (arrays, or mappings of arrays) are bit-equal, or what was raised instead."""
    try:
        RESULTS[name] = difference(compute(), expected)
    except Exception as error:
        RESULTS[name] = f"{type(error).__name__}: {error}"


def difference(got: Any, expected: Any) -> str:
    if isinstance(expected, Mapping):
        if list(got) != list(expected):
            return f"names {list(got)} instead of {list(expected)}"
        found = {name: difference(got[name], expected[name]) for name in expected}
        return "; ".join(f"{name}: {text}" for name, text in found.items() if text)
    got, expected = np.asarray(got), np.asarray(expected)
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return f"{got.dtype} {got.shape} instead of {expected.dtype} {expected.shape}"
    return "" if got.tobytes() == expected.tobytes() else "other values"


def torch(folder: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file
    from torch import nn

    def model(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False),
            nn.BatchNorm2d(4, eps=1e-3), nn.Flatten(), nn.Linear(100, 5), nn.BatchNorm1d(5, affine=False),
        )  # fmt: skip
        for _ in range(3):
            net(torch.randn(6, 3, 7, 7))
        return net.to(memory_format=torch.channels_last).eval()

    x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    net = model(0)
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in net.state_dict().items()}
    whole = torch.arange(24.0).reshape(4, 6)
    plain = {f"of_{dtype}".replace("torch.", ""): torch.ones(3, 2).to(dtype) for dtype in (
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool,
        torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)}  # fmt: skip
    odd = {**plain, "transposed": whole.T, "row": whole[1], "same": whole, "again": whole, "scalar": torch.tensor(2.5),
           "empty": torch.zeros(0, 3), "": torch.ones(1), "a/b": torch.ones(1), "é\0": torch.ones(1)}  # fmt: skip
    for name, tensors in (("net", net.state_dict()), ("half", half), ("odd", odd)):
        torch.save(tensors, folder / f"{name}.source")
        jobs = [(folder / f"{name}.source", folder / f"{name}{suffix}", None, {}) for suffix in (".pt", ".safetensors")]
        rewritten(*jobs)
    torch.onnx.export(
        net, (x,), folder / "net.onnx", dynamo=False, training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )  # fmt: skip
    torch.onnx.export(
        model(5), (x,), folder / "other.onnx", dynamo=False, training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )  # fmt: skip

    def loaded(read: Callable[[], Any]) -> Any:
        fresh = model(9)
        fresh.load_state_dict(read(), strict=True)
        return fresh(x).detach()

    expected = net(x).detach()
    assert not torch.equal(expected, model(9)(x))
    mapped = {"weights_only": True, "mmap": True}
    check("pt", lambda: loaded(lambda: torch.load(folder / "net.pt", weights_only=True)), expected)
    check("pt mapped", lambda: loaded(lambda: torch.load(folder / "net.pt", **mapped)), expected)
    check("safetensors", lambda: loaded(lambda: load_file(folder / "net.safetensors")), expected)
    strides = {name: np.array(t.stride()) for name, t in net.state_dict().items()}
    again = torch.load(folder / "net.pt", weights_only=True)
    check("pt keeps order and strides", lambda: {name: np.array(t.stride()) for name, t in again.items()}, strides)
    bits = {name: bytes_of(t) for name, t in odd.items()}
    check("pt odd", lambda: {n: bytes_of(t) for n, t in torch.load(folder / "odd.pt", weights_only=True).items()}, bits)
    check("pt odd dtypes", lambda: kinds(torch.load(folder / "odd.pt", weights_only=True)), kinds(odd))
    ordered = {name: bits[name] for name in sorted(bits)}
    stored = load_file(folder / "odd.safetensors")
    check("safetensors odd", lambda: {name: bytes_of(stored[name]) for name in sorted(stored)}, ordered)
    check("safetensors odd dtypes", lambda: dict(sorted(kinds(stored).items())), dict(sorted(kinds(odd).items())))
    with safe_open(folder / "net.safetensors", "pt") as file:
        check("safetensors says pt", lambda: np.array(file.metadata()["format"]), np.array("pt"))
    bfloat16 = {name: bytes_of(half[name]) for name in sorted(half)}
    stored_half = load_file(folder / "half.safetensors")
    check("safetensors bfloat16", lambda: {n: bytes_of(stored_half[n]) for n in sorted(stored_half)}, bfloat16)
    onnx(folder, x.numpy())


def bytes_of(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def kinds(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.array(f"{t.dtype} {tuple(t.shape)}") for name, t in tensors.items()}


def onnx(folder: Path, x: Any) -> None:
    """The initializers of one model in the graph of another give the one's outputs."""
    import onnxruntime

    program = """
import sys
from bnlayer import checkpoint
source, graph, destination = sys.argv[1:]
values, into = checkpoint.open(source), checkpoint.open(graph)
into.replace({name: values[name] for name in into}).save(destination)
"""
    names = ("net.onnx", "other.onnx", "replaced.onnx")
    subprocess.run([sys.executable, "-c", program, *(str(folder / name) for name in names)], check=True)

    def outputs(name: str) -> Any:
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: x})[0]

    assert difference(outputs("other.onnx"), outputs("net.onnx"))
    check("onnx", lambda: outputs("replaced.onnx"), outputs("net.onnx"))


def keras(folder: Path) -> None:
    import os

    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow as tf

    layers = keras.layers

    def model(seed: int, dtype: str = "float32") -> Any:
        keras.utils.set_random_seed(seed)
        keras.backend.clear_session()
        found = keras.Sequential(
            [
                keras.Input((7, 7, 3)),
                layers.Conv2D(8, 3, dtype=dtype),
                layers.BatchNormalization(dtype=dtype, name="first"),
                layers.DepthwiseConv2D(3, dtype=dtype),
                layers.BatchNormalization(scale=False, epsilon=1e-5, dtype=dtype, name="second"),
                layers.Flatten(),
                layers.Dense(4, dtype=dtype),
            ]
        )
        for _ in range(2):
            found(np.random.default_rng(seed).normal(size=(6, 7, 7, 3)).astype("float32"), training=True)
        return found

    x = np.random.default_rng(7).normal(size=(2, 7, 7, 3)).astype("float32")

    def outputs(found: Any) -> Any:
        return np.asarray(found(x, training=False))

    net, half = model(0), model(0, "bfloat16")
    net.save_weights(folder / "net.weights.h5")
    net.save(folder / "net.keras")
    net.save(folder / "old.h5")
    half.save_weights(folder / "half.weights.h5")
    tf.train.Checkpoint(model=net).write(str(folder / "objects"))
    session_outputs, values = saver(folder), slots(folder)
    rewritten(
        (folder / "net.weights.h5", folder / "new.weights.h5", None, {}),
        (folder / "net.keras", folder / "from_keras.weights.h5", None, {}),
        (folder / "old.h5", folder / "old_new.h5", None, {}),
        (folder / "half.weights.h5", folder / "half_new.weights.h5", None, {}),
        (folder / "objects", folder / "objects.ckpt", None, {}),
        (folder / "objects", folder / "objects_folder", "tensorflow", {}),
        (folder / "slots", folder / "slots.ckpt", None, {}),
        (folder / "saver", folder / "saver_new.ckpt-7.index", "tensorflow", {}),
    )

    def with_weights(name: str, dtype: str = "float32") -> Any:
        fresh = model(9, dtype)
        fresh.load_weights(folder / name)
        return outputs(fresh)

    def restored(prefix: str) -> Any:
        fresh = model(9)
        status = tf.train.Checkpoint(model=fresh).read(prefix)
        status.assert_existing_objects_matched()
        status.assert_consumed()
        return outputs(fresh)

    expected = outputs(net)
    assert difference(outputs(model(9)), expected)
    check("weights.h5", lambda: with_weights("new.weights.h5"), expected)
    check("weights.h5 of a .keras", lambda: with_weights("from_keras.weights.h5"), expected)
    check("h5 of Keras 2", lambda: with_weights("old_new.h5"), expected)
    check("weights.h5 bfloat16", lambda: with_weights("half_new.weights.h5", "bfloat16"), outputs(half))
    check("TF2 objects by prefix", lambda: restored(str(folder / "objects.ckpt")), expected)
    latest = tf.train.latest_checkpoint(folder / "objects_folder")
    check("TF2 objects in a folder", lambda: restored(latest), expected)
    for name in ("objects", "saver"):
        old = tf.train.load_checkpoint(str(folder / name))
        new = tf.train.load_checkpoint(str(folder / {"objects": "objects.ckpt", "saver": "saver_new.ckpt-7"}[name]))
        shapes = old.get_variable_to_shape_map()
        keys = sorted(key for key in shapes if key != "_CHECKPOINTABLE_OBJECT_GRAPH")
        check(
            f"{name} by name",
            lambda new=new, keys=keys: {key: new.get_tensor(key) for key in keys},
            {key: old.get_tensor(key) for key in keys},
        )
    check("slots of an optimizer", lambda: slots(folder, "slots.ckpt"), values)
    check("Saver", lambda: saver(folder, "saver_new.ckpt-7"), session_outputs)


def slots(folder: Path, restore: str = "") -> Any:
    """A variable and its momentum, which belongs to the variable and the optimizer at once; saved, or restored."""
    import tensorflow as tf

    variable = tf.Variable([1.0, 2.0])
    optimizer = tf.compat.v1.train.MomentumOptimizer(0.1, 0.9)
    for _ in range(1 if restore else 3):
        optimizer.apply_gradients([(tf.constant([1.0, 2.0]), variable)])
    found = tf.train.Checkpoint(variable=variable, optimizer=optimizer)
    if restore:
        found.read(str(folder / restore)).assert_consumed()
    else:
        found.write(str(folder / "slots"))
    return np.stack([variable.numpy(), optimizer.get_slot(variable, "momentum").numpy()])


def saver(folder: Path, restore: str = "") -> Any:
    """The outputs of a graph of TensorFlow 1 that is trained and saved, or restored."""
    import tensorflow as tf

    import bnlayer_tensorflow.v1 as layers

    v1 = tf.compat.v1
    x = np.random.default_rng(3).normal(size=(5, 6)).astype("float32")
    with tf.Graph().as_default():
        v1.set_random_seed(9 if restore else 0)
        inputs, training = v1.placeholder(tf.float32, (None, 6)), v1.placeholder(tf.bool, ())
        with v1.variable_scope("net/first"):
            y = layers.batch_norm(inputs, scale=True, is_training=training)
        y = layers.batch_normalization(y, training=training)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            if restore:
                v1.train.Saver().restore(session, str(folder / restore))
            else:
                for _ in range(3):
                    session.run(v1.get_collection(v1.GraphKeys.UPDATE_OPS), {inputs: x, training: True})
                v1.train.Saver().save(session, str(folder / "saver"), write_meta_graph=False)
            return session.run(y, {inputs: x, training: False})


def flax(folder: Path) -> None:
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp
    from flax import linen, serialization
    from flax.training.train_state import TrainState

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any, training: bool = False) -> Any:
            x = linen.BatchNorm(use_running_average=not training)(linen.Conv(8, (3, 3))(x))
            return linen.BatchNorm(use_running_average=not training, use_scale=False)(linen.Dense(5)(x))

    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 3))

    def variables(seed: int) -> Any:
        found = Net().init(jax.random.key(seed), x)
        for _ in range(2):
            found = {**found, **Net().apply(found, x, training=True, mutable=["batch_stats"])[1]}
        return found

    def state(found: Any) -> Any:
        return TrainState.create(apply_fn=None, params=found["params"], tx=optax.chain(optax.adam(0.1)))

    trained, fresh = variables(1), variables(2)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), trained)
    for name, tree in (("net", trained), ("half", half), ("state", state(trained))):
        (folder / f"{name}.msgpack").write_bytes(serialization.to_bytes(tree))
    ocp.PyTreeCheckpointer().save(folder.resolve() / "orbax", trained)
    rewritten(
        (folder / "net.msgpack", folder / "new.msgpack", None, {}),
        (folder / "net.msgpack", folder / "chunked.msgpack", None, {"chunk": 100}),
        (folder / "half.msgpack", folder / "half_new.msgpack", None, {}),
        (folder / "state.msgpack", folder / "state_new.msgpack", None, {}),
        (folder / "net.msgpack", folder / "from_flax.orbax", None, {}),
        (folder / "half.msgpack", folder / "half.orbax", None, {}),
        (folder / "orbax", folder / "orbax_new", "orbax", {}),
    )

    def outputs(found: Any) -> Any:
        return np.asarray(Net().apply(found, x))

    def from_bytes(name: str, target: Any) -> Any:
        return serialization.from_bytes(target, (folder / name).read_bytes())

    def leaves(tree: Any) -> dict[str, Any]:
        return {
            jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    expected = outputs(trained)
    assert difference(outputs(fresh), expected)
    check("msgpack", lambda: outputs(from_bytes("new.msgpack", fresh)), expected)
    check("msgpack in chunks", lambda: outputs(from_bytes("chunked.msgpack", fresh)), expected)
    check("msgpack bfloat16", lambda: leaves(from_bytes("half_new.msgpack", fresh)), leaves(half))
    check(
        "msgpack of a TrainState", lambda: leaves(from_bytes("state_new.msgpack", state(fresh))), leaves(state(trained))
    )
    for name in ("from_flax.orbax", "orbax_new"):
        place = folder.resolve() / name
        check(f"{name} PyTree", lambda place=place: outputs(ocp.PyTreeCheckpointer().restore(place)), expected)
        check(f"{name} Standard", lambda place=place: outputs(ocp.StandardCheckpointer().restore(place)), expected)
        check(
            f"{name} into arrays",
            lambda place=place: outputs(ocp.StandardCheckpointer().restore(place, fresh)),
            expected,
        )
    place = folder.resolve() / "half.orbax"
    check("orbax bfloat16", lambda: leaves(ocp.PyTreeCheckpointer().restore(place)), leaves(half))


FRAMEWORKS: dict[str, Callable[[Path], None]] = {"torch": torch, "keras": keras, "flax": flax}

if __name__ == "__main__":
    FRAMEWORKS[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(RESULTS))
