"""docs/frameworks.md: what each framework's own batch norm does, from the results of `bnlayer conform --native --json`.

    python -m bnlayer_conformance.frameworks RESULTS.json... --write docs/frameworks.md

Several files are several processes' results: Keras runs on one framework a process.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, Final

import click

from bnlayer.errors import FileError

from . import SUITE, metamorphic, vector
from .deviations import KINDS, Deviation

_REPRODUCE: Final = """
```console
pip install 'bnlayer[conformance]'   # and the frameworks to be judged
KERAS_BACKEND=tensorflow bnlayer conform --native --json native.json
KERAS_BACKEND=jax bnlayer conform --backend keras.layers --json keras-jax.json
KERAS_BACKEND=torch bnlayer conform --backend keras.layers --json keras-torch.json
python -m bnlayer_conformance.frameworks native.json keras-jax.json keras-torch.json --write docs/frameworks.md
```

One vector alone: `bnlayer conform --backend torch.nn --vectors "unbiased/empty-rows"`.
"""


@dataclass(frozen=True)
class Topic:
    """A row of the table: vectors by globs, and which of their observables count."""

    name: str
    vectors: str
    observables: str = "*"

    def about(self, vector_id: str) -> bool:
        """Whether this vector belongs to the row."""
        return _matches(vector_id, self.vectors)


TOPICS: Final = (
    Topic("training and eval, ordinary data",
          "axes/* estimators/* modes/* parameters/* scenarios/* unbiased/ordinary-* unbiased/no-* unbiased/biased-rows"
          " unbiased/biased-image unbiased/eval-far-*"),
    Topic("moving averages", "moving_average/* unbiased/decay-* unbiased/cumulative-* unbiased/steps-*"),
    Topic("variance at a large mean", "numerics/mean-* numerics/alternating unbiased/mean-* unbiased/biased-mean-*"),
    Topic("small, constant and huge values",
          "epsilon/* numerics/constant* numerics/tiny-* numerics/huge-* numerics/spread-* unbiased/small-variance-*"
          " unbiased/constant-* unbiased/large-variance-* unbiased/biased-eval-small-variance"),
    Topic("gradients", "gradients/* unbiased/one-hot-* unbiased/large-dy-*", "dx, dgamma, dbeta, error"),
    Topic("second-order gradients", "second_order/* unbiased/*second-order-*", "hvp, error"),
    Topic("empty batch", "degenerate/empty-* unbiased/empty-*"),
    Topic("one value per channel", "degenerate/one-value-* unbiased/one-value-* refusals/*one-value*"),
    Topic("NaN and infinities", "nonfinite/* unbiased/nan-* unbiased/infinity-*"),
    Topic("masks and weights", "weights/* numerics/weighted-*"),
    Topic("half precision", "dtypes/*float16* unbiased/*float16*"),
    Topic("float64", "dtypes/*float64* unbiased/float64-* numerics/*float64"),
    Topic("memory layouts", "layouts/*"),
    Topic("zero-debiased averages", "zero_debias/*"),
    Topic("wrong input refused", "refusals/* unbiased/wrong-* unbiased/rank-1"),
)  # fmt: skip


_LETTERS: Final = dict(zip(KINDS, "DAGETR", strict=True))


@dataclass
class Native:
    """One native layer as its runs found it, from the JSON."""

    label: str
    version: str
    lacks: dict[str, str]
    deviations: list[Deviation]
    results: list[dict[str, Any]] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        """How many results have each status."""
        return Counter(r["status"] for r in self.results)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
                metavar="RESULTS.json...")  # fmt: skip
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Write the page to a file.")
def main(files: tuple[Path, ...], write: Path | None) -> None:
    """Make docs/frameworks.md of the results of `bnlayer conform --native --json`.

    Exit code 3, and nothing is written: a file is not such a run, of this suite and whole, or a native layer's failure
    is explained by no line of its deviations.
    """
    try:
        text = page(collect(files))
    except FileError as error:
        click.echo(str(error), err=True)
        sys.exit(3)
    if write is None:
        click.echo(text, nl=False)
    else:
        write.write_text(text, "utf-8")


def collect(files: Iterable[Path]) -> list[Native]:
    """The native layers of several runs, in the order of the files.

    Raises:
        FileError: a file is not a whole run of this suite, a layer is in two of them, or has an unexplained failure.
    """
    found: dict[tuple[str, str], Native] = {}
    for file in files:
        document = _read(file)
        for name, target in document["targets"].items():
            if not target["native"] or target["status"] != "ready":
                continue
            if (name, target["version"]) in found:
                raise FileError(f"{file}: {name} {target['version']} is in another file too; give one of the two.")
            results = [r for r in document["results"] if r["target"] == name]
            _refuse_unexplained(file, name, results)
            lines = [Deviation(**line) for line in target["deviations"]]
            found[name, target["version"]] = Native(name, target["version"], target["lacks"], lines, results)
    if not found:
        raise FileError("no native layer ran in any of the files; run: bnlayer conform --native --json FILE")
    names = Counter(name for name, _ in found)
    for (name, version), native in found.items():
        if names[name] > 1:  # the same layers on several engines, which their versions name in parentheses
            native.label = f"{name} on {version.partition('(')[2].rstrip(')') or version}"
    return list(found.values())


def page(natives: Sequence[Native]) -> str:
    """docs/frameworks.md."""
    lines = [
        "# What each framework's own batch norm does",
        "",
        "Written by `python -m bnlayer_conformance.frameworks` from runs of the conformance vectors (suite"
        f" {SUITE}, {len(_every())} vectors and checks); nobody edits it by hand. Every framework's own layer gets the"
        " same inputs; what comes out is compared with exact results ([how](conformance.md)). The layers run as they"
        " are: nothing is added, and nothing is worked around.",
        "",
        "A vector that a layer has no words for (masks, an estimator, another axis) is not held against it. What"
        " differs is a deviation, of one of these kinds:",
        "",
        *(f"* **{kind}** ({_LETTERS[kind]}): {meaning}" for kind, meaning in KINDS.items()),
        "",
        "## At a glance",
        "",
        "✓: every vector of the row that the layer has words for passes. **2/8 A**: of 8 such vectors, 2 deviate, in"
        " accuracy. –: it has no words for any.",
        "",
        *_matrix(natives),
        "",
        "## Reproduce",
        "",
        _REPRODUCE.strip(),
    ]
    for native in natives:
        lines += ["", *_section(native)]
    return "\n".join(lines) + "\n"


def linked(text: str) -> str:
    """Text of a deviations file as Markdown, where addresses and `owner/repository#number` lead somewhere."""
    escaped = re.sub(r"([*<>|]|__)", lambda found: "".join(f"\\{sign}" for sign in found[0]), text)
    escaped = re.sub(r"(https?://[^\s,;)]+)", r"<\1>", escaped)
    return re.sub(r"(?<![\w/])([\w.-]+/[\w.-]+)#(\d+)", r"[\1#\2](https://github.com/\1/issues/\2)", escaped)


def _matrix(natives: Sequence[Native]) -> list[str]:
    labels = (native.label.replace(" on ", "<br>on ") for native in natives)
    rows = [_row("", *labels), _row("---", *("---" for _ in natives))]
    rows += [_row(topic.name, *(_cell(topic, native) for native in natives)) for topic in TOPICS]
    totals = (f"{n.counts()['deviation']}/{_said(n)}" for n in natives)
    return [*rows, _row("everything", *totals)]


def _cell(topic: Topic, native: Native) -> str:
    if topic.observables != "*" and all(_lacking(native, name) for name in topic.observables.split(", ")):
        return "–"
    said = [r for r in native.results if topic.about(r["vector"]) and r["status"] != "unsupported"]
    kinds: set[str] = set()
    deviating = 0
    for result in said:
        counted = [f for f in result["failures"] if _matches(f["observable"], topic.observables)]
        kinds.update({native.deviations[f["line"]].kind for f in counted})
        deviating += bool(counted)
    if not said:
        return "–"
    letters = "".join(_LETTERS[kind] for kind in KINDS if kind in kinds)
    return f"**{deviating}/{len(said)} {letters}**" if deviating else "✓"


def _lacking(native: Native, observable: str) -> bool:
    """Whether an observable is never compared; "error" says nothing about that."""
    return observable == "error" or observable in native.lacks or (observable[0] == "d" and "dx" in native.lacks) or (
        observable == "hvp" and "dx" in native.lacks
    )  # fmt: skip


def _section(native: Native) -> list[str]:
    counts = native.counts()
    lines = [
        f"## {native.label}",
        "",
        f"Version {native.version}. It has words for {_said(native)} of {len(native.results)} vectors and checks:"
        f" {counts['pass']} pass, {counts['deviation']} deviate.",
        "",
    ]
    if native.deviations:
        lines += [_row("kind", "what", "observables", "largest", "vectors", "reference"), _row(*["---"] * 6)]
        rows: dict[tuple[str, str, str], list[int]] = {}  # lines about several groups of vectors may say the same
        for number, line in enumerate(native.deviations):
            rows.setdefault((line.kind, line.reason, line.reference), []).append(number)
        order = sorted(rows, key=lambda row: list(KINDS).index(row[0]))
        lines += [_deviation_row(native, *row, rows[row]) for row in order]
    else:
        lines.append("No deviation.")
    lacks = [f"* `{name}`: {linked(why)}" for name, why in native.lacks.items()]
    reasons = Counter(r["reason"] for r in native.results if r["status"] == "unsupported")
    lacks += [f"* {_named(reason)} ({count} {_vectors(count)})" for reason, count in reasons.most_common()]
    if lacks:
        lines += ["", "It has no words for:", "", *lacks]
    return lines


def _deviation_row(native: Native, kind: str, reason: str, reference: str, numbers: Sequence[int]) -> str:
    failures = [(r["vector"], f) for r in native.results for f in r["failures"] if f["line"] in numbers]
    vectors = str(len({name for name, _ in failures}))
    observables = ", ".join(f"`{name}`" for name in dict.fromkeys(f["observable"] for _, f in failures))
    where = "" if reference == "-" else linked(reference)
    return _row(kind, linked(reason), observables, _largest(failures), vectors, where)


def _largest(failures: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The worst failure: what no number says comes first, then the error in tolerances.

    float64's are left out where there are others: their tolerances are so small that the rest would never be shown.
    """
    if not failures:
        return "did not run"
    failures = [at for at in failures if at[0] not in _in_float64()] or failures
    name, worst = max(failures, key=lambda at: inf if at[1]["ratio"] is None else at[1]["ratio"])
    if worst["short"]:
        size = linked(worst["short"])
    elif worst["ratio"] is None:  # the tolerance was 0: the exact value was asked for
        size = f"{worst['error']:.3g}"
    else:
        size = f"{worst['error']:.3g}, {_times(worst['ratio'])} the tolerance"
    place = "" if worst["observable"] in ("error", "refusal") else f" in `{worst['observable']}`"
    return f"{size}{place} (`{name}`)"


def _times(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio < 100 else f"{ratio:,.0f}×".replace(",", " ") if ratio < 1e6 else f"{ratio:.0e}×"


def _named(reason: str) -> str:
    """The reason that `unsupported` gave, the field's name in front as code."""
    name, colon, why = reason.partition(": ")
    return f"`{name}`: {linked(why)}" if colon else linked(reason)


def _vectors(count: int) -> str:
    return "vector" if count == 1 else "vectors"


def _said(native: Native) -> int:
    return len(native.results) - native.counts()["unsupported"]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _matches(name: str, globs: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in re.split(r"[,\s]+", globs))


@cache
def _every() -> frozenset[str]:
    return frozenset(v.id for v in vector.load()) | frozenset(metamorphic.names())


@cache
def _in_float64() -> frozenset[str]:
    return frozenset(v.id for v in vector.load() if any(call.x.dtype == "float64" for s in v.steps for call in s.calls))


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text("utf-8"))
        suite, ran = document["suite"], {r["vector"] for r in document["results"]}
        native = [target["native"] for target in document["targets"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{file}: this is not what bnlayer conform --json writes ({error!r}).") from error
    if suite != SUITE or (any(native) and ran != _every()):
        raise FileError(f"{file}: this is not a run of all of suite {SUITE}; run without --vectors, as it is now.")
    return dict(document)


def _refuse_unexplained(file: Path, name: str, results: Sequence[dict[str, Any]]) -> None:
    bad = [r["vector"] for r in results if r["status"] in ("fail", "error")]
    if bad:
        raise FileError(
            f"{file}: {len(bad)} results of {name} are failures that its deviations do not explain, or stale lines"
            f" ({', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}). Complete the deviations file, and run again."
        )


if __name__ == "__main__":
    main()
