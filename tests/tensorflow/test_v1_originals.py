"""The drop-ins against what tf-slim and tf.compat.v1.layers gave once: numbers, names, shapes, collections."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from bnlayer_tensorflow import v1  # noqa: E402

RECORDED = Path(__file__).with_name("recorded")


def load_cases():
    name = "recorded_cases"
    spec = importlib.util.spec_from_file_location(name, RECORDED / "cases.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


CASES = load_cases()
ORIGINALS = json.loads((RECORDED / "originals.json").read_text(encoding="utf-8"))
OURS = {"batch_norm": v1.batch_norm, "batch_normalization": v1.batch_normalization}
# The originals' own rounding, measured against float64: a few units of the dtype they compute or store in.
RELATIVE = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def array(recorded):
    return np.array(recorded["values"]).reshape(recorded["shape"])


def assert_close(ours, recorded, relative, what):
    want = array(recorded)
    assert np.shape(ours) == want.shape, what
    scale = max(1.0, float(np.abs(want).max(initial=0)))
    np.testing.assert_allclose(np.asarray(ours, "f8"), want, rtol=relative, atol=relative * scale, err_msg=what)


@pytest.mark.parametrize("case", CASES.cases(), ids=lambda case: case.name)
def test_a_case_gives_what_the_original_gave(case):
    ours, want = CASES.run(case, OURS), ORIGINALS["cases"][case.name]
    assert ours["variables"] == want["variables"]
    assert list(ours["variables"]) == list(want["variables"])  # and in this order
    assert ours["collections"] == want["collections"]
    relative = RELATIVE[case.dtype]
    for name in ("y", "dx", "eval"):
        assert_close(ours[name], want[name], relative, name)
    assert len(ours["parameters"]) == len(want["parameters"])
    for mine, theirs in zip(ours["parameters"], want["parameters"], strict=True):
        assert_close(mine, theirs, relative, "gradient of a parameter")
    for step, (mine, theirs) in enumerate(
        zip([ours["start"], *ours["statistics"]], [want["start"], *want["statistics"]], strict=True)
    ):
        assert set(mine) == set(theirs)
        for name in theirs:
            assert_close(mine[name], theirs[name], relative, f"{name} after {step} steps")


def test_every_case_is_recorded_and_every_recording_has_a_case():
    assert [case.name for case in CASES.cases()] == list(ORIGINALS["cases"])


@pytest.fixture(scope="module")
def our_names():
    return json.loads(json.dumps(CASES.names(OURS)))


@pytest.mark.parametrize("name", ORIGINALS["names"])
def test_names_and_collections_are_the_originals(name, our_names):
    assert our_names[name] == ORIGINALS["names"][name]
