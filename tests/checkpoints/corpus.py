"""Make checkpoints with the real frameworks, and note what each framework itself loads from them.

    python tests/checkpoints/corpus.py KIND FOLDER      # KIND: torch, keras, tensorflow, flax, haiku, equinox, onnx
    python tests/checkpoints/corpus.py all FOLDER       # each kind in a process of its own

Beside FILE lies FILE.json: the arguments for `bnlayer.checkpoint.open`, the names and dtypes of its tensors in order,
and its batch norms; and FILE.npz with the tensors' bytes, which the framework loaded from the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("torch", "keras", "tensorflow", "flax", "haiku", "equinox", "onnx")


def note(
    path: Path, tensors: Mapping[str, Any], batch_norms: Mapping[str, Mapping[str, Any]] | None = None,
    *, options: Mapping[str, Any] | None = None, format: str, ordered: bool = False,
) -> None:  # fmt: skip
    """Write what the framework loaded.

    Args:
        path: the checkpoint.
        tensors: name in `Checkpoint` to what the framework itself holds after loading.
        batch_norms: name to what a reader must find: "num_features", and spec fields that the file tells.
        options: of `checkpoint.open`.
        format: the format's name.
        ordered: the order of `tensors` is the file's and means something.
    """
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    document = {
        "format": format,
        "options": dict(options or {}),
        "ordered": ordered,
        "tensors": {name: {"dtype": a.dtype.name, "shape": list(a.shape)} for name, a in arrays.items()},
        "batch_norms": dict(batch_norms or {}),
    }
    path.with_name(path.name + ".json").write_text(json.dumps(document, indent=1))
    with path.with_name(path.name + ".npz").open("wb") as file:
        np.savez(file, **{str(i): np.frombuffer(a.tobytes(), np.uint8) for i, a in enumerate(arrays.values())})


def torch(folder: Path) -> None:
    import copy

    import torch
    from safetensors.torch import load_file, save_file
    from torch import nn

    torch.manual_seed(0)

    def model() -> nn.Sequential:
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4, eps=1e-3, momentum=0.01)),
            nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5, affine=False), nn.LayerNorm(5), nn.GroupNorm(1, 5),
        )  # fmt: skip
        for _ in range(3):
            net(torch.randn(6, 3, 7, 7))
        return net

    def tensors(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {name: _numpy_of(t) for name, t in state.items()}

    norms = {"1": {"num_features": 8}, "3.1": {"num_features": 4}, "6": {"num_features": 5}}
    told = {
        "1": {"num_features": 8, "epsilon": 1e-5, "decay": 0.9},
        "3.1": {"num_features": 4, "epsilon": 1e-3, "decay": 0.99},
        "6": {"num_features": 5, "epsilon": 1e-5, "decay": 0.9},
    }
    net = model()

    def saved(name: str, value: Any, state: Any, *, batch_norms: Any = norms, options: Any = None, **how: Any) -> None:
        torch.save(value, folder / name, **how)
        loaded = torch.load(folder / name, weights_only=False)
        loaded = state(loaded)
        legacy = how.get("_use_new_zipfile_serialization") is False
        note(folder / name, tensors(loaded), batch_norms, options=options,
             format="torch.legacy" if legacy else "torch", ordered=True)  # fmt: skip

    old = {"_use_new_zipfile_serialization": False}
    saved("state_dict.pt", net.state_dict(), lambda s: s)
    saved("state_dict.legacy.pth", net.state_dict(), lambda s: s, **old)
    saved("plain_dict.pt", dict(net.state_dict()), lambda s: s)
    training = {
        "epoch": 7,
        "state_dict": nn.DataParallel(net).state_dict(),
        "optimizer": torch.optim.Adam(net.parameters()).state_dict(),
        "best": 0.5,
    }
    prefixed = {f"module.{name}": value for name, value in norms.items()}
    saved("training.pt", training, lambda s: s["state_dict"], batch_norms=prefixed)
    averaged = {"model": net.state_dict(), "model_ema": model().state_dict(), "args": {"lr": 0.1}}
    saved("two_models.pt", averaged, lambda s: s["model_ema"], options={"key": "model_ema"})
    saved("module.pt", net, lambda m: m.state_dict(), batch_norms=told, options={"module_stubs": True})
    saved("module.legacy.pth", net, lambda m: m.state_dict(), batch_norms=told, options={"module_stubs": True}, **old)
    saved("half.pt", copy.deepcopy(net).half().state_dict(), lambda s: s)
    saved("bfloat16.pt", copy.deepcopy(net).bfloat16().state_dict(), lambda s: s)
    saved("channels_last.pt", copy.deepcopy(net).to(memory_format=torch.channels_last).state_dict(), lambda s: s)
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"whole": whole, "row": whole[1], "column": whole[:, 2], "transposed": whole.T, "scalar": whole[0, 3]}
    saved("views.pt", views, lambda s: s, batch_norms={})
    saved("views.legacy.pt", views, lambda s: s, batch_norms={}, **old)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    note(folder / "model.safetensors", tensors(load_file(folder / "model.safetensors")), norms, format="safetensors")
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    save_file(half, folder / "bfloat16.safetensors")
    note(folder / "bfloat16.safetensors", tensors(load_file(folder / "bfloat16.safetensors")), norms,
         format="safetensors")  # fmt: skip
    names = list(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: state[name] for name in inside}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    note(folder / "model.safetensors.index.json", tensors(state), norms, format="safetensors.index")
    arrays = tensors(state)
    np.savez(folder / "arrays.npz.checkpoint", **arrays)
    (folder / "arrays.npz.checkpoint.npz").rename(folder / "arrays_npz")
    note(folder / "arrays_npz", arrays, norms, format="npz", ordered=True)


def _numpy_of(tensor: Any) -> Any:
    """numpy's view of a torch tensor, of bfloat16 too."""
    import ml_dtypes
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def keras(folder: Path) -> None:
    import os

    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    layers = keras.layers

    def model(**options: Any) -> Any:
        found = keras.Sequential(
            [
                keras.Input((7, 7, 3)),
                layers.Normalization(),
                layers.Conv2D(8, 3),
                layers.BatchNormalization(**options),
                layers.DepthwiseConv2D(3),
                layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="my_norm"),
                layers.GlobalAveragePooling2D(),
                layers.LayerNormalization(),
                layers.Dense(4),
            ]
        )
        for _ in range(3):
            found(np.random.default_rng(1).normal(size=(6, 7, 7, 3)).astype("float32"), training=True)
        return found

    def numbered(found: Any) -> dict[str, Any]:
        """Keras 3 numbers the layers of one class, and the variables of a layer."""
        counts: dict[str, int] = {}
        named = {}
        for layer in found.layers:
            base = keras.src.utils.naming.to_snake_case(type(layer).__name__)
            counts[base] = counts.get(base, -1) + 1
            path = f"layers/{base}{f'_{counts[base]}' if counts[base] else ''}"
            values = layer._trainable_variables + layer._non_trainable_variables
            named.update({f"{path}/vars/{i}": np.asarray(v) for i, v in enumerate(values)})
        return named

    told = {
        "batch_normalization": {"num_features": 8, "epsilon": 1e-3, "decay": 0.99},
        "my_norm": {"num_features": 8, "epsilon": 1e-5, "decay": 0.9},
    }
    paths = {"layers/batch_normalization": {"num_features": 8}, "layers/batch_normalization_1": {"num_features": 8}}
    found = model(name="batch_normalization")
    found.save(folder / "model.keras")
    note(folder / "model.keras", numbered(keras.models.load_model(folder / "model.keras")), told, format="keras")
    found.save_weights(folder / "model.weights.h5")
    note(folder / "model.weights.h5", numbered(found), paths, format="keras.h5")
    bare = model(scale=False, name="batch_normalization")
    bare.save(folder / "no_scale.keras")
    note(folder / "no_scale.keras", numbered(keras.models.load_model(folder / "no_scale.keras")), told, format="keras")
    found.save(folder / "model.h5")
    again = keras.models.load_model(folder / "model.h5")
    old = {}
    for layer in again.layers:
        for weight in layer.weights:
            old[f"model_weights/{layer.name}/{weight.path}"] = np.asarray(weight)
    note(folder / "model.h5", old, told, format="keras.h5")
    tf.train.Checkpoint(model=found).write(str(folder / "objects"))
    reader = tf.train.load_checkpoint(str(folder / "objects"))
    keys = [k for k in reader.get_variable_to_shape_map() if k != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    operations = {f"model/_functional/_operations/{i}": {"num_features": 8} for i in (3, 5)}
    note(folder / "objects", {k: reader.get_tensor(k) for k in sorted(keys)}, operations, format="tensorflow")
    found.export(str(folder / "exported"), verbose=False)
    by_name = {v.path: np.asarray(v) for v in found.variables if "seed" not in v.path}
    note(folder / "exported", by_name, {"sequential/batch_normalization": {"num_features": 8},
                                        "sequential/my_norm": {"num_features": 8}}, format="savedmodel")  # fmt: skip


def tensorflow(folder: Path) -> None:
    import tensorflow as tf

    import bnlayer_tensorflow.v1 as layers

    v1 = tf.compat.v1
    with tf.Graph().as_default():
        v1.set_random_seed(0)
        x = v1.placeholder(tf.float32, (None, 6))
        with v1.variable_scope("net/first"):
            y = layers.batch_norm(x, scale=True)
        y = layers.batch_normalization(y, training=True, name="second")
        average = tf.train.ExponentialMovingAverage(0.9)
        trained = v1.train.MomentumOptimizer(0.1, 0.9).minimize(tf.reduce_sum(y**2))
        with tf.control_dependencies([trained, *v1.get_collection(v1.GraphKeys.UPDATE_OPS)]):
            step = average.apply(v1.trainable_variables() + v1.moving_average_variables() or None)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            for i in range(3):
                session.run(step, {x: np.random.default_rng(i).normal(size=(5, 6))})
            v1.train.Saver().save(session, str(folder / "saver"), write_meta_graph=False)
    reader = tf.train.load_checkpoint(str(folder / "saver"))
    names = sorted(reader.get_variable_to_shape_map())
    norms = {"net/first/BatchNorm": {"num_features": 6}, "second": {"num_features": 6}}
    note(folder / "saver", {name: reader.get_tensor(name) for name in names}, norms, format="tensorflow")


def flax(folder: Path) -> None:
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from flax import linen, nnx, serialization

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = linen.Conv(8, (3, 3))(x)
            x = linen.BatchNorm(use_running_average=False, dtype=jnp.float32)(x)
            x = linen.LayerNorm()(x)
            return linen.BatchNorm(use_running_average=False, use_scale=False, name="last")(linen.Dense(5)(x))

    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 3))
    variables = Net().init(jax.random.key(1), x)
    for _ in range(3):
        _, moved = Net().apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **moved}
    norms = {"BatchNorm_0": {"num_features": 8}, "last": {"num_features": 5}}

    def saved(name: str, tree: Any, batch_norms: Any = norms) -> None:
        (folder / name).write_bytes(serialization.to_bytes(tree))
        loaded = serialization.msgpack_restore((folder / name).read_bytes())
        note(folder / name, _leaves(loaded), batch_norms, format="flax")

    saved("linen.msgpack", variables)
    saved("sorted.msgpack", jax.tree.map(np.asarray, variables))
    saved("bfloat16.msgpack", jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables))
    optimizer = {"mu": variables["params"], "nu": variables["params"]}
    state = {"step": np.int32(3), "params": variables["params"], "batch_stats": variables["batch_stats"],
             "opt_state": {"0": optimizer}}  # fmt: skip
    saved("train_state.msgpack", state)

    class Small(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.bn = nnx.BatchNorm(8, rngs=rngs)
            self.ln = nnx.LayerNorm(8, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.ln(self.bn(self.conv(x)))

    small = Small(nnx.Rngs(0))
    small(x)
    pure = nnx.to_pure_dict(nnx.state(small))
    saved("nnx.msgpack", pure, {"bn": {"num_features": 8}})
    for name, how in (("orbax", {}), ("orbax_plain", {"use_ocdbt": False}), ("orbax_zarr3", {"use_zarr3": True})):
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)).save(folder.resolve() / name, variables)
        loaded = ocp.PyTreeCheckpointer().restore(folder.resolve() / name)
        note(folder / name, _leaves(loaded), norms, format="orbax")
    with ocp.CheckpointManager(folder.resolve() / "manager") as manager:
        for step in (2, 10):
            manager.save(step, args=ocp.args.StandardSave(variables))
    note(folder / "manager", _leaves(variables), norms, format="orbax")


def _leaves(tree: Any, *before: str) -> dict[str, Any]:
    """Nested dicts as names with slashes."""
    if not isinstance(tree, Mapping):
        return {"/".join(before): np.asarray(tree)}
    return {name: leaf for key, child in tree.items() for name, leaf in _leaves(child, *before, str(key)).items()}


def haiku(folder: Path) -> None:
    import pickle

    import haiku as hk
    import jax

    def net(x: Any) -> Any:
        x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(8, 3)(x), is_training=True)
        return hk.BatchNorm(False, True, 0.99, name="last")(hk.Linear(4)(x), is_training=True)

    transformed = hk.transform_with_state(net)
    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 3))
    params, state = transformed.init(jax.random.key(1), x)
    for _ in range(3):
        _, state = transformed.apply(params, state, None, x)
    norms = {"batch_norm": {"num_features": 8}, "last": {"num_features": 4}}
    plain = jax.tree.map(np.asarray, (params, state))
    for name, tree, protocol in (
        ("jax.pkl", (params, state), 4),
        ("numpy.pkl", plain, 5),
        ("dict.pkl", {"params": plain[0], "state": plain[1]}, 2),
    ):
        (folder / name).write_bytes(pickle.dumps(tree, protocol))
        loaded = pickle.loads((folder / name).read_bytes())
        pair = loaded if isinstance(loaded, tuple) else (loaded["params"], loaded["state"])
        note(folder / name, _leaves({"params": pair[0], "state": pair[1]}), norms, format="haiku", ordered=True)


def equinox(folder: Path) -> None:
    import equinox as eqx
    import jax

    for mode in ("batch", "ema"):

        def make(key: Any, mode: Any = mode) -> Any:
            return eqx.nn.Sequential([eqx.nn.Conv2d(3, 8, 3, key=key), eqx.nn.BatchNorm(8, "batch", mode=mode)])

        model, state = eqx.nn.make_with_state(make)(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (4, 3, 5, 5))
        for _ in range(3):
            _, state = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)
        path = folder / f"{mode}.eqx"
        eqx.tree_serialise_leaves(path, (model, state))
        loaded = eqx.tree_deserialise_leaves(path, (model, state))
        leaves = [leaf for leaf in jax.tree.leaves(loaded) if not isinstance(leaf, str)]
        note(path, {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}, format="equinox", ordered=True)


def onnx(folder: Path) -> None:
    import onnx
    import torch
    from onnx import numpy_helper
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )
    net(torch.randn(6, 3, 7, 7))
    torch.onnx.export(
        net.eval(), (torch.randn(1, 3, 7, 7),), folder / "model.onnx", dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
    )  # fmt: skip
    model = onnx.load(folder / "model.onnx")
    tensors = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    nodes = [n.name for n in model.graph.node if n.op_type == "BatchNormalization"]
    told = {nodes[0]: {"num_features": 8, "epsilon": 1e-3, "decay": 0.8}, nodes[1]: {"num_features": 4, "decay": 0.9}}
    note(folder / "model.onnx", tensors, told, format="onnx", ordered=True)


MAKERS: dict[str, Callable[[Path], None]] = {
    "torch": torch, "keras": keras, "tensorflow": tensorflow, "flax": flax, "haiku": haiku, "equinox": equinox,
    "onnx": onnx,
}  # fmt: skip


def main(kind: str, folder: Path) -> None:
    if kind == "all":
        for each in KINDS:
            subprocess.run([sys.executable, __file__, each, str(folder / each)], check=True)
        return
    folder.mkdir(parents=True)
    MAKERS[kind](folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
