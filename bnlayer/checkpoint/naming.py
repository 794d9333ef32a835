"""How each framework names a batch norm's tensors in a file: rules over names alone.

A rule turns a checkpoint's names into candidates: which tensors together may be a batch norm, and whether anything else
has the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final, Literal

from ..spec import Renorm

# Roles are the attributes of BatchNormState.
STATISTICS: Final = ("moving_mean", "moving_variance")


@dataclass(frozen=True)
class Candidate:
    """Tensors that together may be a batch norm.

    Attributes:
        name: the layer's.
        dialect: whose words its tensors have (`bnlayer.dialects`).
        parts: role to tensor name.
        settings: the dialect's arguments, where the file has them.
        fields: spec fields that the names themselves decide, such as zero_debias for Haiku.
        doubt: what else it could be; "" where the names leave none.
        convention: "" where the tensors are the state's arrays; else what these follow from (`batch_norms`).
    """

    name: str
    dialect: str
    parts: Mapping[str, str]
    _: KW_ONLY
    settings: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    doubt: str = ""
    convention: Literal["", "equinox.batch", "equinox.ema"] = ""


@dataclass(frozen=True)
class Unclear:
    """What looks like a batch norm and cannot be read as one without being told more; and its tensors."""

    name: str
    reason: str
    tensors: tuple[str, ...] = ()


Rule = Callable[[Collection[str]], Iterator[Candidate | Unclear]]

_TORCH: Final = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
    "num_batches_tracked": "num_updates",
}
_KERAS: Final = {role: role for role in ("gamma", "beta", *STATISTICS, "moving_stddev", "renorm_mean", "renorm_stddev")}
_OURS: Final = {
    role: role for role in ("hidden_mean", "hidden_variance", "renorm_mean", "renorm_stddev", "moving_stddev")
}
_FLAX: Final = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
# gamma, beta and the statistics of a Keras layer are numbered in this order, those it lacks left out.
_KERAS_ORDER: Final = (
    "gamma",
    "beta",
    "moving_mean",
    "moving_variance",
    "moving_stddev",
    "renorm_mean",
    "renorm_stddev",
)
_EMA: Final = "/ExponentialMovingAverage"


def split(name: str) -> tuple[str, str]:
    """A tensor's name as its owner's and its own: at the last dot or slash."""
    cut = max(name.rfind("."), name.rfind("/"))
    return (name[:cut], name[cut + 1 :]) if cut >= 0 else ("", name)


def torch(names: Collection[str]) -> Iterator[Candidate | Unclear]:
    """`P.running_mean` beside `P.running_var`, and what else P has."""
    for owner, leaves in _owners(names, "running_mean"):
        if "running_var" not in leaves:
            yield Unclear(owner, "it has a running_mean and no running_var")
            continue
        parts = {role: leaves[leaf] for leaf, role in {**_TORCH, **_OURS}.items() if leaf in leaves}
        doubt = "an InstanceNorm that tracks statistics has the same names"
        yield Candidate(owner, "torch", parts, fields=_extra(parts), doubt=doubt)


def keras(names: Collection[str]) -> Iterator[Candidate | Unclear]:
    """`P/moving_mean` beside `P/moving_variance`, as Keras 2, TensorFlow 1 and bnlayer name them."""
    clean = {re.sub(r"(:0|/\.ATTRIBUTES/VARIABLE_VALUE)$", "", name): name for name in names}
    for owner, leaves in _owners(clean, "moving_variance"):
        if "moving_mean" not in leaves:
            yield Unclear(owner, "it has a moving_variance and no moving_mean")
            continue
        parts = {role: clean[leaves[leaf]] for leaf, role in {**_KERAS, **_OURS}.items() if leaf in leaves}
        slim = re.search(r"(^|/)BatchNorm(_\d+)?$", owner) is not None
        fields: dict[str, Any] = _extra(parts)
        if "renorm_mean_weight" in leaves:  # TensorFlow 1's first renorm: averages still to be divided by a weight
            parts = {role: name for role, name in parts.items() if role not in ("renorm_mean", "renorm_stddev")}
            fields["renorm"] = Renorm()
        scoped = split(owner)[1] if owner else ""
        for scope in (owner, f"{owner}/{scoped}"):  # tf.contrib opens the layer's scope twice
            hidden, steps = (f"{scope}/moving_mean/{leaf}" for leaf in ("biased", "local_step"))
            if hidden in clean and steps in clean:
                parts.update(hidden_mean=clean[hidden], num_updates=clean[steps])
                fields["zero_debias"] = "mean"
        yield Candidate(owner, "contrib" if slim else "keras", parts, fields=fields)


def keras_numbered(names: Collection[str]) -> Iterator[Candidate | Unclear]:
    """Keras 3's `.../batch_normalization_7/vars/0` and on."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)/vars/(\d+)", name)
        if match and re.fullmatch(r"batch_normalization(_\d+)?", split(match[1])[1]):
            found.setdefault(match[1], {})[int(match[2])] = name
    for owner, numbered in found.items():
        tensors = [numbered[i] for i in sorted(numbered)]
        present = {2: _KERAS_ORDER[2:4], 4: _KERAS_ORDER[:4], 5: _KERAS_ORDER[2:], 7: _KERAS_ORDER}.get(len(tensors))
        if sorted(numbered) != list(range(len(tensors))) or present is None:
            yield Unclear(
                owner,
                f"it has {len(tensors)} variables, numbered and not named: of 3 or 6, gamma or beta is missing, and"
                " nothing says which. Read the .keras file, or give --names.",
                tuple(tensors),
            )
            continue
        yield Candidate(owner, "keras", dict(zip(present, tensors, strict=True)), fields=_extra(present))


def flax(names: Collection[str]) -> Iterator[Candidate | Unclear]:
    """Linen's `batch_stats/P/var` beside `params/P/scale`."""
    for name in names:
        match = re.fullmatch(r"(.*?\b|)batch_stats/(.+)/var", name)
        if match is None:
            continue
        before, owner = match[1], match[2]
        if f"{before}batch_stats/{owner}/mean" not in names:
            yield Unclear(before + owner, "it has a var and no mean")
            continue
        parts = {"moving_mean": f"{before}batch_stats/{owner}/mean", "moving_variance": name}
        for leaf, role in (("scale", "gamma"), ("bias", "beta")):
            if f"{before}params/{owner}/{leaf}" in names:
                parts[role] = f"{before}params/{owner}/{leaf}"
        yield Candidate(before + owner, "flax", parts)


def nnx(names: Collection[str]) -> Iterator[Candidate | Unclear]:
    """NNX's `P/{scale,bias,mean,var}`, each perhaps with `/value` behind it."""
    clean = {re.sub(r"[./](raw_)?value$", "", name): name for name in names if "batch_stats/" not in name}
    for owner, leaves in _owners(clean, "var"):
        if "mean" in leaves and "count" not in leaves:
            parts = {role: clean[leaves[leaf]] for leaf, role in _FLAX.items() if leaf in leaves}
            yield Candidate(owner, "flax", parts)


def haiku(names: Collection[str]) -> Iterator[Candidate | Unclear]:
    """Haiku's `state/M/~/var_ema/average` beside `params/M/scale`."""
    for name in names:
        match = re.fullmatch(r"(.*?)state/(.+)/~/var_ema/average", name)
        if match is None:
            continue
        before, owner = match[1], match[2]
        mean, variance, params = (
            f"{before}state/{owner}/~/mean_ema", f"{before}state/{owner}/~/var_ema", f"{before}params/{owner}",
        )  # fmt: skip
        wanted = {
            "gamma": f"{params}/scale",
            "beta": f"{params}/offset",
            "moving_mean": f"{mean}/average",
            "moving_variance": f"{variance}/average",
            "hidden_mean": f"{mean}/hidden",
            "hidden_variance": f"{variance}/hidden",
            "num_updates": f"{mean}/counter",
        }
        parts = {role: there for role, there in wanted.items() if there in names}
        if "moving_mean" not in parts:
            yield Unclear(owner, "it has a var_ema and no mean_ema")
            continue
        yield Candidate(before + owner, "haiku", parts, fields={"zero_debias": "all"})


def equinox(names: Collection[str]) -> Iterator[Candidate | Unclear]:
    """What `bnlayer_jax.equinox_template` calls the leaves of Equinox's BatchNorm, in either of its modes."""
    own = {"weight": "gamma", "bias": "beta"}
    for mode, counter, mean, variance in (
        ("batch", "batch_counter", "batch_hidden_mean", "batch_hidden_variance"),
        ("ema", "ema_first_time", "ema_mean", "ema_variance"),
    ):
        for owner, leaves in _owners(names, variance):
            if mean not in leaves or counter not in leaves:
                yield Unclear(owner, f"it has a {variance}, and lacks {mean} or {counter}")
                continue
            parts = {role: leaves[leaf] for leaf, role in own.items() if leaf in leaves}
            parts.update(moving_mean=leaves[mean], moving_variance=leaves[variance], num_updates=leaves[counter])
            if mode == "batch":
                parts.update(hidden_mean=leaves[mean], hidden_variance=leaves[variance])
                yield Candidate(owner, "equinox", parts, fields={"zero_debias": "all"}, convention="equinox.batch")
            else:
                doubt = "mode='ema' normalizes with the moving average in training too: only its eval is a batch norm's"
                fields = {"zero_debias": "none"}
                yield Candidate(owner, "equinox", parts, fields=fields, doubt=doubt, convention="equinox.ema")


RULES: Final[tuple[Rule, ...]] = (torch, keras, keras_numbered, flax, nnx, haiku, equinox)


def given(names: Collection[str], words: Mapping[str, str]) -> Iterator[Candidate | Unclear]:
    """Batch norms by a caller's own words: role to leaf, such as {"moving_mean": "pop_mean"}."""
    leaf = words["moving_variance"]
    for owner, leaves in _owners(names, leaf):
        parts = {role: leaves[word] for role, word in words.items() if word in leaves}
        if "moving_mean" in parts:
            yield Candidate(owner, "", parts)
        else:
            yield Unclear(owner, f"it has a {leaf} and no {words['moving_mean']}")


def averaged(names: Collection[str], ema: str) -> dict[str, str]:
    """Names without their ExponentialMovingAverage twins ("raw"), or with the twins' values under the names ("ema").

    Returns:
        The name to find things by, to the tensor's name in the file.
    """
    plain = {name: name for name in names if not name.endswith(_EMA)}
    if ema == "ema":
        plain.update({name: name + _EMA for name in plain if name + _EMA in names})
    return plain


def _owners(names: Collection[str], leaf: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every owner that has this leaf, with all its leaves by their own names; in the order of the names."""
    leaves: dict[str, dict[str, str]] = {}
    for name in names:
        owner, own = split(name)
        leaves.setdefault(owner, {})[own] = name
    yield from ((owner, found) for owner, found in leaves.items() if leaf in found)


def _extra(roles: Collection[str]) -> dict[str, Any]:
    """The spec fields that extra averages tell."""
    if "hidden_variance" in roles:
        return {"zero_debias": "all"}
    return {"zero_debias": "mean"} if "hidden_mean" in roles else {}
