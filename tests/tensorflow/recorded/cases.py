"""The cases that are recorded from the originals and then asked of the drop-ins, and the one way to run a case.

`record.py` runs them with tf-slim and tf.compat.v1.layers, the tests with bnlayer_tensorflow.v1; nothing here knows
which. Each case is one layer in a graph of its own: three training steps on seeded data, then one eval.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
SHAPES = {2: (5, 3), 3: (3, 2, 3), 4: (2, 2, 2, 3), 5: (2, 1, 2, 2, 3)}
STEPS = 3


@dataclass(frozen=True)
class InGraph:
    """An argument that has to be built inside the graph, such as a tensor."""

    build: Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        name: unique.
        function: "batch_norm" or "batch_normalization".
        arguments: all but the inputs and the flag.
        rank: of the inputs.
        dtype: of the inputs.
        training: "constant" (True for training and a second, reusing call with False for eval), "fed" (a placeholder)
            or "never" (False alone).
        unknown: whether the graph does not know the length of the batch.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    rank: int = 2
    dtype: str = "float32"
    training: str = "constant"
    unknown: bool = False

    def data(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs, and the gradients that come back, of each step and of the eval."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        for _ in range(STEPS + 1):
            x = rng.normal(rng.uniform(-2, 2, 3), rng.uniform(0.3, 2, 3), SHAPES[self.rank])
            if "NCHW" in self.arguments.values() or self.arguments.get("axis") in (1, [1]):
                x = np.moveaxis(x, -1, 1)
            yield x.astype(self.dtype), rng.normal(size=x.shape).astype(self.dtype)


def cases() -> list[Case]:
    """Every recorded case."""
    found = list(_contrib()) + list(_layers())
    assert len({case.name for case in found}) == len(found)
    return found


def _contrib() -> Iterator[Case]:
    def case(name: str, rank: int = 2, **more: Any) -> Case:
        options = {key: more.pop(key) for key in ("dtype", "training", "unknown") if key in more}
        return Case(f"contrib {name}, rank {rank}", "batch_norm", {"decay": 0.7, **more}, rank, **options)

    adjustment = InGraph(lambda: lambda shape: (tf.range(1.0, 4.0) / 2, tf.range(3.0) / 4))
    for rank in SHAPES:
        yield case("defaults", rank)
        yield case("scale", rank, scale=True)
        yield case("fused False", rank, fused=False)
        yield case("fused True", rank, fused=True)
        yield case("in place", rank, updates_collections=None)
        yield case("own collection", rank, updates_collections="mine")
        yield case("zero debias", rank, zero_debias_moving_mean=True)
        yield case("not trainable", rank, trainable=False)
        yield case("fed", rank, training="fed", scale=True, unknown=True)
        yield case("fed in place", rank, training="fed", updates_collections=None)
        yield case("weights", rank, batch_weights=InGraph(lambda r=rank: _weights(SHAPES[r][0])))
        yield case("zero weights", rank, batch_weights=InGraph(lambda r=rank: tf.zeros([SHAPES[r][0]])), scale=True)
        yield case("renorm", rank, renorm=True, renorm_decay=0.6)
        yield case("adjustment", rank, adjustment=adjustment)
        yield case("NCHW", rank, data_format="NCHW", scale=True)
    yield case("never", training="never")
    yield case("never, zero debias", training="never", zero_debias_moving_mean=True)
    yield case("never, renorm", training="never", renorm=True)
    yield case("no center", center=False)
    yield case("no parameters, plain", 3, center=False, scale=False)
    yield case("epsilon", epsilon=0.1)
    yield case("decay tensor", decay=InGraph(lambda: tf.constant(0.4)))
    yield case("decay tensor, plain", 3, decay=InGraph(lambda: tf.constant(0.4)), batch_weights=InGraph(_three))
    yield case("decay tensor, core", 4, decay=InGraph(lambda: tf.constant(0.4)))
    yield case("decay tensor, zero debias", decay=InGraph(lambda: tf.constant(0.4)), zero_debias_moving_mean=True)
    yield case("in place, fused False", 4, updates_collections=None, fused=False)
    yield case("list of collections", updates_collections=["mine", v1.GraphKeys.UPDATE_OPS])
    yield case("zero debias, plain", 4, zero_debias_moving_mean=True, fused=False)
    yield case("zero debias, fed", training="fed", zero_debias_moving_mean=True)
    yield case("zero debias, in place", 4, zero_debias_moving_mean=True, updates_collections=None)
    yield case("weights, fed", 4, training="fed", batch_weights=InGraph(lambda: _weights(2)), scale=True)
    yield case("weights, in place", 3, batch_weights=InGraph(_three), updates_collections=None)
    yield case("weights, NCHW", 4, batch_weights=InGraph(lambda: _weights(2)), data_format="NCHW")
    yield case("renorm, fed", 4, training="fed", renorm=True)
    yield case("renorm, clipped", 4, renorm=True, renorm_clipping={"rmax": 1.3, "rmin": 0.8, "dmax": 0.4})
    clips = InGraph(lambda: {"rmax": tf.constant(1.3), "rmin": tf.constant(0.8), "dmax": tf.constant(0.4)})
    yield case("renorm, clip tensors", 2, renorm=True, renorm_clipping=clips)
    yield case("renorm, one clip", 3, renorm=True, renorm_clipping={"dmax": 0.1})
    yield case("adjustment, fed", 4, training="fed", adjustment=adjustment)
    yield case("adjustment, scale", 3, adjustment=adjustment, scale=True)
    yield case("activation", activation_fn=tf.nn.relu)
    yield case("outputs", outputs_collections="outs")
    yield case("outputs list", 3, outputs_collections=["outs", "more"], activation_fn=tf.nn.tanh)
    half = {"beta": tf.compat.v1.constant_initializer(0.5), "gamma": tf.compat.v1.constant_initializer(2.0)}
    start = {
        "moving_mean": tf.compat.v1.constant_initializer(3.0),
        "moving_variance": tf.compat.v1.constant_initializer(4.0),
    }
    for rank in (2, 3, 4):
        yield case("initializers", rank, param_initializers={**half, **start}, scale=True)
        yield case("regularizers", rank, param_regularizers={"beta": _square, "gamma": _square}, scale=True)
        yield case("collections list", rank, variables_collections=["kept", v1.GraphKeys.MOVING_AVERAGE_VARIABLES])
        by_name = {"beta": ["b"], "gamma": ["g", "both"], "moving_mean": ["m", "both"], "moving_variance": None}
        yield case("collections by name", rank, variables_collections=by_name, scale=True)
        yield case("collections, weights", rank, variables_collections=by_name,
                   batch_weights=InGraph(lambda r=rank: _weights(SHAPES[r][0])))  # fmt: skip
    yield case("initializers, renorm", 3, param_initializers=start, renorm=True)
    for rank in (3, 4):
        yield case("float16", rank, dtype="float16", scale=True)
    yield case("float16", 2, dtype="float16", scale=True)
    yield case("float16, weights", 2, dtype="float16", batch_weights=InGraph(lambda: tf.ones([5], tf.float16)))
    yield case("float64", 3, dtype="float64", scale=True)
    yield case("float64", 4, dtype="float64", scale=True)
    yield case("float64, weights", 4, dtype="float64", batch_weights=InGraph(lambda: tf.ones([2], tf.float64)))
    yield case("bfloat16", 4, dtype="bfloat16", scale=True)


def _layers() -> Iterator[Case]:
    def case(name: str, rank: int = 2, **more: Any) -> Case:
        options = {key: more.pop(key) for key in ("dtype", "training", "unknown") if key in more}
        arguments = {"momentum": 0.7, **more}
        return Case(f"layers {name}, rank {rank}", "batch_normalization", arguments, rank, **options)

    adjustment = InGraph(lambda: lambda shape: (tf.range(1.0, 4.0) / 2, tf.range(3.0) / 4))
    constant = tf.compat.v1.constant_initializer
    for rank in SHAPES:
        yield case("defaults", rank)
        yield case("fused False", rank, fused=False)
        yield case("fused True", rank, fused=True)
        yield case("axis 1", rank, axis=1)
        yield case("axis [-1]", rank, axis=[-1])
        yield case("not trainable", rank, trainable=False)
        yield case("fed", rank, training="fed", unknown=True)
        yield case("renorm", rank, renorm=True, renorm_momentum=0.6)
        yield case("adjustment", rank, adjustment=adjustment)
        yield case("parameters", rank, center=False, scale=False)
    yield case("axis [1]", 4, axis=[1])
    yield case("axis -3", 4, axis=-3)
    yield case("axis 2", 4, axis=2)
    yield case("axis 3", 5, axis=3)
    yield case("axis [1]", 5, axis=[1])
    yield case("virtual batches", 2, virtual_batch_size=1)
    yield case("virtual batches of all", 2, virtual_batch_size=5)
    yield case("virtual batches", 4, virtual_batch_size=1)
    yield case("virtual batches, axis 1", 4, virtual_batch_size=1, axis=1)
    yield case("virtual batches", 3, virtual_batch_size=3)
    yield case("never", training="never")
    yield case("never, renorm", 4, training="never", renorm=True)
    yield case("no center", 4, center=False)
    yield case("no scale", 4, scale=False)
    yield case("epsilon", 4, epsilon=0.1)
    yield case("momentum tensor", 4, momentum=InGraph(lambda: tf.constant(0.4)))
    yield case("momentum tensor, plain", 2, momentum=InGraph(lambda: tf.constant(0.4)))
    yield case("initializers", 3, beta_initializer=constant(0.5), gamma_initializer=constant(2.0),
               moving_mean_initializer=constant(3.0), moving_variance_initializer=constant(4.0))  # fmt: skip
    yield case("initializers, renorm", 3, moving_mean_initializer=constant(3.0),
               moving_variance_initializer=constant(4.0), renorm=True)  # fmt: skip
    yield case("initializers by name", 3, beta_initializer="ones", gamma_initializer="zeros")
    yield case("regularizers", 4, beta_regularizer=_square, gamma_regularizer=_square)
    yield case("one regularizer", 2, gamma_regularizer=_square)
    yield case("renorm, fed", 4, training="fed", renorm=True)
    yield case("renorm, clipped", 4, renorm=True, renorm_clipping={"rmax": 1.3, "rmin": 0.8, "dmax": 0.4})
    clips = InGraph(lambda: {"rmax": tf.constant(1.3), "rmin": tf.constant(0.8), "dmax": tf.constant(0.4)})
    yield case("renorm, clip tensors", 2, renorm=True, renorm_clipping=clips)
    yield case("adjustment, fed", 4, training="fed", adjustment=adjustment)
    for rank in (2, 4):
        yield case("float16", rank, dtype="float16")
        yield case("float64", rank, dtype="float64")
    yield case("bfloat16", 4, dtype="bfloat16")


def _weights(rows: int) -> tf.Tensor:
    return tf.range(1.0, rows + 1.0) / 2


def _three() -> tf.Tensor:
    return tf.constant([0.5, 0.0, 2.0])


def _square(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(values))


def run(case: Case, functions: dict[str, Callable[..., tf.Tensor]]) -> dict[str, Any]:
    """Build the case's graph, train and evaluate; all that it gave, as JSON values and numpy arrays."""
    contrib = case.function == "batch_norm"
    flag_name, scope_name = ("is_training", "scope") if contrib else ("training", "name")
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        given = {k: v.build() if isinstance(v, InGraph) else v for k, v in case.arguments.items()}
        (first, _), *_ = data = list(case.data())
        shape = [None, *first.shape[1:]] if case.unknown else first.shape
        x, dy = (v1.placeholder(case.dtype, shape) for _ in range(2))
        fed = v1.placeholder(tf.bool, []) if case.training == "fed" else None
        flag = {"constant": True, "fed": fed, "never": False}[case.training]
        y = functions[case.function](x, **given, **{flag_name: flag, scope_name: "here"})
        built = describe(graph)
        updates = [op for key in (v1.GraphKeys.UPDATE_OPS, "mine") for op in graph.get_collection(key)]
        y_eval = y
        if case.training == "constant":
            y_eval = functions[case.function](x, **given, **{flag_name: False, scope_name: "here", "reuse": True})
        gradients = tf.gradients(y, [x, *v1.trainable_variables()], dy)
        session.run(v1.global_variables_initializer())
        built["start"] = values(session)
        for variable in v1.trainable_variables():
            if "initializers" not in case.name:
                shift = np.linspace(0.5, 1.5, variable.shape.num_elements()).reshape(variable.shape)
                variable.load(shift.astype(variable.dtype.base_dtype.as_numpy_dtype), session)
        steps = []
        for step_x, step_dy in data[:-1]:
            feed = {x: step_x, dy: step_dy, **({} if fed is None else {fed: True})}
            got = session.run([y, *gradients], feed)
            session.run(updates, feed)
            steps.append(values(session))
        last = {"y": got[0], "dx": got[1], "parameters": got[2:]}  # with renorm they depend on the steps before
        feed = {x: data[-1][0], **({} if fed is None else {fed: False})}
        return {**built, "statistics": steps, **last, "eval": session.run(y_eval, feed)}


def describe(graph: tf.Graph) -> dict[str, Any]:
    """A graph's variables and collections, by names that do not depend on how anything is computed."""
    everything = graph.get_collection(v1.GraphKeys.GLOBAL_VARIABLES)
    collections = {}
    for key in graph.get_all_collection_keys():
        members = graph.get_collection(key)
        if key in (v1.GraphKeys.COND_CONTEXT, v1.GraphKeys.WHILE_CONTEXT) or not members:
            continue
        if all(any(member is variable for variable in everything) for member in members):
            collections[key] = [member.op.name for member in members]
        else:  # computed; only where they are, how many, and what they are called
            scopes = [member.name.split("/")[0] for member in members]
            aliases = [alias for member in members for alias in getattr(member, "aliases", [])]
            collections[key] = [*scopes, *(f"alias {alias}" for alias in aliases)]
    variables = {v.op.name: [v.shape.as_list(), v.dtype.base_dtype.name] for v in everything}
    return {"variables": variables, "collections": dict(sorted(collections.items()))}


def values(session: Any) -> dict[str, np.ndarray]:
    """Every variable that no optimizer trains."""
    trained = {v.op.name for v in v1.trainable_variables()}
    return session.run({v.op.name: v for v in v1.global_variables() if v.op.name not in trained})


def names(functions: dict[str, Callable[..., tf.Tensor]]) -> dict[str, Any]:
    """What variables and operations are called in the usual ways to build a model."""
    norm, layer = functions["batch_norm"], functions["batch_normalization"]

    def x(rank: int = 2) -> tf.Tensor:
        return tf.ones(SHAPES[rank])

    def scoped(build: Callable[[], Any], **scope: Any) -> None:
        with v1.variable_scope("outer", **scope), tf.name_scope("inner"):
            build()

    def twice(build: Callable[..., Any], first: dict[str, Any], second: dict[str, Any]) -> None:
        build(x(), **first)
        build(x(), **second)

    def inside(build: Callable[..., Any], name: str, **arguments: Any) -> None:
        """As contrib's layers call their normalizer_fn: with its parameters, in the layer's own scope."""
        with v1.variable_scope(name):
            build(x(4), **arguments)

    half = v1.fixed_size_partitioner(2)
    always = {"reuse": v1.AUTO_REUSE}
    builds: dict[str, Callable[[], Any]] = {
        "contrib twice": lambda: twice(norm, {}, {}),
        "contrib reuse": lambda: twice(norm, {"scope": "a"}, {"scope": "a", "reuse": True}),
        "contrib auto reuse": lambda: twice(norm, {"scope": "a", **always}, {"scope": "a", **always}),
        "contrib reuse without a scope": lambda: twice(norm, {}, {"reuse": True}),
        "contrib same scope": lambda: twice(norm, {"scope": "a"}, {"scope": "a"}),
        "contrib regularized reuse": lambda: twice(
            norm, *({"scope": "a", "param_regularizers": {"beta": _square}, **always},) * 2),
        "contrib outer": lambda: scoped(lambda: norm(x(4), scale=True)),
        "contrib outer, zero debias": lambda: scoped(lambda: norm(x(), zero_debias_moving_mean=True)),
        "contrib outer, zero debias, plain": lambda: scoped(lambda: norm(x(3), zero_debias_moving_mean=True)),
        "contrib outer, reuse": lambda: (scoped(lambda: norm(x(), scope="a")),
                                         scoped(lambda: norm(x(), scope="a"), reuse=True)),
        "contrib partitioned": lambda: scoped(lambda: norm(x(4), scale=True), partitioner=half),
        "contrib scope regularizer": lambda: scoped(lambda: norm(x()), regularizer=_square),
        "contrib normalizer": lambda: inside(norm, "conv1", scale=True, decay=0.9),
        "contrib scope object": lambda: norm(x(), scope=_captured("there")),
        "layers twice": lambda: twice(layer, {"training": True}, {"training": True}),
        "layers reuse": lambda: twice(layer, {"name": "a", "training": True}, {"name": "a", "reuse": True}),
        "layers auto reuse": lambda: twice(layer, {"name": "a", **always}, {"name": "a", **always}),
        "layers reuse without a name": lambda: twice(layer, {}, {"reuse": True}),
        "layers auto reuse without a name": lambda: twice(layer, always, always),
        "layers same name": lambda: twice(layer, {"name": "a"}, {"name": "a"}),
        "layers regularized reuse": lambda: twice(layer, *({"name": "a", "beta_regularizer": _square, **always},) * 2),
        "layers outer": lambda: scoped(lambda: layer(x(4), training=True)),
        "layers outer, renorm": lambda: scoped(lambda: layer(x(), training=True, renorm=True)),
        "layers outer, reuse": lambda: (scoped(lambda: layer(x(), name="a")),
                                        scoped(lambda: layer(x(), name="a"), reuse=True)),
        "layers partitioned": lambda: scoped(lambda: layer(x(4), training=True), partitioner=half),
        "layers inside": lambda: inside(layer, "conv1", training=True),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, build in builds.items():
        with tf.Graph().as_default() as graph:
            try:
                build()
            except ValueError as error:
                found[name] = " ".join(str(error).split()[:6])
                continue
            found[name] = describe(graph)
    with tf.Graph().as_default() as graph:
        loss = tf.reduce_sum(tf.square(norm(x(), scale=True))) + tf.reduce_sum(layer(x(), training=True))
        for optimizer in (v1.train.AdamOptimizer(), v1.train.MomentumOptimizer(0.1, 0.9)):
            optimizer.minimize(loss)
        found["slots"] = sorted(variable.op.name for variable in v1.global_variables())
    return found


def _captured(name: str) -> Any:
    with v1.variable_scope(name) as scope:
        return scope
