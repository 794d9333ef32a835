"""What commands name as `package.module:factory`: the user's own code, imported and called."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click


def made(text: str, option: str) -> Any:
    """What the factory of this name returns; modules in the working directory are found too.

    Args:
        text: such as "models.resnet:build".
        option: the command's, for the message.

    Raises:
        click.BadParameter: there is no such module or function.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise click.BadParameter(f"expected package.module:factory; got {text!r}.", param_hint=option)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise click.BadParameter(f"{text!r} cannot be loaded: {error}.", param_hint=option) from error
    return found() if callable(found) else found


def shape_of(text: str, option: str) -> tuple[int, ...]:
    """The shape that a word like 2,65,65,3 says.

    Raises:
        click.BadParameter: it is none.
    """
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise click.BadParameter(f"expected batch,...,channels such as 2,65,65,3; got {text!r}.", param_hint=option)
    return shape
