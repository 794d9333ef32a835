"""`bnlayer inspect`: what batch norms are in a file, how far it tells what they are, and what is wrong with them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, Final, Literal

import click

from bnlayer.errors import CheckpointError

_SHOWN: Final = 20  # findings of one kind, and rows of the table, before the rest is counted
_TOLD: Final = ("epsilon", "decay", "moving_variance_estimator")
_HINT: Final = "If it has hand-written ones, give what it calls their tensors: --names (see --help)."
_HINTS: Final = {"equinox": "An Equinox file has no names: give a checkpoint that has them, --template (see --help)."}


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
              help="For hand-written layers: the words that the file has for gamma, moving_mean, ....")  # fmt: skip
@click.option("--template", type=click.Path(path_type=Path), metavar="FILE",
              help="For a file without names (.eqx): a checkpoint with the names, shapes and order.")  # fmt: skip
@click.option("--module-stubs", is_flag=True,
              help="Read a whole pickled torch module: settings are taken as data, none of its code runs.")  # fmt: skip
@click.option(
    "--json", "as_json", is_flag=True, help="Print everything as JSON: every layer, spec, source and finding."
)
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
      bnlayer inspect mine.npz --names gamma=scale,beta=offset,moving_mean=mu,moving_variance=var

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
    order = "in the model's order" if document["order_is_meaningful"] else "not in the model's order"
    title = f"{document['format']}: {_size(document['size'])}, {_count(document['tensors'], 'tensor')}, {order}"
    if batch_norms:
        columns, rows, note = _table(batch_norms)
        if len(rows) > 2 * _SHOWN:
            left = len(rows) - 2 * _SHOWN
            rows = [*rows[:_SHOWN], ("...", f"{left} more", *[""] * (len(columns) - 2)), *rows[-_SHOWN:]]
        show(title, columns, rows, note=note)
    else:
        click.echo(f"{title}\n\nNo batch norm was found. {_HINTS.get(document['format'], _HINT)}")
    for one in document["ambiguous"]:
        click.echo()
        _say("UNCLEAR", f" {one['name']}: {one['reason']}", color="yellow")
    _show_diagnoses(document["diagnoses"])


def _table(batch_norms: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Columns, rows, and what is said below: what is the same everywhere is said once."""
    told = [tuple(f"{b['spec'][n]}{'?' if b['sources'][n] == 'assumed' else ''}" for n in _TOLD) for b in batch_norms]
    unsure = [one["sources"]["kind"] == "assumed" for one in batch_norms]
    mixed = any(unsure) and not all(unsure)
    same = len(set(told)) == 1 and len(told) > 1
    lacking = any(one["missing"] for one in batch_norms)
    columns = ("batch norm", "channels", *(("lacks",) if lacking else ()), *(() if same else _TOLD))
    rows = [
        (
            f"{one['name'] or '(the root)'}{'?' if mixed and doubted else ''}",
            str(one["num_features"]),
            *((", ".join(one["missing"]),) if lacking else ()),
            *(() if same else values),
        )
        for one, doubted, values in zip(batch_norms, unsure, told, strict=True)
    ]
    notes = [
        f"{_count(len(rows), 'batch norm')}, {_count(sum(one['num_features'] for one in batch_norms), 'channel')}."
    ]
    if same:
        notes[0] += f" All: {', '.join(f'{n} {v}' for n, v in zip(_TOLD, told[0], strict=True))}."
    if any("?" in value for values in told for value in values):
        notes.append("A value with ? is not in the file: it is the framework's default, assumed.")
    if any(unsure):
        which = "One whose name has ?" if mixed else "Each"
        notes.append(f"{which} may be another kind of layer, such as an InstanceNorm, with tensors of the same names.")
    return columns, rows, "\n".join(notes)


def _show_diagnoses(diagnoses: Sequence[Mapping[str, str]]) -> None:
    """Each finding once with all the layers that have it, each kind's remedy once."""
    same: dict[tuple[str, str, str], list[str]] = {}
    remedies: dict[str, str] = {}
    for d in diagnoses:
        same.setdefault((d["severity"], d["code"], d["message"]), []).append(d["layer"])
    seen: Counter[str] = Counter()
    for (severity, code, message), layers in same.items():
        seen[code] += 1
        if seen[code] > _SHOWN:
            continue
        many = f", and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
        where = f" {', '.join(layers[:_SHOWN])}{many}" if any(layers) else ""
        click.echo()
        _say(
            severity.upper(), f"{where} ({code}): {message}", color={"error": "red", "warning": "yellow"}.get(severity)
        )
        remedy = next(d["remedy"] for d in diagnoses if d["code"] == code and d["message"] == message)
        if remedies.get(code) != remedy:
            remedies[code] = remedy
            _say("  What to do:", f" {remedy}")
    for code, count in seen.items():
        if count > _SHOWN:
            click.echo(f"\n... and {count - _SHOWN} more of {code}; --json has them all")
    counts = Counter(d["severity"] for d in diagnoses)
    parts = [_count(counts[severity], severity) for severity in ("error", "warning", "note") if counts[severity]]
    click.echo(f"\n{', '.join(parts) or 'Nothing to report'}.")


def _say(head: str, text: str, *, color: str | None = None) -> None:
    """A paragraph, wrapped at the table's width with its further lines indented; its head bold where it is colored."""
    from .tables import WIDTH

    width = min(WIDTH, get_terminal_size((WIDTH, 24)).columns)
    lines = wrap(head + text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    click.echo("\n".join(lines).replace(head, click.style(head, fg=color, bold=color is not None), 1))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
