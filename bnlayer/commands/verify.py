"""`bnlayer verify`: does a ported model compute what its source does, and if not, why?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import click

from bnlayer.errors import FileError

_ODD: Final = "2,65,65,3"
_EVEN: Final = "2,64,64,3"


@click.command(
    short_help="Whether a ported model computes what its source does, and if not, why.",
    epilog="\b\nExample:\n  bnlayer verify mine:keras_resnet mine:torch_resnet",
)
@click.argument("source", metavar="SRC_MODEL")
@click.argument("target", metavar="DST_MODEL")
@click.option("--input", "first", default=_ODD, show_default=True, metavar="N,...,C",
              help="An input's shape, batch first and channels last. Sizes of 2^k + 1 show the weights: there all"
              " paddings are alike.")  # fmt: skip
@click.option("--also-input", "second", default=_EVEN, show_default=True, metavar="N,...,C",
              help="Another one, whose even size shows the padding; '' for none.")  # fmt: skip
@click.option("--train-steps", type=click.IntRange(min=0), default=3, show_default=True,
              help="Forward passes in training mode, whose moving statistics are compared.")  # fmt: skip
@click.option("--map", "rules", type=click.Path(path_type=Path), metavar="RULES.toml",
              help="Which layer is which, where names and shapes do not tell; as of `bnlayer port`.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    source: str,
    target: str,
    first: str,
    second: str,
    train_steps: int,
    rules: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run two live models and compare them, layer by layer; name what is wrong with the second.

    Models are given as package.module:factory, a function without arguments that returns one.

    \b
      bnlayer verify mine:keras_resnet mine:torch_resnet
      bnlayer verify mine:source mine:target --input 2,129,129,3 --also-input "" --json

    \b
    Exit codes: 0 they compute the same; 1 they do not; 2 usage; 3 they cannot be compared.
    """
    from bnlayer.commands.factories import made, shape_of
    from bnlayer.porting.models import read
    from bnlayer.porting.planning import plan
    from bnlayer.porting.rules import Rules
    from bnlayer.porting.verification import verify

    mine, theirs = made(source, "SRC_MODEL"), made(target, "DST_MODEL")
    try:
        given = None if rules is None else Rules.read(rules)
    except OSError as error:
        raise FileError(f"{rules}: {error.strerror or error}.") from error
    planned = None if given is None else plan(read(mine), read(theirs), given=given)

    def progress(what: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"{what} ...", err=True)

    shapes = [shape_of(first, "--input"), *([shape_of(second, "--also-input")] if second else [])]
    found = verify(mine, theirs, shapes=shapes, train_steps=train_steps, plan=planned, seed=seed, progress=progress)
    click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else str(found))
    sys.exit(0 if found.ok else 1)
