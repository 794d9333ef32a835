"""Every file of the corpus reads bit-equal to what its framework loads from it, and no framework is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import checkpoint
from bnlayer.checkpoint.batch_norms import find
from bnlayer.state import numpy_dtype

from .conftest import entries

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax", "equinox", "haiku", "orbax", "safetensors")


def opened(folder: Path, name: str, entry: dict[str, Any]) -> checkpoint.Checkpoint:
    return checkpoint.open(folder / name, **entry["options"])


def test_every_tensor_is_what_the_framework_loads(folder: Path) -> None:
    for name, entry in entries(folder).items():
        found = opened(folder, name, entry)
        assert found.format == entry["format"], name
        wanted = entry["tensors"]
        assert list(found) == list(wanted) if entry["ordered"] else set(found) == set(wanted), name
        stored = np.load(folder / f"{name}.npz")
        for i, (tensor, about) in enumerate(wanted.items()):
            array = found[tensor]
            assert found.tensors[tensor].dtype == array.dtype, (name, tensor)
            assert found.tensors[tensor].shape == array.shape, (name, tensor)
            assert (array.dtype, list(array.shape)) == (_dtype(about["dtype"]), about["shape"]), (name, tensor)
            assert array.tobytes() == stored[str(i)].tobytes(), (name, tensor)


def test_the_batch_norms_are_found_and_nothing_else(folder: Path) -> None:
    for name, entry in entries(folder).items():
        found = find(opened(folder, name, entry))
        assert {one.name for one in found.batch_norms} == set(entry["batch_norms"]), name
        assert not found.ambiguous, (name, found.ambiguous)
        for one in found.batch_norms:
            for key, value in entry["batch_norms"][one.name].items():
                assert getattr(one.spec, key) == pytest.approx(value), (name, one.name, key)
                if key != "num_features":
                    assert one.sources[key] == "file", (name, one.name, key)
            state = one.state()
            assert state.moving_variance is not None
            assert state.moving_variance.shape == (one.num_features,), (name, one.name)
            assert (state.moving_variance.astype(np.float64) > 0).all(), (name, one.name)


def test_reading_imports_no_framework(folder: Path) -> None:
    program = f"""
import json, pathlib, sys
from bnlayer import checkpoint
folder = pathlib.Path({str(folder)!r})
for note in folder.glob("*.json"):
    entry = json.loads(note.read_text())
    if "tensors" in entry:
        found = checkpoint.open(folder / note.name.removesuffix(".json"), **entry["options"])
        [found[name] for name in found], found.batch_norms()
print(*[name for name in {FRAMEWORKS} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def _dtype(name: str) -> np.dtype[Any]:
    return numpy_dtype(name) if name == "bfloat16" else np.dtype(name)
