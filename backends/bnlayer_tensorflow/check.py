"""The classic mistakes around a batch norm in a TensorFlow 1 graph, as messages that say what to do.

Each check looks at a graph, at what a session is about to run in it, or at a Saver, and raises or warns. They know the
batch norms of `bnlayer_tensorflow.v1` exactly. Others (`tf.compat.v1.layers`, tf-slim, graphs imported from a file)
they know by UPDATE_OPS and by the names moving_mean and moving_variance.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import tensorflow as tf

from bnlayer.errors import BatchNormError, InputError

from .v1.record import Record, records

Action = Literal["raise", "warn"]


class BatchNormUsageError(BatchNormError, RuntimeError):
    """A graph is built or run in a way that leaves a batch norm's moving statistics wrong."""


class BatchNormUsageWarning(UserWarning):
    """The same, where a check was asked to warn."""


def check_update_ops(fetches: Any, *, scope: str | None = None, action: Action = "raise") -> None:
    """Tell when `session.run(fetches)` would train through a batch norm without moving its statistics.

    Right for both ways to run them: as control dependencies of the train operation, and fetched beside it. Fetches
    that do not train are always fine.

    Args:
        fetches: what would be given to `session.run`: tensors, operations, variables, their names, in any nesting.
        scope: look only at update operations whose name matches this regular expression from the start, as
            `get_collection` does; for models of which only a part should move.
        action: "raise" or "warn".

    Raises:
        BatchNormUsageError: update operations are missing, and `action` is "raise".
    """
    graph, wanted = _operations(fetches)
    run = _ancestors(wanted)
    trainable = {v.op for v in graph.get_collection(tf.compat.v1.GraphKeys.TRAINABLE_VARIABLES)}
    # Written out once at most, and only where a function has to be looked into: a graph may be large.
    library = functools.cache(lambda: {f.signature.name: f for f in graph.as_graph_def().library.function})
    trained = {op: name for op in run if (name := _trained_by(op, trainable, library))}
    if not trained:
        return
    through = _ancestors(trained)
    ours = [record for record in records(graph) if record.updates]
    known = {tensor.op for record in ours for tensor in record.updates}
    expected = [op for record in ours if not through.isdisjoint(_forward(record)) for op in _ops(record.updates)]
    expected += [op for op in _collected(graph) if op not in known]
    if scope is not None:
        expected = [op for op in expected if re.match(scope, op.name)]
    missing = [op for op in expected if op not in run]
    if missing:
        _tell(action, _without_updates(trained, expected, missing, run, _has_empty(fetches)))


def check_saver(saver: Any, *, graph: Any = None, action: Action = "raise") -> None:
    """Tell when a Saver leaves out the moving statistics of the graph's batch norms.

    The usual cause is `Saver(tf.compat.v1.trainable_variables())`: moving statistics are not trainable, so they are
    not saved, and a restored model evaluates with those of a new one.

    Args:
        saver: a built `tf.compat.v1.train.Saver`.
        graph: that it was built in; the default graph if None.
        action: "raise" or "warn".

    Raises:
        BatchNormUsageError: a moving statistic is missing, and `action` is "raise".
        InputError: the Saver is not built, or not in this graph.
    """
    graph = tf.compat.v1.get_default_graph() if graph is None else graph
    definition = saver.as_saver_def()
    if definition is None:
        raise InputError("the Saver must be built; call its build() first.")
    try:
        saves = graph.as_graph_element(definition.save_tensor_name).op
    except KeyError as error:
        raise InputError("the Saver was built in another graph; give that one as graph=.") from error
    saved = _ancestors([saves])
    left_out = [variable.op.name for variable in _statistics(graph) if variable.op not in saved]
    if left_out:
        _tell(
            action,
            f"this Saver leaves out {_listed(left_out)}, so a restored model would evaluate with the moving statistics"
            " of a new one. They are not trainable: build the Saver without a list of variables, or with"
            " tf.compat.v1.global_variables().",
        )


def check_eval(
    fetches: Any, *, feed_dict: Mapping[Any, Any] | None = None, session: Any = None, action: Action = "raise"
) -> None:
    """Tell when `session.run(fetches, feed_dict)`, meant as an eval, would move a batch norm's statistics.

    Args:
        fetches: what would be given to `session.run`.
        feed_dict: likewise; says whether a layer whose training flag is fed would train.
        session: computes training flags that are neither fed nor constant.
        action: "raise" or "warn".

    Raises:
        BatchNormUsageError: statistics would move, and `action` is "raise".
        InputError: whether a layer trains cannot be told without `session`.
    """
    graph, wanted = _operations(fetches)
    run = _ancestors(wanted)
    moved = []
    for record in records(graph):
        ops = _forward(record) if record.in_place else set(_ops(record.updates))
        if not run.isdisjoint(ops) and _would_train(record, feed_dict or {}, session):
            moved.append(record.name)
    known = {variable.op for record in records(graph) for variable in _statistics_of(record)}
    others = {variable.op for variable in _statistics(graph)} - known
    moved += [f"{op.name} (of {op.inputs[0].op.name})" for op in run if _writes(op) and op.inputs[0].op in others]
    if moved:
        _tell(
            action,
            f"this eval run moves the statistics of {_listed(moved)}. Evaluate with is_training (or training) False:"
            " feed it, or build the eval graph with it. And leave the update operations out of the fetches.",
        )


def check_statistics(session: Any, *, scope: str | None = None, action: Action = "raise") -> None:
    """Tell when moving statistics are still at 0 and 1 after training; to be called before such a model's eval.

    Args:
        session: holds the trained, or restored, variables.
        scope: look only at moving means whose name matches this regular expression from the start.
        action: "raise" or "warn".

    Raises:
        BatchNormUsageError: a layer's moving mean is 0 and its moving variance 1 in every channel, and `action` is
            "raise".
    """
    untouched = []
    for mean, variance in _pairs(session.graph):
        if scope is None or re.match(scope, mean.op.name):
            m, v = session.run([mean, variance])
            if (m == 0).all() and (v == 1).all():
                untouched.append(mean.op.name)
    if untouched:
        _tell(
            action,
            f"{_listed(untouched)} and the variance beside it are still 0 and 1, as before any training, so eval would"
            " not normalize. Either the update operations never ran (see check_update_ops), or the checkpoint lacks"
            " the statistics (see check_saver): train with the updates, or restore a checkpoint that has them.",
        )


def _without_updates(
    trained: Mapping[Any, str], expected: list[Any], missing: list[Any], run: set[Any], empty: bool
) -> str:
    names = _listed(sorted(set(trained.values())))
    told = f"this run trains {names}, but not all batch norms that it trains through move their statistics:"
    ran = [op for op in expected if op in run]
    position = {op: i for i, op in enumerate(missing[0].graph.get_operations())}
    if ran and max(position[op] for op in ran) < min(position[op] for op in missing):
        why = (
            f" {len(missing)} of {len(expected)} update operations are missing, and all of them were built after those"
            " that run: UPDATE_OPS was collected before these layers existed. Collect it once the whole model is built"
        )
    elif empty:
        why = (
            f" none of {len(missing)} update operations is run, and the fetches hold an empty list. If that should be"
            " UPDATE_OPS, it was collected before the layers existed: collect it once the whole model is built"
        )
    else:
        why = f" {len(missing)} of {len(expected)} update operations are not run"
    return (
        f"{told}{why}. Missing: {_listed(op.name for op in missing)}. Build the train operation inside `with"
        " tf.control_dependencies(tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)):`, or fetch both:"
        " session.run([train_op, update_ops])."
    )


# What a run reaches


def _operations(fetches: Any) -> tuple[Any, list[Any]]:
    """The graph of these fetches and the operations that they name."""
    flat = [
        part
        for item in tf.nest.flatten(fetches)
        for part in ([item] if isinstance(item, tf.Variable) else tf.nest.flatten(item, expand_composites=True))
    ]
    graphs = {item.graph for item in flat if hasattr(item, "graph")}
    if len(graphs) > 1:
        raise InputError("fetches must come from one graph; got several.")
    graph = graphs.pop() if graphs else tf.compat.v1.get_default_graph()
    elements = [graph.as_graph_element(item, allow_tensor=True, allow_operation=True) for item in flat]
    return graph, list(_ops(elements))


def _ops(elements: Iterable[Any]) -> Iterator[Any]:
    return (element if isinstance(element, tf.Operation) else element.op for element in elements)


def _ancestors(operations: Iterable[Any]) -> set[Any]:
    """These operations and all that they depend on, by data or control."""
    seen: set[Any] = set()
    waiting = list(operations)
    while waiting:
        op = waiting.pop()
        if op not in seen:
            seen.add(op)
            waiting += [tensor.op for tensor in op.inputs]
            waiting += op.control_inputs
    return seen


def _forward(record: Record) -> set[Any]:
    """The operations from x to y: those that y depends on and that depend on x."""
    users: dict[Any, list[Any]] = {}
    for op in _ancestors([record.y.op]):
        for tensor in op.inputs:
            users.setdefault(tensor.op, []).append(op)
    found: set[Any] = set()
    waiting = [record.x.op]
    while waiting:
        for op in users.get(waiting.pop(), ()):
            if op not in found:
                found.add(op)
                waiting.append(op)
    return found


# What an operation does

_ASSIGNS = re.compile(r"(Resource)?(Sparse)?(Apply|Scatter)|Assign")
_CALLS = {"If", "StatelessIf", "While", "Case", "PartitionedCall", "StatefulPartitionedCall"}


def _writes(op: Any) -> bool:
    return bool(op.inputs) and _ASSIGNS.match(op.type) is not None


def _trained_by(op: Any, trainable: set[Any], library: Callable[[], Mapping[str, Any]]) -> str:
    """The trainable variable that this operation takes a training step on; "" if none.

    An initializer and a restored value are written too, but do not depend on what the variable was.
    """
    if op.type in _CALLS:
        held = [tensor.op for tensor in op.inputs if tensor.op in trainable]
        return str(held[0].name) if held and _function_trains(op, library()) else ""
    if not _writes(op) or op.inputs[0].op not in trainable:
        return ""
    plain = op.type in ("Assign", "AssignVariableOp")
    variable = op.inputs[0].op
    return str(variable.name) if not plain or variable in _ancestors([op.inputs[1].op]) else ""


def _function_trains(op: Any, library: Mapping[str, Any]) -> bool:
    """Whether a function that this operation calls, such as a branch of tf.cond, has an optimizer's step in it."""
    waiting, seen = [op.node_def], set()
    while waiting:
        node = waiting.pop()
        called = [value.func.name for value in node.attr.values() if value.HasField("func")]
        called += [function.name for value in node.attr.values() for function in value.list.func]
        for name in called:
            if name in library and name not in seen:
                seen.add(name)
                nodes = library[name].node_def
                if any("Apply" in inner.op for inner in nodes):
                    return True
                waiting += nodes
    return False


def _would_train(record: Record, feed_dict: Mapping[Any, Any], session: Any) -> bool:
    flag = record.training
    if isinstance(flag, bool):
        return flag
    fed = {id(key): value for key, value in feed_dict.items()}
    source = flag
    while source.op.type in ("Cast", "Identity") and id(source) not in fed:
        source = source.op.inputs[0]
    if id(source) in fed:
        return bool(fed[id(source)])
    if source.op.type == "PlaceholderWithDefault":
        default = tf.get_static_value(source.op.inputs[0])
        if default is not None:
            return bool(default)
    if session is None:
        raise InputError(
            f"whether {record.name} trains depends on {source.name}, which is not in feed_dict. Give session= as well,"
            " or feed it."
        )
    return bool(session.run(flag, feed_dict))


# What a graph holds


def _collected(graph: Any) -> list[Any]:
    found = graph.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
    return list(_ops(graph.as_graph_element(item, allow_tensor=True, allow_operation=True) for item in found))


def _statistics_of(record: Record) -> list[Any]:
    """Every variable of a batch norm but gamma and beta."""
    kept = {name: v for name, v in vars(record.variables).items() if name not in ("gamma", "beta")}
    return [variable for variable in kept.values() if variable is not None]


def _statistics(graph: Any) -> list[Any]:
    """The statistics of every batch norm in a graph, each once."""
    found = {variable.op: variable for record in records(graph) for variable in _statistics_of(record)}
    found.update({variable.op: variable for pair in _pairs(graph) for variable in pair})
    return list(found.values())


def _pairs(graph: Any) -> list[tuple[Any, Any]]:
    """Each moving mean with its moving variance, by their names."""
    variables = {v.op.name: v for v in graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_VARIABLES)}
    last = "moving_mean"
    found = []
    for name, mean in variables.items():
        variance = variables.get(f"{name[: -len(last)]}moving_variance")
        if name.split("/")[-1] == last and variance is not None:
            found.append((mean, variance))
    return found


# What is said


def _has_empty(fetches: Any) -> bool:
    """Whether there is an empty list somewhere in the fetches, which `session.run` would take without a word."""
    if isinstance(fetches, (list, tuple)):
        return not fetches or any(_has_empty(item) for item in fetches)
    return isinstance(fetches, Mapping) and (not fetches or any(_has_empty(item) for item in fetches.values()))


def _listed(names: Iterable[str]) -> str:
    every = list(dict.fromkeys(names))
    more = f" and {len(every) - 4} more" if len(every) > 4 else ""
    return ", ".join(every[:4]) + more


def _tell(action: Action, message: str) -> None:
    if action not in ("raise", "warn"):
        raise InputError(f"action must be 'raise' or 'warn'; got {action!r}.")
    if action == "raise":
        raise BatchNormUsageError(message)
    warnings.warn(message, BatchNormUsageWarning, stacklevel=3)
