"""The operations on Keras models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("keras", reason="pip install 'bnlayer[keras]'")


def test_folds_and_statistics():
    pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
    script = Path(__file__).with_name("keras_cases.py")
    subprocess.run([sys.executable, script], env={**os.environ, "KERAS_BACKEND": "torch"}, check=True, timeout=120)
