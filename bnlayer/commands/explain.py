"""`bnlayer explain`: how frameworks name, default and mean the same things differently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from .facts import FACTS
from .tables import show

if TYPE_CHECKING:
    from bnlayer.dialects import Dialect

_COLUMNS: Final = 3  # dialects side by side in 100 columns; more are grouped by what they share

# Row key (in JSON) to its head (for people), in the order of the table.
ROWS: Final[dict[str, str]] = {
    "layer": "layer",
    "epsilon": "epsilon",
    "decay": "momentum",
    "weight_on": "momentum weighs",
    "estimator": "moving variance",
    "zero_debias": "zero-debiased",
    "bare_call": "call without flag",
    "frozen": "frozen statistics",
    "untrained_eval": "eval, untrained",
    "axis": "channel axis",
    "gamma": "has gamma",
    "beta": "has beta",
    "arrays": "arrays",
    "variance": "batch variance",
    "half_output": "float16 gives",
    "single_value": "1 value/channel",
    "empty_batch": "empty batch",
    "track_moving_stats": "keeps averages",
    "renorm": "renorm",
    "virtual_batch_size": "ghost batches",
    "synchronized": "synchronized",
    "dtypes": "parameter dtype",
}
_WORDS: Final = {"all": "mean and variance"}
_FIELDS: Final = {"gamma": "scale", "beta": "center", "dtypes": "param_dtype"}


def description(dialect: Dialect) -> dict[str, str]:
    """Every row of one dialect: its arguments from the dialect's table, its behavior from the facts."""
    facts = vars(FACTS[dialect.name])
    rows = {}
    for row in ROWS:
        if row == "layer":
            rows[row] = dialect.title
        elif row in facts:
            rows[row] = facts[row]
        elif row == "synchronized" and row in dialect.hints:  # said by a class, or within an argument
            rows[row] = dialect.hints[row]
        else:
            rows[row] = _said(dialect, _FIELDS.get(row, row))
    return rows


def _said(dialect: Dialect, field: str) -> str:
    """How the dialect says a spec field: `argument = default`, or what is always so."""
    from bnlayer.words import REQUIRED

    for word in dialect.words:
        if field in word.fields:
            return ", ".join(
                f"{name}, required" if default is REQUIRED else f"{name} = {default!r}"
                for name, default in word.arguments.items()
            )
    return _always(dialect.fixed[field])


def _always(value: Any) -> str:
    if value is None or value is False or value == "none":
        return "not available"
    return "always" if value is True else f"always {_WORDS.get(value, value)}"


def differing(described: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The rows on which the dialects are not all the same."""
    return [row for row in ROWS if len({rows[row] for rows in described.values()}) > 1]


@click.command(
    short_help="How frameworks name, default and mean things differently.",
    epilog="\b\nExample:\n  bnlayer explain torch keras",
)
@click.argument("dialects", nargs=-1, type=click.Choice(list(FACTS)), metavar="[DIALECT]...")
@click.option("--all", "every", is_flag=True, help="Show also the rows on which they agree.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every row, and which of them differ.")
def command(dialects: tuple[str, ...], every: bool, as_json: bool) -> None:
    """Explain how the batch norms of frameworks differ in names, defaults and meaning.

    Two or more DIALECTs are compared, one is described, and without any they are listed: torch, keras (Keras 3),
    tf_keras (Keras 2), tf_layers (tf.compat.v1.layers), contrib (tf-slim), flax, haiku, equinox, onnx.
    """
    from bnlayer.dialects import DIALECTS  # here: `bnlayer --help` does without

    names = list(dict.fromkeys(dialects))
    described = {name: description(DIALECTS[name]) for name in names or DIALECTS}
    if as_json:
        differ = differing(described) if len(described) > 1 else []
        click.echo(json.dumps({"dialects": described, "differ": differ}, indent=2, ensure_ascii=False))
    elif not names:
        _list(described)
    elif len(names) == 1:
        _describe(names[0], described[names[0]], list(DIALECTS[names[0]].defaults))
    else:
        _compare(described, list(ROWS) if every else differing(described))


def _list(described: Mapping[str, Mapping[str, str]]) -> None:
    show(
        "The dialects that bnlayer speaks",
        ("dialect", "library", "epsilon", "momentum", "moving variance"),
        [
            (name, FACTS[name].library, rows["epsilon"], rows["decay"], rows["estimator"])
            for name, rows in described.items()
        ],
        note="Compare two: bnlayer explain torch keras. Describe one: bnlayer explain torch.",
    )


def _describe(name: str, rows: Mapping[str, str], arguments: list[str]) -> None:
    show(
        f"{name}: batch normalization in {FACTS[name].library}",
        ("", name),
        [(head, rows[row]) for row, head in ROWS.items()],
        note=f"Its arguments: {', '.join(arguments)}.",
    )


def _compare(described: Mapping[str, Mapping[str, str]], rows: list[str]) -> None:
    names = list(described)
    title = f"How batch normalization differs: {', '.join(names)}"
    agreed = len(ROWS) - len(rows)
    note = f"{agreed} more rows are the same for all; --all shows them." if agreed else ""
    if len(names) <= _COLUMNS:
        table = [(ROWS[row], *(described[name][row] for name in names)) for row in rows]
        show(title, ("", *names), table, note=note)
        return
    grouped: list[tuple[str, str, str]] = []
    for row in rows:
        sharing: dict[str, list[str]] = {}
        for name in names:
            sharing.setdefault(described[name][row], []).append(name)
        heads = [ROWS[row], *[""] * (len(sharing) - 1)]
        grouped += [(head, ", ".join(who), what) for head, (what, who) in zip(heads, sharing.items(), strict=True)]
    show(title, ("", "dialects", "say"), grouped, note=note)
