"""`bnlayer backends`: which backends are there, and what each does not support."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import click
import numpy as np

from bnlayer import registry
from bnlayer.contract import Backend, Call, Request
from bnlayer.errors import BackendUnavailable, SpecError
from bnlayer.spec import FLOAT_DTYPES, BatchNormSpec, Renorm
from bnlayer.state import numpy_dtype

from .tables import show


@dataclass(frozen=True)
class Feature:
    """Something that a backend may lack: what a spec says to ask for it, and what a call says.

    Attributes:
        spec: spec fields.
        dtype: of x.
        call: arguments of `Call`.
        request: arguments of `Request`.
    """

    spec: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    call: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


_ONES: Final = np.ones(2, np.float32)

FEATURES: Final[dict[str, Feature]] = {
    "axis=1": Feature(spec={"axis": 1}),
    "axis=-1": Feature(spec={"axis": -1}),
    "center=False": Feature(spec={"center": False}),
    "scale=False": Feature(spec={"scale": False}),
    "biased moving variance": Feature(spec={"moving_variance_estimator": "biased"}),
    "unbiased moving variance": Feature(spec={"moving_variance_estimator": "unbiased"}),
    "decay='cumulative'": Feature(spec={"decay": "cumulative"}),
    "zero_debias='none'": Feature(spec={"zero_debias": "none"}),
    "zero_debias='mean'": Feature(spec={"zero_debias": "mean"}),
    "zero_debias='all'": Feature(spec={"zero_debias": "all"}),
    "track_moving_stats=False": Feature(spec={"track_moving_stats": False}),
    "single_value='raise'": Feature(spec={"single_value": "raise"}),
    "single_value='allow'": Feature(spec={"single_value": "allow"}),
    "nonfinite='keep'": Feature(spec={"nonfinite": "keep"}),
    "renorm": Feature(spec={"renorm": Renorm(r_max=3.0, r_min=1 / 3, d_max=5.0)}),
    "virtual_batch_size": Feature(spec={"virtual_batch_size": 1}),
    "synchronized": Feature(spec={"synchronized": True}),
    "several replicas": Feature(spec={"synchronized": True}, request={"shards": (1, 1)}),
    "second order": Feature(call={"dy": np.ones((2, 3), np.float32), "direction": np.ones((2, 3), np.float32)}),
    "weights": Feature(call={"weights": _ONES}),
    "masks": Feature(call={"weights": _ONES > 0}),
    "adjustment": Feature(call={"adjustment": (np.ones(3, np.float32), np.zeros(3, np.float32))}),
    "update_stats=False": Feature(request={"update_stats": False}),
    "frozen_statistics": Feature(request={"frozen_statistics": True}),
    **{dtype: Feature(dtype=dtype) for dtype in FLOAT_DTYPES},
}

# A native layer may leave no choice here, so a feature is tried in every such surrounding.
_SURROUNDINGS: Final[dict[str, tuple[Any, ...]]] = {
    "axis": (1, -1),
    "moving_variance_estimator": ("biased", "unbiased"),
    "single_value": ("raise", "allow"),
    "zero_debias": ("none", "all"),
}


def missing(backend: Backend) -> dict[str, str]:
    """The features that the backend does not support, with its reason for each."""
    found = {}
    for name, feature in FEATURES.items():
        reasons = list(_reasons(backend, feature))
        if None not in reasons:
            told = [reason for reason in reasons if reason is not None]
            # A reason about the surrounding says less than one about the feature itself.
            asked = (name.split("=")[0], feature.dtype, *feature.spec, *feature.call, *feature.request)
            found[name] = next((reason for reason in told if any(word in reason for word in asked)), told[0])
    return found


def _reasons(backend: Backend, feature: Feature) -> Iterator[str | None]:
    # A layer may want its variables in x's dtype, or in float32 whatever x is.
    dtypes = dict.fromkeys(("float32", feature.dtype))
    for stored, *values in itertools.product(dtypes, *_SURROUNDINGS.values()):
        fields = {**dict(zip(_SURROUNDINGS, values, strict=True)), **feature.spec}
        fields |= {"param_dtype": stored, "stats_dtype": stored}
        try:
            spec = BatchNormSpec(3, **fields)
        except SpecError:
            continue  # the feature contradicts this surrounding, and not the backend
        x = np.zeros((2, 3), numpy_dtype(feature.dtype))
        request = Request((Call(x, **feature.call),), training=True, **feature.request)
        yield backend.unsupported(spec, request)


def describe(name: str, kind: str) -> dict[str, Any]:
    """One backend: its name, kind, version or None, status "ready" or "absent" with the reason, and what it lacks.

    Raises:
        UnknownBackend: there is no such backend.
    """
    try:
        backend = registry.backend(name)
        version = backend.version()
    except BackendUnavailable as error:
        return {"name": name, "kind": kind, "version": None, "status": "absent", "reason": str(error), "missing": {}}
    return {
        "name": name,
        "kind": kind,
        "version": version,
        "status": "ready",
        "reason": None,
        "missing": missing(backend),
    }


def registered() -> dict[str, str]:
    """Every registered backend, and whose it is: "ours", "native" (a framework's own layer) or "third party"."""
    kinds = {}
    for group, kind in ((registry.BACKENDS, "ours"), (registry.NATIVE, "native")):
        for name, entry in registry.known(group).items():
            kinds[name] = kind if registry.is_ours(entry) else "third party"
    return kinds


@click.command(
    short_help="Which backends are there, and what each does not support.",
    epilog="\b\nExample:\n  bnlayer backends",
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with a reason for all that is missing.")
def command(names: tuple[str, ...], as_json: bool) -> None:
    """List the backends: bnlayer's own, the frameworks' native layers, and third parties'.

    An absent one is listed with what to install. With NAMEs, only these, and with the reason for each thing that they
    do not support; a NAME may be package.module:ATTRIBUTE, which nobody needs to have registered.
    """
    kinds = registered()
    described = [describe(name, kinds.get(name, "not registered")) for name in dict.fromkeys(names or kinds)]
    if as_json:
        click.echo(json.dumps({"backends": described}, indent=2))
    elif names:
        for each in described:
            _show_reasons(each)
    else:
        show(
            "Backends",
            ("name", "kind", "version", "does not support"),
            [(b["name"], b["kind"], b["version"] or "ABSENT", b["reason"] or _listed(b["missing"])) for b in described],
            note="Why a backend lacks something: bnlayer backends NAME.",
        )


def _listed(lacking: dict[str, str]) -> str:
    return ", ".join(lacking) or "nothing is missing"


def _show_reasons(described: dict[str, Any]) -> None:
    title = f"{described['name']} ({described['kind']}), {described['version'] or 'ABSENT'}"
    if described["status"] == "absent":
        click.echo(f"{title}: {described['reason']}")
    elif described["missing"]:
        show(title, ("does not support", "because"), list(described["missing"].items()))
    else:
        click.echo(f"{title}: nothing is missing")
