"""Run every case with the originals and write what they gave to originals.json.

Needs an environment of its own, which the tests do not:

    python3 -m venv legacy
    legacy/bin/pip install 'tensorflow-cpu==2.21.*' 'tf-keras==2.21.*' 'tf-slim==1.1.0'
    legacy/bin/python record.py

tf-slim 1.1.0 is older than this TensorFlow and reaches for names that have moved; three aliases put them back.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # read when TensorFlow is imported

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_ops

HERE = Path(__file__).parent


def originals() -> dict[str, Any]:
    """The two functions, made to run."""
    ops.Tensor = tf.Tensor
    control_flow_ops.cond = tf.compat.v1.cond
    for name in ("", ".base", ".normalization"):
        sys.modules[f"tf_keras.legacy_tf_layers{name}"] = importlib.import_module(
            f"tf_keras.src.legacy_tf_layers{name}"
        )
    slim = importlib.import_module("tf_slim")
    return {"batch_norm": slim.batch_norm, "batch_normalization": tf.compat.v1.layers.batch_normalization}


def plain(value: Any) -> Any:
    """As JSON: arrays as nested lists of numbers that are good to a float32's rounding, float64 ones in full."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        digits = 17 if value.dtype == np.float64 else 8
        flat = [float(f"{number:.{digits}g}") for number in np.asarray(value, np.float64).ravel()]
        return {"shape": list(np.shape(value)), "values": flat}
    return value


def main() -> None:
    """Write originals.json."""
    sys.path.insert(0, str(HERE))
    cases = importlib.import_module("cases")
    functions = originals()
    recorded = {case.name: plain(cases.run(case, functions)) for case in cases.cases()}
    document = {
        "versions": {"tensorflow": tf.__version__, "tf_keras": tf_keras.__version__, "tf_slim": "1.1.0"},
        "names": cases.names(functions),
        "cases": recorded,
    }
    lines = [f'"versions": {json.dumps(document["versions"])}']
    for part in ("names", "cases"):
        inside = ",\n".join(
            f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in document[part].items()
        )
        lines.append(f'"{part}": {{\n{inside}\n}}')
    (HERE / "originals.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
