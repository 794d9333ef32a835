"""`bnlayer inspect`: what batch norms are in a file, how far it tells what they are, and what is wrong with them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import click

from bnlayer.errors import CheckpointError

_SHOWN: Final = 20  # findings of one kind, and rows of the table, before the rest is counted
_TOLD: Final = ("epsilon", "decay", "moving_variance_estimator")


def _names(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, str] | None:
    if value is None:
        return None
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(key.strip() and sign and word.strip() for key, sign, word in pairs):
        raise click.BadParameter(f"expected gamma=scale,moving_mean=pop_mean and so on; got {value!r}.")
    return {key.strip(): word.strip() for key, _, word in pairs}


@click.command(
    short_help="What batch norms are in a checkpoint, and what is wrong with them.",
    epilog="\b\nExample:\n  bnlayer inspect resnet.pth",
)
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--key", metavar="NAME", help="Which of several models in the file, such as model_ema.")
@click.option("--ema", type=click.Choice(["raw", "ema"]), default="raw", show_default=True,
              help="Of TensorFlow's twins: the variables, or their moving averages.")  # fmt: skip
@click.option("--names", callback=_names, metavar="ROLE=WORD,...",
              help="The file's own words for hand-written layers: gamma=scale,beta=offset,moving_mean=pop_mean,"
              "moving_variance=pop_var.")  # fmt: skip
@click.option("--template", type=click.Path(path_type=Path), metavar="FILE",
              help="For a file without names (.eqx): a checkpoint with the names, shapes and order.")  # fmt: skip
@click.option("--module-stubs", is_flag=True,
              help="Read a whole pickled torch module: settings are taken as data, none of its code runs.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    file: Path,
    key: str | None,
    ema: Literal["raw", "ema"],
    names: dict[str, str] | None,
    template: Path | None,
    module_stubs: bool,
    as_json: bool,
) -> None:
    """Show the batch norms of a checkpoint FILE and diagnose them; no framework is needed, and nothing in it is run.

    \b
    Formats, told by content: torch (.pt, .pth, old and new, whole modules), safetensors,
    Keras (.keras, .weights.h5, .h5), TensorFlow (.index, SavedModel), Flax (msgpack),
    Orbax, Haiku (pickle), Equinox (.eqx), ONNX, npz.

    \b
      bnlayer inspect resnet50.weights.h5
      bnlayer inspect training.pt --key model_ema
      bnlayer inspect old.ckpt.index --ema ema --json

    \b
    Exit codes: 0 nothing to report but warnings and notes; 1 an error was diagnosed; 2 usage;
    3 the file cannot be read.
    """
    from bnlayer import checkpoint
    from bnlayer.checkpoint.batch_norms import find
    from bnlayer.diagnostics import diagnose

    like = None if template is None else checkpoint.open(template)
    try:
        opened = checkpoint.open(file, key=key, module_stubs=module_stubs, template=like)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}.") from error
    found = find(opened, names=names, ema=ema)
    diagnoses = diagnose(found.batch_norms, opened)
    document = _document(opened, found, diagnoses)
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _show(document)
    sys.exit(1 if any(d.severity == "error" for d in diagnoses) else 0)


def _document(opened: Any, found: Any, diagnoses: Sequence[Any]) -> dict[str, Any]:
    files = [opened.path] if opened.path.is_file() else sorted(opened.path.parent.glob(f"{opened.path.name}*"))
    inside = [p for path in files for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()]
    return {
        "format": opened.format,
        "size": sum(path.stat().st_size for path in inside),
        "tensors": len(opened),
        "order_is_meaningful": opened.order_is_meaningful,
        "batch_norms": [
            {
                "name": one.name,
                "owner": one.owner,
                "num_features": one.num_features,
                "present": list(one.parts),
                "missing": list(one.missing),
                "tensors": dict(one.parts),
                "spec": one.spec.to_dict(),
                "sources": dict(one.sources),
            }
            for one in found.batch_norms
        ],
        "ambiguous": [{"name": one.name, "reason": one.reason} for one in found.ambiguous],
        "diagnoses": [
            {"layer": d.layer, "code": d.code, "severity": d.severity, "message": d.message, "remedy": d.remedy}
            for d in diagnoses
        ],
    }


def _show(document: Mapping[str, Any]) -> None:
    from .tables import show

    batch_norms = document["batch_norms"]
    order = (
        "in the model's order" if document["order_is_meaningful"] else "in an order that says nothing of the model's"
    )
    title = f"{document['format']}: {_size(document['size'])}, {document['tensors']} tensors {order}"
    if batch_norms:
        rows: list[tuple[str, ...]] = [_row(one) for one in batch_norms]
        same = {row[3:] for row in rows}
        channels = sum(one["num_features"] for one in batch_norms)
        note = f"{len(batch_norms)} batch norm{'s' if len(batch_norms) > 1 else ''}, {channels} channels."
        if any("?" in cell for row in rows for cell in row):
            note += " A value with ? is not in the file: it is the framework's default, assumed."
        if len(rows) > 2 * _SHOWN:
            left = len(rows) - 2 * _SHOWN
            rows = [*rows[:_SHOWN], ("...", f"{left} more", *[""] * (len(rows[0]) - 2)), *rows[-_SHOWN:]]
        columns: tuple[str, ...] = ("batch norm", "channels", "lacks", *_TOLD)
        if len(same) == 1 and len(rows) > 1:
            note += " All: " + ", ".join(f"{n} {v}" for n, v in zip(_TOLD, next(iter(same)), strict=True)) + "."
            rows, columns = [row[:3] for row in rows], columns[:3]
        show(title, columns, rows, note=note)
    else:
        click.echo(f"{title}\n\nNo batch norm was found. Of hand-written layers say the words: --names (see --help).")
    for one in document["ambiguous"]:
        click.echo(f"\nUNCLEAR {one['name']}: {one['reason']}")
    _show_diagnoses(document["diagnoses"])


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    told = [f"{one['spec'][name]}{'' if one['sources'][name] != 'assumed' else '?'}" for name in _TOLD]
    kind = "?" if one["sources"]["kind"] == "assumed" else ""
    return (f"{one['name'] or '(the root)'}{kind}", str(one["num_features"]), ", ".join(one["missing"]), *told)


def _show_diagnoses(diagnoses: Sequence[Mapping[str, str]]) -> None:
    """Each kind once with its remedy, and the layers that have it."""
    seen: Counter[str] = Counter()
    for d in diagnoses:
        seen[d["code"]] += 1
        if seen[d["code"]] > _SHOWN:
            continue
        color = {"error": "red", "warning": "yellow"}.get(d["severity"])
        where = f" {d['layer']}" if d["layer"] else ""
        click.echo(f"\n{click.style(d['severity'].upper(), fg=color, bold=True)}{where} ({d['code']}): {d['message']}")
        if seen[d["code"]] == 1:
            click.echo(f"  What to do: {d['remedy']}")
    for code, count in seen.items():
        if count > _SHOWN:
            click.echo(f"\n... and {count - _SHOWN} more of {code}; --json has them all")
    counts = Counter(d["severity"] for d in diagnoses)
    parts = [f"{counts[s]} {s}{'s' if counts[s] != 1 else ''}" for s in ("error", "warning", "note") if counts[s]]
    click.echo(f"\n{', '.join(parts) or 'Nothing to report'}.")


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
