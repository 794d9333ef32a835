"""The corpus: files made by the real frameworks, once a session or before it (BNLAYER_CORPUS)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .corpus import KINDS

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind to folder; filled as kinds are asked for, each made in a process of its own."""
    given = os.environ.get("BNLAYER_CORPUS")
    return {} if given is None else {kind: Path(given) / kind for kind in KINDS}


@pytest.fixture(scope="session", params=KINDS)
def folder(request: pytest.FixtureRequest, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kind's files."""
    kind = request.param
    if kind not in made:
        made[kind] = tmp_path_factory.mktemp("corpus") / kind
        subprocess.run([sys.executable, str(HERE / "corpus.py"), kind, str(made[kind])], check=True)
    return made[kind]


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The folder's checkpoints, and what is known of each."""
    notes = sorted(folder.glob("*.json"))
    found = {n.name.removesuffix(".json"): json.loads(n.read_text()) for n in notes}
    return {name: entry for name, entry in found.items() if "tensors" in entry}
