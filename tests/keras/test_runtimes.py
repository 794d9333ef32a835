"""Keras on each of its frameworks, one process a framework, and how one is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install 'bnlayer[keras]'", allow_module_level=True)

INSTALLED = [name for name in ("tensorflow", "jax", "torch") if find_spec(name) is not None]


def run(*arguments, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    # Most of JAX's time here is compilation of what runs once.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **quiet, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("runtime", ["tensorflow", "jax", "torch"])
def test_keras_on(runtime):
    if runtime not in INSTALLED:
        pytest.skip(f"{runtime} is not installed: pip install 'bnlayer[keras,{runtime}]'")
    files = ("runtime_cases.py", "drop_in_cases.py", "model_cases.py", "model_io_cases.py", "originals.py")
    cases = [str(Path(__file__).with_name(name)) for name in files]
    marks = "markers=requires_trainable_backend: a mark of Keras's own tests"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", marks, *cases, KERAS_BACKEND=runtime)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("runtime", [name for name in INSTALLED if name != "tensorflow"])
def test_other_runtimes_do_without_tensorflow(runtime):
    code = (
        "import sys, numpy, bnlayer\n"
        "from bnlayer.contract import Call, Request\n"
        "x = numpy.ones((4, 3), 'f4')\n"
        "backend = bnlayer.backend('keras')\n"
        "backend.step(backend.build(bnlayer.BatchNormSpec(3)), Request((Call(x, dy=x),), training=True))\n"
        "from bnlayer_keras import BatchNormalization\n"
        "BatchNormalization()(x, training=True)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = run("-c", code, KERAS_BACKEND=runtime)
    assert done.returncode == 0, done.stderr


HIDE = """
import importlib.util, sys
hidden, real = set({hidden!r}), importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in hidden else real(name, *rest)
"""


def test_the_backend_imports_neither_keras_nor_a_framework():
    code = (
        "import sys, bnlayer, bnlayer_keras\n"
        "from bnlayer_keras.backend import BACKEND\n"
        "assert BACKEND.name == 'keras' and not BACKEND.owns(object())\n"
        "assert BACKEND.unsupported(bnlayer.BatchNormSpec(3)) is None\n"
        "assert BACKEND.unsupported(bnlayer.BatchNormSpec(3, synchronized=True)) is None\n"
        "from bnlayer_keras.model import ADAPTER\n"
        "from bnlayer_keras.native import BACKEND as NATIVE\n"
        "assert not ADAPTER.owns(object()) and not NATIVE.owns(object())\n"
        "assert 'zero_debias' in NATIVE.unsupported(bnlayer.BatchNormSpec(3, zero_debias='all'))\n"
        "assert not {'keras', 'tensorflow', 'jax', 'torch'} & set(sys.modules)\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("runtime", INSTALLED)
def test_an_installed_framework_is_found(runtime, tmp_path):
    """As if it were the only one: Keras's own default is TensorFlow."""
    hidden = [name for name in INSTALLED if name != runtime]
    code = (
        HIDE.format(hidden=hidden) + "import os, bnlayer\n"
        f"assert bnlayer.backend('keras').version().endswith('({runtime})')\n"
        "assert 'KERAS_BACKEND' not in os.environ\n"
    )
    done = run("-c", code, KERAS_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("hidden", "environment", "message"),
    [
        (["tensorflow", "jax", "torch"], {}, "needs one of tensorflow, jax, torch; none is installed"),
        (["jax"], {"KERAS_BACKEND": "jax"}, "KERAS_BACKEND is 'jax', which is not installed"),
        ([], {"KERAS_BACKEND": "numpy"}, "Keras runs on 'numpy' here"),
    ],
)
def test_says_what_is_missing(hidden, environment, message):
    code = HIDE.format(hidden=hidden) + (
        "import bnlayer\n"
        "try:\n"
        "    bnlayer.backend('keras').version()\n"
        "except bnlayer.BackendUnavailable as error:\n"
        "    print(error)\n"
    )
    done = run("-c", code, **environment)
    assert message in done.stdout, done.stdout + done.stderr


def test_a_configured_framework_is_kept(tmp_path):
    chosen = next(name for name in ("jax", "torch", "tensorflow") if name in INSTALLED)
    (tmp_path / "keras.json").write_text(f'{{"backend": "{chosen}"}}')
    code = f"import bnlayer\nassert bnlayer.backend('keras').version().endswith('({chosen})')\n"
    done = run("-c", code, KERAS_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
