"""The batch norms in a checkpoint: which tensors they are, what their spec is, and how far the file tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from ..dialects import DIALECTS
from ..errors import BatchNormError, CheckpointError, DialectError, SpecError
from ..spec import FLOAT_DTYPES, BatchNormSpec, Renorm
from ..state import BatchNormState, array_names, needs_counter
from . import equinox_state, naming
from .checkpoint import Checkpoint, Layer, NDArray
from .naming import Candidate, Unclear

Origin = Literal["file", "assumed", "given"]
ASSUMABLE: Final = ("kind", "epsilon", "decay", "axis", "moving_variance_estimator")
_ROLES: Final = ("gamma", "beta", "moving_mean", "moving_variance", "num_updates", "hidden_mean", "hidden_variance",
                 "renorm_mean", "renorm_stddev", "moving_stddev")  # fmt: skip
_COUNTING: Final = ("torch", "haiku")  # whose layers have a counter
_RENORM: Final = ("renorm_mean", "renorm_stddev", "moving_stddev")
# Arguments that a dialect has no default for, or none that is a batch norm.
_USUAL: Final[Mapping[str, Mapping[str, Any]]] = {
    "haiku": {"decay_rate": 0.9, "create_scale": True, "create_offset": True},
    "equinox": {"mode": "batch"},
}
# What the names cannot tell of the input's rank: a batch norm is mostly one of images.
_RANK: Final = 4


@dataclass(frozen=True, eq=False)
class StoredBatchNorm:
    """One batch norm of a checkpoint.

    Attributes:
        name: the layer's, in the file's words.
        owner: the convolution or dense layer that it belongs to, where the order tells; or None.
        num_features: its channels.
        parts: attribute of `BatchNormState` to the name of the tensor that it is, or that it follows from
            (`convention`).
        missing: what the file lacks of the state that its spec has.
        spec: what it is.
        sources: for each of "kind", "epsilon", "decay", "axis", "moving_variance_estimator": whether the file has it,
            the caller gave it, or it was assumed: to be the framework's default, or to be a batch norm at all ("kind").
        convention: how the tensors make the state: "" as they are, or one of Equinox's two modes (`equinox_state`).
    """

    checkpoint: Checkpoint
    name: str
    owner: str | None
    num_features: int
    parts: Mapping[str, str]
    missing: tuple[str, ...]
    spec: BatchNormSpec
    sources: Mapping[str, Origin]
    convention: str = ""

    def state(self) -> BatchNormState[NDArray]:
        """Its state, read now. What the file lacks is None.

        Raises:
            CheckpointError: a tensor cannot be read, or the counter is none.
        """
        arrays: dict[str, Any] = {
            role: self.checkpoint[name].reshape(-1) for role, name in self.parts.items() if role != "num_updates"
        }
        name = self.parts.get("num_updates")
        counter = None if name is None else _count(self.checkpoint, name)
        if self.convention == "equinox.batch":
            assert counter is not None and isinstance(self.spec.decay, float)  # its rule asks for one, zero_debias too
            hidden = arrays["hidden_mean"], arrays["hidden_variance"]
            arrays.update(equinox_state.from_batch_mode(*hidden, counter, self.spec.decay))
        elif self.convention == "equinox.ema":
            first_time = bool(counter)
            arrays, counter = equinox_state.from_ema_mode(arrays, first_time), 0 if first_time else None
        return BatchNormState(**arrays, num_updates=counter)


@dataclass(frozen=True, eq=False)
class Found:
    """What `find` found."""

    batch_norms: list[StoredBatchNorm]
    ambiguous: list[Unclear]


def find(
    checkpoint: Checkpoint,
    *,
    names: Mapping[str, str] | None = None,
    ema: Literal["raw", "ema"] = "raw",
    dialect: str | None = None,
    epsilon: float | None = None,
    decay: float | Literal["cumulative"] | None = None,
) -> Found:
    """Find every batch norm of a checkpoint.

    Args:
        checkpoint: where to look; only shapes are read.
        names: the file's own words for hand-written layers: attribute of `BatchNormState` to the last part of the
            tensors' names, such as {"gamma": "scale", "moving_mean": "pop_mean", "moving_variance": "pop_var"}.
        ema: which of TensorFlow's twins: the variables, or their exponential moving averages.
        dialect: whose defaults to assume where the file has none.
        epsilon, decay: what to take where the file does not say.

    Raises:
        CheckpointError: `names` has an unknown attribute, or lacks the statistics.
    """
    view = naming.averaged(checkpoint.tensors, ema)
    found: list[StoredBatchNorm] = []
    unclear: list[Unclear] = []
    taken: set[str] = set()
    candidates: list[Candidate | Unclear] = [_from_layer(layer) for layer in checkpoint.layers if _is_batch_norm(layer)]
    if names is not None:
        candidates += naming.given(view, _checked(names))
    # A live model says of each layer what it is: what it calls something else is not guessed to be a batch norm.
    others = {t for one in checkpoint.layers if "dialect" in one.settings and not _is_batch_norm(one)
              for t in one.tensors.values()}  # fmt: skip
    candidates += [
        found
        for rule in naming.RULES
        for found in rule(view)
        if isinstance(found, Unclear) or others.isdisjoint(found.parts.values())
    ]
    given = {"epsilon": epsilon, "decay": decay}
    for candidate in candidates:
        if isinstance(candidate, Unclear):
            unclear.append(candidate)
            continue
        parts = {role: view.get(name, name) for role, name in candidate.parts.items()}
        if taken & set(parts.values()) and not candidate.settings:
            continue  # a surer rule has had it; layers that the file itself lists may share tensors
        problem = _problem(checkpoint, parts, "b" if candidate.convention == "equinox.ema" else "iuf")
        if problem:
            unclear.append(Unclear(candidate.name, problem))
            continue
        try:
            stored = _stored(checkpoint, candidate, parts, dialect, given)
        except (DialectError, SpecError) as error:
            unclear.append(Unclear(candidate.name, f"its settings make no batch norm: {error}"))
            continue
        taken |= set(parts.values())
        found.append(stored)
    known = {one.name for one in found}
    order = {name: i for i, name in enumerate(checkpoint.tensors)}
    found.sort(key=lambda one: min(order[name] for name in one.parts.values()))
    return Found(found, [one for one in unclear if one.name not in known and not taken & set(one.tensors)])


def _checked(names: Mapping[str, str]) -> Mapping[str, str]:
    unknown = [role for role in names if role not in _ROLES]
    if unknown or not set(naming.STATISTICS) <= set(names):
        raise CheckpointError(
            "names must map moving_mean, moving_variance and perhaps others to the file's own words; got"
            f" {dict(names)}. The attributes are {', '.join(_ROLES)}."
        )
    return names


def _is_batch_norm(layer: Layer) -> bool:
    last = layer.kind.rsplit(".", 1)[-1].rsplit(">", 1)[-1]
    return last in ("BatchNormalization", "BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")


def _from_layer(layer: Layer) -> Candidate | Unclear:
    """A layer that the format itself calls a batch norm, with its arguments as stored."""
    dialect = str(layer.settings.get("dialect", "keras"))
    settings = {key: value for key, value in layer.settings.items() if key != "dialect"}
    if dialect == "equinox":
        (named,) = naming.equinox(layer.tensors.values())
        return named if isinstance(named, Unclear) else replace(named, name=layer.name, settings=settings)
    return Candidate(layer.name, dialect, dict(layer.tensors), settings=settings)


def _problem(checkpoint: Checkpoint, parts: Mapping[str, str], counts: str) -> str:
    """Why these tensors are no batch norm, or "". `counts`: numpy's letters for the dtypes of its counter."""
    sizes = {}
    for role, name in parts.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            return f"the file says that it has {name!r}, and does not hold it"
        if role == "num_updates":
            if tensor.dtype.kind not in counts or tensor.nbytes > 8 * max(tensor.shape, default=1):
                return f"{name} is {tensor.dtype.name} {tensor.shape}, and a count was expected"
            continue
        if tensor.dtype.name not in FLOAT_DTYPES:
            return f"{name} is {tensor.dtype.name}; a batch norm's are {', '.join(FLOAT_DTYPES)}"
        sizes[name] = tensor.shape
    if "moving_mean" not in parts or "moving_variance" not in parts:
        return "it has no moving statistics in the file"
    long = {tuple(n for n in shape if n != 1) for shape in sizes.values()}
    if len(long) != 1 or any(len(shape) > 1 for shape in long) or any(0 in shape for shape in long):
        return "its tensors differ in length: " + ", ".join(f"{name} {shape}" for name, shape in sizes.items())
    return ""


def _stored(
    checkpoint: Checkpoint,
    candidate: Candidate,
    parts: Mapping[str, str],
    dialect: str | None,
    given: Mapping[str, Any],
) -> StoredBatchNorm:
    tensors = {role: checkpoint.tensors[name] for role, name in parts.items() if role != "num_updates"}
    features = int(np.prod(tensors["moving_variance"].shape))
    stored = next((tensors[role] for role in ("gamma", "beta") if role in tensors), tensors["moving_variance"])
    fields: dict[str, Any] = {
        "center": "beta" in parts,
        "scale": "gamma" in parts,
        "param_dtype": stored.dtype.name,
        "stats_dtype": tensors["moving_variance"].dtype.name,
        **candidate.fields,
    }
    if any(role in parts for role in _RENORM):
        fields["renorm"] = Renorm()
    base = dialect or candidate.dialect or "keras"
    spec = _assumed(base, features)
    sources: dict[str, Origin] = dict.fromkeys(ASSUMABLE, "assumed")
    sources["kind"] = "assumed" if candidate.doubt else "file"
    if candidate.settings:
        told = _told(candidate, features)
        for name in ("epsilon", "decay", "axis", "moving_variance_estimator"):
            fields[name] = getattr(told, name)
            sources[name] = "file"
        if told.renorm is not None:
            fields["renorm"] = told.renorm
        fields["synchronized"] = told.synchronized
        if "spec" in candidate.settings:
            fields = told.to_dict() | {"renorm": told.renorm}
    for name, value in given.items():
        if value is not None and sources[name] != "file":
            fields[name], sources[name] = value, "given"
    spec = spec.replace(**fields)
    wanted = [*array_names(spec)]
    if base in _COUNTING or needs_counter(spec):
        wanted.append("num_updates")
    missing = tuple(role for role in wanted if role not in parts)
    owner = _owner(checkpoint, parts, features)
    return StoredBatchNorm(
        checkpoint, candidate.name, owner, features, dict(parts), missing, spec, sources, candidate.convention
    )


def _told(candidate: Candidate, features: int) -> BatchNormSpec:
    """What the layer's own arguments say; a live model's layer, for which its framework may lack words, has a spec."""
    if "spec" in candidate.settings:
        return BatchNormSpec.from_dict(candidate.settings["spec"])
    return BatchNormSpec.from_dialect(candidate.dialect, **_argued(candidate, features))


def _argued(candidate: Candidate, features: int) -> dict[str, Any]:
    """The stored arguments that the dialect knows; a stored axis may be a list of one."""
    known = DIALECTS[candidate.dialect].defaults
    arguments = {key: value for key, value in candidate.settings.items() if key in known}
    if isinstance(arguments.get("axis"), list) and len(arguments["axis"]) == 1:
        arguments["axis"] = arguments["axis"][0]
    return {"num_features": features, "rank": _RANK, **_USUAL.get(candidate.dialect, {}), **arguments}


def _assumed(dialect: str, features: int) -> BatchNormSpec:
    """The framework's default."""
    try:
        return BatchNormSpec.from_dialect(dialect, num_features=features, rank=_RANK, **_USUAL.get(dialect, {}))
    except BatchNormError as error:
        raise CheckpointError(f"the defaults of {dialect!r} cannot be assumed: {error}") from error


def _owner(checkpoint: Checkpoint, parts: Mapping[str, str], features: int) -> str | None:
    """The layer right before, where the order is the model's: a kernel that gives this many channels."""
    if not checkpoint.order_is_meaningful:
        return None
    for name in checkpoint.before(parts.values()):
        shape = checkpoint.tensors[name].shape
        if len(shape) >= 2:
            return naming.split(name)[0] if features in (shape[0], shape[1], shape[-1], shape[-1] * shape[-2]) else None
        if len(shape) == 1 and shape[0] != features:
            return None
    return None


def _count(checkpoint: Checkpoint, name: str) -> int:
    value = np.asarray(checkpoint[name]).reshape(-1)
    if value.size != 1 or not 0 <= float(value[0]) < 2**63 or float(value[0]) != int(value[0]):
        raise CheckpointError(
            f"{checkpoint.path}: {name} must be a count; got {value[:3]}. (Haiku's is negative in an average's warmup,"
            " which a batch norm has not.)"
        )
    return int(value[0])
