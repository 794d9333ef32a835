"""A checkpoint as layers: what each tensor is part of, by what the model says of its layers, or else by the names.

Only shapes are read. What is not understood (recurrent layers, fused attention, parameters of nobody knows what) is
named, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final, Literal

from ..checkpoint.batch_norms import StoredBatchNorm, find
from ..checkpoint.checkpoint import Checkpoint, Layer
from ..checkpoint.naming import split
from ..errors import CheckpointError
from .layouts import AS_IT_IS, LAYOUTS, Layout, Shape

Kind = Literal["conv", "depthwise", "conv transpose", "dense", "embedding", "norm", "batch norm"]
KERNELS: Final = ("conv", "depthwise", "conv transpose", "dense", "embedding")
DIALECTS: Final = ("torch", "keras", "flax", "haiku", "equinox")


@dataclass(frozen=True, eq=False)
class Unit:
    """One layer of a checkpoint.

    Attributes:
        name: the layer's, in the file's words, or the model's own where the file has that too (Keras).
        kind: what it is; "norm" is a layer or group norm.
        parts: role to tensor name: "kernel" and "bias", "gamma" and "beta", or the attributes of `BatchNormState`.
        shape: the kernel's, canonical (`layouts`); (channels,) of a norm.
        layout: the kernel's.
        order: its place among the checkpoint's units.
        owner: of a batch norm, the name of the layer that it belongs to, where names or order tell; else None.
        certain_owner: the names say so, or the order does without a doubt.
        doubt: what else it could be by its names: kinds.
        groups: a convolution's, where the model says; else None.
        flatten: of a dense layer, the shape (channels, *spatial) that its input was flattened from, where known.
        stored: the batch norm.
    """

    name: str
    kind: Kind
    parts: Mapping[str, str]
    shape: Shape
    layout: Layout
    order: int
    owner: str | None = None
    certain_owner: bool = False
    doubt: tuple[Kind, ...] = ()
    groups: int | None = None
    flatten: Shape | None = None
    stored: StoredBatchNorm | None = None

    @property
    def channels(self) -> int:
        """Of what comes out of it."""
        return self.shape[1] * (self.groups or 1) if self.kind == "conv transpose" else self.shape[0]


@dataclass(frozen=True)
class Strange:
    """Tensors that are no unit, and why. `harmless`: nothing that a model computes with (an optimizer's, a counter)."""

    name: str
    tensors: tuple[str, ...]
    reason: str
    harmless: bool = False


@dataclass(frozen=True, eq=False)
class Units:
    """A checkpoint's layers.

    Attributes:
        checkpoint: where they are from.
        dialect: whose layouts its kernels have.
        units: in the checkpoint's order.
        strange: what is none.
        ordered: whether that order is the model's: of all units, of those of one class (Keras numbers each class
            apart), or of none.
    """

    checkpoint: Checkpoint
    dialect: str
    units: tuple[Unit, ...]
    strange: tuple[Strange, ...]
    ordered: Literal["all", "by class", "no"]
    _by_name: dict[str, Unit] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {unit.name: unit for unit in self.units})

    def __getitem__(self, name: str) -> Unit:
        return self._by_name[name]


_HARMLESS: Final = re.compile(
    r"(^|/)(optimizer|opt_state|opt|_?seed_generator|rngs?|trackable_state)(/|$)"
    r"|(^|[./])(global_step|step|iterations?|save_counter|_?learning_rate|beta[12]_power|num_batches_tracked|rng)(/|$|:)"
    r"|/(Momentum|Adam|Adam_1|RMSProp|RMSProp_1|Adagrad|Ftrl|ExponentialMovingAverage)$"
    r"|seed_generator"
)  # fmt: skip
_FUSED: Final = re.compile(r"(^|[._/])(c_attn|qkv|in_proj|Wqkv|query_key_value)$")
_RECURRENT: Final = ({"hf", "hg", "hi", "ho", "ii", "if", "ig", "io"}, {"hn", "hr", "hz", "in", "ir", "iz"})
_TRANSPOSED: Final = re.compile(r"transpose|deconv|convtrans|conv_?t(_?\d*)$|upconv", re.IGNORECASE)

# The last part of a tensor's name: its role, and the kind that it alone decides.
_LEAVES: Final[Mapping[str, Mapping[str, tuple[str, Kind | None]]]] = {
    "torch": {"weight": ("kernel", None), "bias": ("bias", None)},
    "equinox": {"weight": ("kernel", None), "bias": ("bias", None)},
    "keras": {
        "kernel": ("kernel", None), "_kernel": ("kernel", None), "weights": ("kernel", None),
        "bias": ("bias", None), "biases": ("bias", None),
        "depthwise_kernel": ("kernel", "depthwise"), "depthwise_weights": ("kernel", "depthwise"),
        "embeddings": ("kernel", "embedding"), "_embeddings": ("kernel", "embedding"),
        "gamma": ("gamma", "norm"), "beta": ("beta", "norm"),
    },
    "flax": {"kernel": ("kernel", None), "bias": ("bias", None), "embedding": ("kernel", "embedding"),
             "scale": ("gamma", "norm")},
    "haiku": {"w": ("kernel", None), "b": ("bias", None), "embeddings": ("kernel", "embedding"),
              "scale": ("gamma", "norm"), "offset": ("beta", "norm")},
}  # fmt: skip
# Keras's numbered variables, by the class that the path names.
_NUMBERED: Final[tuple[tuple[str, Kind, tuple[str, ...]], ...]] = (
    (r"conv[123]d_transpose", "conv transpose", ("kernel", "bias")),
    (r"depthwise_conv[12]d", "depthwise", ("kernel", "bias")),
    (r"conv[123]d", "conv", ("kernel", "bias")),
    (r"dense", "dense", ("kernel", "bias")),
    (r"embedding", "embedding", ("kernel",)),
    (r"(layer|group)_normalization", "norm", ("gamma", "beta")),
    (r"rms_normalization", "norm", ("gamma",)),
)
_CLASSES: Final[tuple[tuple[str, Kind], ...]] = (
    (r"Conv[123]d", "conv"), (r"ConvTranspose[123]d", "conv transpose"), (r"Linear", "dense"),
    (r"Embedding", "embedding"), (r"(Layer|Group|RMS)Norm", "norm"),
)  # fmt: skip


def dialect_of(checkpoint: Checkpoint) -> str:
    """Whose words the names are: one of `DIALECTS`.

    Raises:
        CheckpointError: nothing tells.
    """
    told = {str(layer.settings["dialect"]) for layer in checkpoint.layers if "dialect" in layer.settings} & set(
        DIALECTS
    )
    if len(told) == 1:
        return told.pop()
    by_format = {"torch": "torch", "torch.legacy": "torch", "safetensors": "torch", "safetensors.index": "torch",
                 "onnx": "torch", "keras": "keras", "keras.h5": "keras", "tensorflow": "keras", "savedmodel": "keras",
                 "flax": "flax", "orbax": "flax", "haiku": "haiku", "equinox": "equinox"}  # fmt: skip
    usual = by_format.get(checkpoint.format)
    leaves = {split(_clean(name))[1] for name in checkpoint}
    numbered = any(re.search(r"/vars/\d+$", name) for name in checkpoint)
    signs = {
        "torch": bool(leaves & {"weight", "running_mean", "running_var"}),
        # torch's words too: only the format or the statistics tell the two apart.
        "equinox": bool(leaves & {"batch_hidden_mean", "ema_mean"}) or (usual == "equinox" and "weight" in leaves),
        "haiku": "w" in leaves or any("/~/" in name for name in checkpoint),
        "keras": numbered or bool(leaves & {"moving_mean", "moving_variance", "weights", "depthwise_kernel"}),
        "flax": any(name.startswith(("params/", "batch_stats/")) for name in checkpoint),
    }
    if usual is not None and (signs.get(usual) or not any(signs.values())):
        return usual
    likely = [dialect for dialect, sign in signs.items() if sign]
    if len(likely) == 1:
        return likely[0]
    if usual is not None:
        return usual
    raise CheckpointError(
        f"{checkpoint.path or checkpoint.format}: its names do not tell which framework they are of"
        f" ({', '.join(likely) or 'none'} would do); give the dialect, one of {', '.join(DIALECTS)}."
    )


def units_of(checkpoint: Checkpoint, *, dialect: str | None = None, **options: Any) -> Units:
    """Take a checkpoint apart.

    Args:
        checkpoint: of a file, or read from a live model, which says what its layers are.
        dialect: one of `DIALECTS`; None: as `dialect_of` finds.
        options: as of `bnlayer.checkpoint.batch_norms.find`: names, ema, epsilon, decay.

    Raises:
        CheckpointError: nothing tells whose layouts the tensors have.
    """
    dialect = dialect or dialect_of(checkpoint)
    found = find(checkpoint, **options)
    place = {name: i for i, name in enumerate(checkpoint.tensors)}
    aliases: Mapping[str, str] = checkpoint.metadata.get("layer_names", {})
    units: list[Unit] = []
    strange: list[Strange] = []
    taken: set[str] = set()
    tied: Mapping[str, str] = checkpoint.metadata.get("tied", {})
    for alias, first in tied.items():
        if alias in place and first in place:
            taken.add(alias)
            strange.append(Strange(alias, (alias,), f"it is {first}", harmless=True))
    for stored in found.batch_norms:
        here = {part for part in stored.parts.values() if part in place}
        # Haiku counts the updates of the mean and of the variance apart.
        here |= {twin for part in here if (twin := part.replace("/mean_ema/", "/var_ema/")) in place}
        if here & taken:
            continue
        taken |= here
        name = aliases.get(stored.name, stored.name)
        order = min(place[part] for part in here)
        units.append(Unit(name, "batch norm", stored.parts, (stored.num_features,), AS_IT_IS, order, stored=stored))
    # Where an average stands for a variable, the variable's own value is of no layer.
    twins = {name.removesuffix(_TWIN) for name in taken if name.endswith(_TWIN)}
    taken |= twins
    for unclear in found.ambiguous:
        tensors = tuple(name for name in unclear.tensors if name not in taken)
        taken |= set(tensors)
        if tensors:
            strange.append(Strange(unclear.name, tensors, unclear.reason))
    if options.get("ema") == "ema":  # the twin stands for the variable, whose own value is not carried
        averaged = {name: name + _TWIN for name in checkpoint if name + _TWIN in checkpoint.tensors}
    else:
        averaged = {}
    for layer in checkpoint.layers:
        made = _from_layer(checkpoint, layer, taken, place)
        if made is not None:
            taken |= set(made.parts.values() if isinstance(made, Unit) else made.tensors)
            (units if isinstance(made, Unit) else strange).append(made)  # type: ignore[arg-type]
    rest = [name for name in checkpoint if name not in taken]
    # Equinox files hold a module's own numbers and flags too, such as a dropout's rate: settings, no weights.
    numbers = {name for name in rest if dialect == "equinox" and not checkpoint.tensors[name].shape}
    harmless = [name for name in rest if name in numbers or _HARMLESS.search(name)]
    strange += [Strange(name, (name,), "it is no weight of the model", harmless=True) for name in harmless]
    dropped = set(harmless)
    left = {name: averaged.get(name, name) for name in rest if name not in dropped}
    for made in _by_names(checkpoint, left, dialect, place, aliases):
        (units if isinstance(made, Unit) else strange).append(made)  # type: ignore[arg-type]
    units.sort(key=lambda unit: unit.order)
    numbered = dialect == "keras" and all(_counted(unit.parts) for unit in units)
    ordered: Literal["all", "by class", "no"] = (
        "all" if checkpoint.order_is_meaningful else "by class" if numbered else "no"
    )
    owned = _with_owners(units, dialect, ordered == "all")
    return Units(checkpoint, dialect, owned, tuple(strange), ordered)


_TWIN: Final = "/ExponentialMovingAverage"


def _counted(parts: Mapping[str, str]) -> bool:
    """Whether Keras has numbered this layer within its class: `layers/conv2d_5/vars/0`."""
    return all(re.fullmatch(r"(.*/)?layers/[a-z0-9_]+/vars/\d+", name) for name in parts.values())


def _clean(name: str) -> str:
    """A tensor's name without what stands for no layer."""
    name = re.sub(r"(:0|/\.ATTRIBUTES/VARIABLE_VALUE|[./](raw_)?value)$", "", name)
    return re.sub(r"^params/(params/)?", "", name)


def _from_layer(
    checkpoint: Checkpoint, layer: Layer, taken: set[str], place: Mapping[str, int]
) -> Unit | Strange | None:
    """A layer of which the model says what it is; None where its tensors are taken or not there."""
    tensors = {role: name for role, name in layer.tensors.items() if name in place and name not in taken}
    if not tensors or tensors.keys() != layer.tensors.keys():
        return None
    last = layer.kind.rsplit(".", 1)[-1].rsplit(">", 1)[-1]
    kind: Kind | None = next((k for k in (*KERNELS, "norm") if k == layer.kind), None)
    if kind is None and "." in layer.kind:
        kind = next((k for pattern, k in _CLASSES if re.fullmatch(pattern, last)), None)
        words = ("gamma", "beta") if kind == "norm" else ("kernel", "bias")
        roles: dict[str, str] = dict(zip(("weight", "bias"), words, strict=True))
        tensors = {roles.get(role, role): n for role, n in tensors.items()}
    known = {"gamma", "beta"} if kind == "norm" else {"kernel", "bias"}
    if kind is None or not tensors.keys() <= known or not tensors.keys() & {"kernel", "gamma", "beta"}:
        return Strange(layer.name, tuple(tensors.values()), f"a {last} is not understood; give it in a rules file, or"
                       " move it by hand")  # fmt: skip
    settings = layer.settings
    dialect = str(settings.get("dialect", "torch"))
    word = f"{kind}, transpose_kernel" if settings.get("transpose_kernel") else kind
    flatten = settings.get("flatten")
    return _unit(
        checkpoint, layer.name, kind, tensors, LAYOUTS[dialect].get(word, AS_IT_IS), place,
        groups=settings.get("groups"), flatten=None if flatten is None else tuple(flatten),
    )  # fmt: skip


def _unit(
    checkpoint: Checkpoint, name: str, kind: Kind, parts: Mapping[str, str], layout: Layout,
    place: Mapping[str, int], **more: Any,
) -> Unit | Strange:  # fmt: skip
    """A unit, if its shapes are those of one."""
    shapes = {role: checkpoint.tensors[tensor].shape for role, tensor in parts.items()}
    order = min(place[tensor] for tensor in parts.values())
    if kind == "norm":
        long = {tuple(n for n in shape if n != 1) for shape in shapes.values()}
        if len(long) != 1 or len(max(long)) > 1:
            return Strange(
                name, tuple(parts.values()), f"a norm's tensors of these shapes are not understood: {shapes}"
            )
        return Unit(name, kind, parts, max(long) or (1,), layout, order, **more)
    kernel = shapes["kernel"]
    fits = len(kernel) == 2 if kind in ("dense", "embedding") else len(kernel) >= 3
    if not fits or 0 in kernel:
        return Strange(name, tuple(parts.values()), f"a {kind}'s kernel of shape {kernel} is not understood")
    unit = Unit(name, kind, parts, layout.canonical_shape(kernel), layout, order, **more)
    if "bias" in shapes:
        (length, *others) = [n for n in shapes["bias"] if n != 1] or [1]
        if kind == "conv" and length != unit.channels and length == unit.shape[1] and "conv transpose" in unit.doubt:
            return replace(unit, kind="conv transpose", doubt=())
        if others or (length != unit.channels and not (kind == "conv transpose" and length % unit.channels == 0)):
            return Strange(name, tuple(parts.values()), f"its bias has shape {shapes['bias']}, its kernel {kernel}")
    return unit


def _by_names(
    checkpoint: Checkpoint, left: Mapping[str, str], dialect: str, place: Mapping[str, int], aliases: Mapping[str, str]
) -> Iterator[Unit | Strange]:
    """Units by the names of their tensors. `left`: the name to go by, to the tensor's."""
    owners: dict[str, dict[str, str]] = {}
    for name, tensor in left.items():
        clean = _clean(name)
        owner, leaf = split(clean)
        if re.fullmatch(r"\d+", leaf) and owner.endswith("/vars") and dialect == "keras":
            owner = owner.removesuffix("/vars")
        owners.setdefault(owner, {})[leaf] = tensor
    children: dict[str, set[str]] = {}
    for owner in owners:
        children.setdefault(split(owner)[0], set()).add(split(owner)[1])
    for owner, leaves in owners.items():
        name = aliases.get(owner, owner)
        made = _numbered(leaves, owner) if all(leaf.isdigit() for leaf in leaves) else _named(leaves, owner, dialect)
        if isinstance(made, str):
            yield Strange(name, tuple(leaves.values()), made)
            continue
        kind, parts = made
        if owner and any(children[split(owner)[0]] >= gates for gates in _RECURRENT):
            yield Strange(name, tuple(leaves.values()), "a recurrent layer is not understood")
            continue
        if _FUSED.search(owner):
            yield Strange(name, tuple(leaves.values()), "a fused attention's parts lie in an order that no file tells")
            continue
        doubt: tuple[Kind, ...] = ()
        rank = len(checkpoint.tensors[parts["kernel"]].shape) if "kernel" in parts else 1
        if kind is None and rank == 1 and dialect in ("torch", "equinox"):
            parts = {{"kernel": "gamma", "bias": "beta"}[role]: tensor for role, tensor in parts.items()}
            kind = "norm"
        elif kind is None and rank == 2:
            kind = "dense"
            if dialect in ("torch", "equinox") and "bias" not in parts:
                doubt = ("embedding",)
        elif kind is None and rank >= 3:
            told = _TRANSPOSED.search(owner.rsplit("/", 1)[-1]) or (dialect != "torch" and _TRANSPOSED.search(owner))
            kind = "conv transpose" if told else "conv"
            if not told:
                doubt = ("conv transpose",)
            if rank == 3 and split(owner)[1] in ("query", "key", "value", "out") and dialect == "flax":
                yield Strange(name, tuple(leaves.values()), "an attention's projections are not understood")
                continue
        if kind is None:
            yield Strange(
                name, tuple(leaves.values()), f"tensors {', '.join(leaves)} of it are of no layer that is known"
            )
            continue
        layout = AS_IT_IS if kind == "norm" else LAYOUTS[dialect][kind]
        yield _unit(checkpoint, name, kind, parts, layout, place, doubt=doubt)


def _numbered(leaves: Mapping[str, str], owner: str) -> tuple[Kind | None, dict[str, str]] | str:
    """A Keras layer whose variables have numbers."""
    tensors = [leaves[leaf] for leaf in sorted(leaves, key=int)]
    last = split(owner)[1]
    for pattern, kind, roles in _NUMBERED:
        if re.fullmatch(rf"{pattern}(_\d+)?", last):
            if len(tensors) > len(roles):
                return f"it has {len(tensors)} variables, and a {kind} has {len(roles)} at the most"
            return kind, dict(zip(roles, tensors, strict=False))
    return f"Keras's layer {last!r} with {len(tensors)} variables is none that is known"


def _named(leaves: Mapping[str, str], owner: str, dialect: str) -> tuple[Kind | None, dict[str, str]] | str:
    """A layer whose tensors have names; kind None: their ranks tell."""
    words = _LEAVES[dialect]
    unknown = [leaf for leaf in leaves if leaf not in words]
    if unknown:
        return f"{', '.join(unknown)} of it {'is' if len(unknown) == 1 else 'are'} of no layer that is known"
    parts = {words[leaf][0]: tensor for leaf, tensor in leaves.items()}
    kinds: set[Kind] = {told for leaf in leaves if (told := words[leaf][1]) is not None}
    if len(parts) != len(leaves) or len(kinds) > 1:
        return f"tensors {', '.join(leaves)} together are of no layer that is known"
    kind: Kind | None = next(iter(kinds), None)
    if kind == "norm":
        parts = {{"bias": "beta"}.get(role, role): tensor for role, tensor in parts.items()}
        if not parts.keys() <= {"gamma", "beta"}:
            return f"tensors {', '.join(leaves)} together are of no layer that is known"
    elif "kernel" not in parts:
        return "it has a bias and no kernel"
    return kind, parts


_NORM_WORDS: Final = {"bn", "batchnorm", "norm", "normalization", "batchnormalization", "batch", "conv", "convolution",
                      "conv2d", "conv1d", "conv3d", "weights"}  # fmt: skip


def _key(name: str) -> tuple[str, ...]:
    """A layer's name without the words that say what kind of layer it is."""
    words = re.findall(r"\d+|[A-Za-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name))
    return tuple(word.lower() for word in words if word.lower() not in _NORM_WORDS)


def _with_owners(units: Sequence[Unit], dialect: str, ordered: bool) -> tuple[Unit, ...]:
    """Each batch norm with the layer that it belongs to: the one of the same name but for "bn" and "conv", the one of
    the number before its own in a sequence, or, in the model's own order, the one just before it.

    Any of it is believed only if it holds throughout, for all batch norms so named and with the same channels: before
    an activation, bn2 may stand before conv2, and a model may hold its norms behind all convolutions.
    """
    kernels = [one for one in units if one.kind in KERNELS and one.kind != "embedding"]
    by_key: dict[tuple[str, ...], list[Unit]] = {}
    for one in kernels:
        by_key.setdefault(_key(one.name), []).append(one)
    norms = [one for one in units if one.kind == "batch norm"]
    named: dict[str, Unit] = {}
    for n in norms:
        alike = by_key.get(_key(n.name), [])
        # Conv1 and Conv_1 are named alike; the channels tell which of them bn_Conv1 belongs to.
        fitting = [one for one in alike if one.channels == n.channels] if len(alike) > 1 else alike
        if len(fitting) == 1:
            named[n.name] = fitting[0]
    by_name = {one.name: one for one in kernels}
    for n in norms:
        number = split(n.name)[1]
        last = by_name.get(f"{n.name[: len(n.name) - len(number)]}{int(number) - 1}") if number.isdecimal() else None
        if last is not None and n.name not in named:
            named[n.name] = last
    false = {_numberless(n.name) for n in norms if (owner := named.get(n.name)) is None or owner.channels != n.channels}
    before = {unit.name: last for last, unit in pairwise(units)}
    # Equinox holds the statistics behind all parameters: where there are no others, their place says nothing.
    placed = [n for n in norms if dialect != "equinox" or n.parts.keys() & {"gamma", "beta"}]
    follow = ordered and len(placed) == len(norms) and all(
        (last := before.get(n.name)) is not None and last in kernels and last.channels == n.channels for n in norms
    )  # fmt: skip
    result = []
    for unit in units:
        if unit.kind == "batch norm" and unit.name in named and _numberless(unit.name) not in false:
            result.append(replace(unit, owner=named[unit.name].name, certain_owner=True))
        elif unit.kind == "batch norm" and follow:
            result.append(replace(unit, owner=before[unit.name].name))
        else:
            result.append(unit)
    return tuple(result)


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
