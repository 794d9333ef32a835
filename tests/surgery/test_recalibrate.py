"""Moving statistics of a data set, in the frameworks' own models and over processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnlayer.errors import InputError
from bnlayer.surgery.recalibrate import population, recalibrate

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")

from .sharded_cases import BATCHES, X, build  # noqa: E402


def test_statistics_are_those_of_all_batches_together():
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recalibrate(model, iter(BATCHES))
    flat = X.reshape(-1, 3).astype("f8")
    np.testing.assert_allclose(model[0].running_mean, flat.mean(0), atol=1e-7)
    np.testing.assert_allclose(model[0].running_var, flat.var(0, ddof=1), rtol=1e-6)
    assert model[2].num_batches_tracked == 3  # a cumulative average goes on from here
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{i}.running_{what}" for i in (0, 2, 3) for what in ("mean", "var")} | {"2.num_batches_tracked"}
    assert model.training


def test_shards_add_up_to_the_whole():
    whole = population(build(), BATCHES)
    shards = population(build(), BATCHES[:1]) + (population(build(), BATCHES[1:]) + population(build(), []))
    assert shards.batches == whole.batches == 3
    for name, moments in whole.layers.items():
        np.testing.assert_allclose(shards.layers[name].variance(), moments.variance(), rtol=1e-12)


def test_no_batches_and_frozen_statistics():
    with pytest.raises(InputError, match="no batch"):
        recalibrate(build(), [])
    model = build()
    model[2].frozen_statistics = True
    recalibrate(model, BATCHES)
    assert not model[2].running_mean.any() and model[0].running_mean.all()


def test_processes(tmp_path: Path):
    script = Path(__file__).with_name("sharded_cases.py")
    started = [subprocess.Popen([sys.executable, script, str(rank), str(tmp_path)]) for rank in (0, 1, 2)]
    assert [process.wait(timeout=60) for process in started] == [0, 0, 0]
    wanted = recalibrate(build(), BATCHES).state_dict()
    one, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1, 2))
    for name, tensor in wanted.items():
        assert all(torch.equal(one[name], other[name]) for other in others)
        torch.testing.assert_close(one[name], tensor, rtol=1e-6, atol=1e-7)


def test_flax():
    nnx = pytest.importorskip("flax.nnx", reason="pip install 'bnlayer[flax]'")

    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    model = recalibrate(model, BATCHES)
    flat = X.reshape(-1, 3).astype("f8")
    np.testing.assert_allclose(model.layers[0].mean.get_value(), flat.mean(0), atol=1e-7)
    np.testing.assert_allclose(model.layers[0].var.get_value(), flat.var(0), rtol=1e-6)
