"""`bnlayer port`: a checkpoint's weights into another framework's, and the proof that nothing went wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import click

from bnlayer.errors import CheckpointError, FileError, PortError

from .factories import made, shape_of

# What a format's names are, where there is no template to say it.
_DIALECT_OF: Final = {"torch": "torch", "safetensors": "torch", "keras.h5": "keras", "flax": "flax", "orbax": "flax",
                      "haiku": "haiku"}  # fmt: skip


@click.command(
    short_help="Port a checkpoint's weights to another framework, and prove it.",
    epilog="\b\nExample:\n  bnlayer port resnet.weights.h5 resnet.pt --template mine:torch_resnet",
)
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DST")
@click.option("--to", "format", metavar="FORMAT",
              help="DST's format (torch, safetensors, keras.h5, tensorflow, flax, orbax, npz); else its name says"
              " it.")  # fmt: skip
@click.option("--template", metavar="FILE|pkg.module:factory",
              help="What is wanted: a checkpoint with the names and shapes, or a function that returns a live model,"
              " which tells more.")  # fmt: skip
@click.option("--map", "rules", type=click.Path(path_type=Path), metavar="RULES.toml",
              help="Which layer is which, where names and shapes do not tell.")  # fmt: skip
@click.option("--only", type=click.Choice(["bn"]), help="Batch norms alone; the rest keeps the template's values.")
@click.option("--src-dialect", metavar="D",
              help="Whose layouts SRC has, where its names do not tell: torch, keras, flax, haiku or"
              " equinox.")  # fmt: skip
@click.option("--src-epsilon", type=float, metavar="X", help="SRC's epsilon, where the file does not say.")
@click.option("--src-momentum", type=float, metavar="X",
              help="SRC's momentum in its framework's own sense, where the file does not say.")  # fmt: skip
@click.option("--epsilon", type=click.Choice(["carry", "shift"]), default="carry", show_default=True,
              help="carry: written to DST.bnlayer.json, for load_into. shift: the template's stays, and the variances"
              " make up for it, exactly in eval mode alone.")  # fmt: skip
@click.option("--ema", type=click.Choice(["raw", "ema"]), default="raw", show_default=True,
              help="Of TensorFlow's twins: the variables, or their moving averages.")  # fmt: skip
@click.option("--key", metavar="NAME", help="Which of several models in SRC, such as model_ema.")
@click.option("--module-stubs", is_flag=True, help="Read a whole pickled torch module; none of its code runs.")
@click.option("--allow-partial", is_flag=True, help="Write what can be ported, and list the rest: exit code 1.")
@click.option("--dry-run", is_flag=True, help="Plan and report; write nothing.")
@click.option("--force", is_flag=True, help="Replace DST if it is there.")
@click.option("--report", type=click.Path(path_type=Path), metavar="OUT.json", help="Write the report as JSON too.")
@click.option("--verify-src", metavar="pkg.module:factory",
              help="A function that returns a live model of SRC: it is filled from SRC and run, and tells epsilon and"
              " momentum, which most files do not.")  # fmt: skip
@click.option("--verify-dst", metavar="pkg.module:factory", help="The same for DST, usually --template's.")
@click.option("--input", "first", default="2,65,65,3", show_default=True, metavar="N,...,C",
              help="Shape of the input for both; sizes of 2^k + 1 show the weights.")  # fmt: skip
@click.option("--also-input", "second", default="2,64,64,3", show_default=True, metavar="N,...,C",
              help="Another, whose even sizes show the padding; '' for none.")  # fmt: skip
@click.option("--train-steps", type=click.IntRange(min=0), default=3, show_default=True,
              help="Forward passes in training mode, whose moving statistics are compared.")  # fmt: skip
def command(**options: Any) -> None:
    """Port the weights of a checkpoint SRC to another framework: write DST, for the model that the template shows.

    Layers are matched by shapes, names and order; what these do not decide is refused and listed, never guessed.
    Batch norms arrive with statistics, epsilon and momentum: what DST cannot hold is written to DST.bnlayer.json, and
    bnlayer.porting.load_into(model, DST) loads both. With --verify-src and --verify-dst both models are run and
    compared, and nothing is written unless they agree.

    \b
      bnlayer port net.weights.h5 net.pt --template mine:torch_net --dry-run
      bnlayer port net.weights.h5 net.pt --template mine:torch_net \\
          --verify-src mine:keras_net --verify-dst mine:torch_net
      bnlayer port old.pt new.msgpack --template like.msgpack --map rules.toml

    \b
    Exit codes: 0 exact or converted; 1 something was lost, as allowed; 2 usage;
    3 refused, nothing written.
    """
    asked = _Asked(**options)
    sys.exit(_port(asked, _progress()))


@dataclass(frozen=True)
class _Asked:
    """The command line."""

    source: Path
    destination: Path
    format: str | None
    template: str | None
    rules: Path | None
    only: str | None
    src_dialect: str | None
    src_epsilon: float | None
    src_momentum: float | None
    epsilon: Literal["carry", "shift"]
    ema: str
    key: str | None
    module_stubs: bool
    allow_partial: bool
    dry_run: bool
    force: bool
    report: Path | None
    verify_src: str | None
    verify_dst: str | None
    first: str
    second: str
    train_steps: int

    def __post_init__(self) -> None:
        if (self.verify_src is None) != (self.verify_dst is None):
            raise click.UsageError("--verify-src and --verify-dst go together.")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the inputs for verification."""
        return [shape_of(self.first, "--input"), *([shape_of(self.second, "--also-input")] if self.second else [])]


def _progress() -> Callable[[str], None]:
    return (lambda what: click.echo(f"{what} ...", err=True)) if sys.stderr.isatty() else (lambda _: None)


def _port(asked: _Asked, progress: Callable[[str], None]) -> int:
    from bnlayer.checkpoint.formats import named
    from bnlayer.porting import Rules, plan, verify
    from bnlayer.porting.models import filled
    from bnlayer.porting.sidecars import sidecar, write_sidecar
    from bnlayer.porting.swaps import try_swaps

    if not asked.dry_run:
        named(asked.destination, asked.format)
        for path in (asked.destination, sidecar(asked.destination)):
            if path.exists() and not asked.force:
                raise CheckpointError(f"{path} exists; --force replaces it.")
    progress("reading")
    template, theirs = _template(asked)
    source = _opened(asked.source, key=asked.key, module_stubs=asked.module_stubs)
    mine = None
    if asked.verify_src is not None and asked.verify_dst is not None:
        mine, source = filled(made(asked.verify_src, "--verify-src"), source, _source_options(asked, source))
        if theirs is None or asked.template != asked.verify_dst:
            theirs = made(asked.verify_dst, "--verify-dst")
    if template is None:
        template = _alike(asked, source)
    try:
        rules = None if asked.rules is None else Rules.read(asked.rules)
    except OSError as error:
        raise FileError(f"{asked.rules}: {error.strerror or error}.") from error
    options = {} if mine is not None else _source_options(asked, source)

    def planned(pairs: dict[str, str] | None = None) -> Any:
        return plan(source, template, given=rules, pairs=pairs, only_batch_norms=asked.only == "bn",
                    epsilon=asked.epsilon, source_options=options)  # fmt: skip

    progress("matching")
    made_plan = planned()
    swaps = []
    if mine is not None and made_plan.matching.ambiguous:
        progress("deciding between layers of equal shape by running both models")
        swaps = try_swaps(made_plan, mine, theirs, asked.shapes[0])
        if swaps:
            made_plan = planned({swap.source: swap.target for swap in swaps})
    report = made_plan.report
    for swap in swaps:
        report.add("converted", f"chosen by a run: error {swap.before:.2g} before, {swap.after:.2g} after,"
                   f" {swap.next_best:.2g} at the next best", f"{swap.source} -> {swap.target}")  # fmt: skip
    if made_plan.refused and not asked.allow_partial:
        _tell(asked, report)
        raise PortError(f"{asked.source}: {len(report.refusals)} things stand in the way; nothing was written.")
    progress("converting")
    result = made_plan.apply(allow_partial=asked.allow_partial)
    if mine is not None:
        theirs = _with(theirs, result, made_plan)
        found = verify(mine, theirs, shapes=asked.shapes, train_steps=asked.train_steps, plan=made_plan,
                       progress=progress)  # fmt: skip
        report.verification = found.to_dict()
        if not found.ok and not asked.allow_partial:
            _tell(asked, report)
            raise PortError(f"{asked.source}: the port does not compute what its source does; nothing was written.")
    if not asked.dry_run:
        progress("writing")
        result.save(asked.destination, asked.format, force=asked.force)
        write_sidecar(asked.destination, made_plan.specs(), force=asked.force)
    _tell(asked, report)
    failed = bool(report.verification) and not report.verification["ok"]
    return 1 if report.losses or failed else 0


def _opened(path: Path, **options: Any) -> Any:
    from bnlayer import checkpoint

    try:
        return checkpoint.open(path, **options)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.") from error


def _template(asked: _Asked) -> tuple[Any, Any]:
    """The template's checkpoint, and the live model that it is of; None where there is none."""
    from bnlayer.porting import read

    if asked.template is None:
        return None, None
    if Path(asked.template).exists() or ":" not in asked.template:
        return _opened(Path(asked.template)), None
    model = made(asked.template, "--template")
    return read(model), model


def _alike(asked: _Asked, source: Any) -> Any:
    """The source as its own template, where the destination's format has the same names."""
    from bnlayer.checkpoint.formats import named
    from bnlayer.porting.units import dialect_of

    format = named(asked.destination, asked.format).name
    dialect = asked.src_dialect or dialect_of(source)
    if format != source.format and format != "npz" and _DIALECT_OF.get(format) != dialect:
        raise click.UsageError(
            f"a checkpoint in {dialect}'s names cannot become a {format} file without a --template that has the names"
            " there: a file of such a model, or package.module:factory."
        )
    return source


def _source_options(asked: _Asked, source: Any) -> dict[str, Any]:
    from bnlayer.porting.units import dialect_of

    dialect = asked.src_dialect or dialect_of(source)
    momentum = asked.src_momentum
    decay = None if momentum is None else 1 - momentum if dialect == "torch" else momentum
    return {"dialect": dialect, "ema": asked.ema, "epsilon": asked.src_epsilon, "decay": decay}


def _with(model: Any, result: Any, plan: Any) -> Any:
    """The live target with the port's tensors and settings."""
    from bnlayer.registry import adapter

    reach = adapter(model)
    return reach.write(reach.configure(model, plan.specs()), result)


def _tell(asked: _Asked, report: Any) -> None:
    click.echo(str(report))
    if asked.report is not None:
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        try:
            asked.report.write_text(text + "\n", "utf-8")
        except OSError as error:
            raise FileError(f"{asked.report}: {error.strerror or error}.") from error
