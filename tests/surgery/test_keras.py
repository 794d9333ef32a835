"""The operations on Keras models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("keras", reason="pip install 'bnlayer[keras]'")


@pytest.mark.parametrize("runtime", ["torch", "jax"])
def test_folds_and_statistics(runtime: str):
    pytest.importorskip(runtime, reason=f"pip install 'bnlayer[{runtime}]'")
    script = Path(__file__).with_name("keras_cases.py")
    subprocess.run([sys.executable, script], env={**os.environ, "KERAS_BACKEND": runtime}, check=True, timeout=120)
