"""The variables of one batch norm, under the originals' names and in the originals' collections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

PARAMETERS = ("beta", "gamma")
STATISTICS = ("moving_mean", "moving_variance")


@dataclass(frozen=True, eq=False)
class Variables:
    """One batch norm's variables; None for those it does not have.

    Attributes:
        gamma, beta: the parameters; perhaps partitioned.
        moving_mean, moving_variance: what eval normalizes with.
        moving_stddev, renorm_mean, renorm_stddev: of batch renormalization.
        biased, local_step: the moving mean before its zero-debias division, and the number of updates in it.
    """

    gamma: Any
    beta: Any
    moving_mean: Any
    moving_variance: Any
    moving_stddev: Any = None
    renorm_mean: Any = None
    renorm_stddev: Any = None
    biased: Any = None
    local_step: Any = None


@dataclass(frozen=True, eq=False)
class Maker:
    """Gets or creates variables in the current variable scope, whose reuse, getters and partitioner hold.

    Attributes:
        shape: of each of them.
        dtype: of each of them.
        trainable: whether beta and gamma are.
        initializers: for each name; of the statistics' standard deviations, the root of the variance's.
        regularizers, constraints: for beta and gamma, by name.
        model: whether they are model variables.
        collections: more collections to put beta, gamma, moving_mean and moving_variance in: a list for all of them,
            or a list for each by name.
    """

    shape: tuple[int, ...]
    dtype: tf.DType
    trainable: bool
    initializers: Mapping[str, Any]
    regularizers: Mapping[str, Any]
    constraints: Mapping[str, Any]
    model: bool
    collections: Mapping[str, Sequence[str] | None] | Sequence[str] | None = None

    def make(
        self, *, center: bool, scale: bool, gamma_first: bool, renorm: bool, debias: bool, debias_is_model: bool
    ) -> Variables:
        """All variables, created in the originals' order."""
        wanted = {"beta": center, "gamma": scale}
        made: dict[str, Any] = dict.fromkeys(PARAMETERS)
        for name in reversed(PARAMETERS) if gamma_first else PARAMETERS:
            if wanted[name]:
                made[name] = self._parameter(name)
        with _unpartitioned():
            for name in STATISTICS:
                made[name] = self._get(name, self.initializers[name])
            if renorm:
                root = _root_of(self.initializers["moving_variance"])
                made["moving_stddev"] = self._get("moving_stddev", root)
                made["renorm_mean"] = self._get("renorm_mean", self.initializers["moving_mean"])
                made["renorm_stddev"] = self._get("renorm_stddev", root)
            if debias:
                # The doubled scope is the originals': the variable's full name inside the scope that it is in.
                with tf.compat.v1.variable_scope(made["moving_mean"].op.name):
                    zeros = tf.compat.v1.zeros_initializer()
                    made["biased"] = self._get("biased", zeros, model=debias_is_model)
                    made["local_step"] = self._get("local_step", zeros, shape=(), model=debias_is_model)
        # Contrib put what its core layer had made into the collections afterwards, and the statistics first.
        for name in (*STATISTICS, *PARAMETERS) if gamma_first else (*PARAMETERS, *STATISTICS):
            if made[name] is not None:
                self._collect(name, made[name])
        return Variables(**made)

    def _parameter(self, name: str) -> Any:
        return self._get(
            name,
            self.initializers[name],
            trainable=self.trainable,
            regularizer=self.regularizers.get(name),
            constraint=self.constraints.get(name),
        )

    def _get(
        self,
        name: str,
        initializer: Any,
        *,
        shape: tuple[int, ...] | None = None,
        model: bool | None = None,
        trainable: bool = False,
        **more: Any,
    ) -> Any:
        keys = tf.compat.v1.GraphKeys
        is_model = self.model if model is None else model
        return tf.compat.v1.get_variable(
            name,
            self.shape if shape is None else shape,
            self.dtype,
            initializer,
            trainable=trainable,
            collections=[keys.GLOBAL_VARIABLES, keys.MODEL_VARIABLES] if is_model else [keys.GLOBAL_VARIABLES],
            **more,
        )

    def _collect(self, name: str, variable: Any) -> None:
        """Into the collections asked for, once: a reused variable is in them already."""
        asked = self.collections
        keys = asked.get(name) if isinstance(asked, Mapping) else asked
        for key in [keys] if isinstance(keys, str) else (keys or ()):
            there = tf.compat.v1.get_collection_ref(key)
            for part in parts(variable):
                if not any(part is other for other in there):
                    there.append(part)


def parts(variable: Any) -> list[Any]:
    """A partitioned variable's parts, or the variable itself."""
    return list(variable) if hasattr(variable, "partitions") else [variable]


@contextmanager
def _unpartitioned() -> Iterator[None]:
    """The current scope without its partitioner: a moving statistic is assigned as a whole."""
    current = tf.compat.v1.get_variable_scope()
    with tf.compat.v1.variable_scope(current, auxiliary_name_scope=False) as scope:
        scope.set_partitioner(None)
        yield


def _root_of(initializer: Any) -> Any:
    def root(*args: Any, **kwargs: Any) -> tf.Tensor:
        return tf.sqrt(initializer(*args, **kwargs))

    return root
