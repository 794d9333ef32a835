"""The code on these pages runs, and prints what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("drop-in", "checkpoints", "porting", "surgery", "performance")
BLOCKS = [
    pytest.param(code, shown, id=f"{page}-{i}")
    for page in PAGES
    for i, (code, shown) in enumerate(
        re.findall(
            r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", (DOCS / f"{page}.md").read_text("utf-8"), flags=re.DOTALL
        )
    )
]


@pytest.mark.parametrize("page", PAGES)
def test_there_is_code(page: str) -> None:
    assert sum(str(block.id).startswith(page) for block in BLOCKS) >= 1


@pytest.mark.parametrize(("code", "shown"), BLOCKS)
def test_it_runs(code: str, shown: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown
