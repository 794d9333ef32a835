"""Whole torch models: read as checkpoints, written, configured, and run with their batch norms training alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, Renorm, UnsupportedError
from bnlayer.errors import CheckpointError
from bnlayer_torch.model import ADAPTER

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
nn = torch.nn
X = np.random.default_rng(5).normal(size=(6, 8, 8, 2)).astype("f4")  # channels last, as `run` takes it


class Net(nn.Module):
    """Convolutions of each kind, norms of each kind, a tied head, and layers that nothing is known about."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU(True))
        self.group = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.ours = bnlayer_torch.BatchNorm2d(6, momentum=None)
        self.norm = nn.GroupNorm(2, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1))
        self.rnn = nn.LSTM(6, 4, batch_first=True)
        self.table = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.table.weight
        self.last = nn.BatchNorm1d(3, affine=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Any) -> Any:
        x = self.normed(self.norm(self.ours(self.up(self.group(self.stem(x))))))
        x, _ = self.rnn(x.mean(3).transpose(1, 2))
        return {"features": x, "logits": self.last(self.drop(self.head(x[:, -1])))}


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = Net()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    return model


def channels_first(array: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def test_read_says_what_every_layer_is():
    model = net()
    found = ADAPTER.read(model)
    assert list(found) == list(model.state_dict()) and found.order_is_meaningful
    assert found.metadata["tied"] == {"head.weight": "table.weight"}
    assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in model.state_dict().items())
    assert [(layer.name, layer.kind) for layer in found.layers] == [
        ("stem.0", "conv"),
        ("stem.1", "BatchNorm2d"),
        ("group", "conv"),
        ("up", "conv transpose"),
        ("ours", "BatchNorm2d"),
        ("norm", "norm"),
        ("normed", "ParametrizedConv2d"),
        ("normed.parametrizations.weight", "ParametrizationList"),
        ("rnn", "LSTM"),
        ("table", "embedding"),
        ("head", "dense"),
        ("last", "BatchNorm1d"),
    ]
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["group"].settings == {"dialect": "torch", "groups": 2}
    assert by_name["group"].tensors == {"kernel": "group.weight", "bias": "group.bias"}
    assert by_name["norm"].tensors == {"gamma": "norm.weight", "beta": "norm.bias"}
    assert by_name["ours"].tensors["num_updates"] == "ours.num_batches_tracked"


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3, eps=1e-3, momentum=0.3),
        nn.BatchNorm3d(3, momentum=None, affine=False),
        nn.SyncBatchNorm(3),
        bnlayer_torch.BatchNorm1d(3, zero_debias="all"),
        bnlayer_torch.BatchNorm(BatchNormSpec(3, axis=-1, renorm=Renorm(r_max=2.0))),
        bnlayer_torch.BatchNorm(BatchNormSpec(3, stats_dtype="float32", param_dtype="bfloat16", virtual_batch_size=2)),
    ],
    ids=["eps", "cumulative", "sync", "zero_debias", "axis", "dtypes"],
)
def test_batch_norms_are_read_with_their_true_spec(layer):
    model = nn.ModuleDict({"bn": layer})
    (record,) = ADAPTER.batch_norms(model)
    (stored,) = ADAPTER.read(model).batch_norms()
    assert stored.name == "bn" and stored.spec == record.spec and not stored.missing
    assert set(stored.sources.values()) == {"file"}
    state = stored.state()
    assert record.state is not None
    for name, array in record.state.arrays().items():
        np.testing.assert_array_equal(getattr(state, name), array)


def test_read_save_and_torch_loads(tmp_path):
    model, other = net(), net(1)
    ADAPTER.read(model).save(tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_read_is_a_copy_and_half_precision_stays():
    model = net().to(torch.bfloat16)
    found = ADAPTER.read(model)
    before = found["up.weight"].copy()
    with torch.no_grad():
        model.up.weight.zero_()
    assert found.tensors["up.weight"].dtype.name == "bfloat16" and np.array_equal(found["up.weight"], before)
    ADAPTER.write(model, found)
    assert model.up.weight.dtype == torch.bfloat16 and np.array_equal(ADAPTER.read(model)["up.weight"], before)


def test_write_there_and_in_the_models_dtype():
    model, source = net().half(), ADAPTER.read(net(1))
    parameter = model.up.weight
    assert ADAPTER.write(model, source) is model
    assert model.up.weight is parameter and parameter.dtype == torch.float16
    np.testing.assert_array_equal(parameter.detach().numpy(), source["up.weight"].astype("f2"))
    assert model.head.weight is model.table.weight


def test_write_refuses_and_changes_nothing():
    model, source = net(), ADAPTER.read(net(1))
    before = ADAPTER.read(model)
    cases = [
        (source.replace({"up.bias": np.zeros(5, "f4")}), r"up.bias has shape \(5,\)"),
        (source.replace({"head.weight": source["head.weight"] + 1}), "table.weight and head.weight are one"),
        (source.replace({"ours.num_batches_tracked": np.array(1.5)}), "num_batches_tracked is float64"),
        (source.replace({"up.bias": np.zeros(6, "c8")}), "complex"),
        (ADAPTER.read(model.stem), "lacks stem.0.weight.*and has, and the model has not, 0.weight"),
    ]
    for wrong, message in cases:
        with pytest.raises(CheckpointError, match=message):
            ADAPTER.write(model, wrong)
        after = ADAPTER.read(model)
        assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("device", ["meta", "lazy"])
def test_tensors_without_numbers_are_refused(device):
    model = nn.Linear(2, 2, device="meta") if device == "meta" else nn.LazyLinear(2)
    with pytest.raises(CheckpointError, match=device):
        ADAPTER.read(model)


def test_configure_is_seen_by_the_forward_pass():
    model = net()
    specs = {r.name: r.spec.replace(epsilon=0.5, decay=0.75) for r in ADAPTER.batch_norms(model) if r.spec is not None}
    specs["last"] = specs["last"].replace(decay="cumulative")
    assert ADAPTER.configure(model, specs) is model
    assert {r.name: r.spec for r in ADAPTER.batch_norms(model)} == specs
    assert model.stem[1].momentum == 0.25 and model.last.momentum is None
    seen = ADAPTER.run(model, X, training=False, capture=True).layers
    for name in ("stem.1", "ours"):
        x, y = seen[name]
        bn = model.get_submodule(name)
        mean, var, gamma, beta = (
            getattr(bn, key).detach().numpy()[:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 0.5) * gamma + beta, rtol=1e-4, atol=1e-5)


def test_run_in_eval_is_the_models_own_eval_pass():
    model = net().train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    before = ADAPTER.read(model)
    got = ADAPTER.run(model, X, training=False)
    assert got.model is model and got.layers == {} and got.calls == () and got.output.dtype == np.float32
    assert [module.training for module in model.modules()] == modes
    assert all(np.array_equal(before[name], array) for name, array in ADAPTER.read(model).items())
    with torch.no_grad():
        np.testing.assert_array_equal(got.output, copy.deepcopy(model).eval()(channels_first(X))["logits"].numpy())


def test_run_in_training_moves_statistics_as_torch_does():
    model = net().eval()
    model.drop.p = 0.0
    own = copy.deepcopy(model).train()
    want = own(channels_first(X))["logits"].detach().numpy()
    model.drop.p = 0.5  # which stays in eval mode
    got = ADAPTER.run(model, X, training=True)
    np.testing.assert_allclose(got.output, want, rtol=1e-5, atol=1e-6)
    for name, tensor in own.state_dict().items():
        np.testing.assert_allclose(ADAPTER.read(model)[name], tensor.numpy(), rtol=1e-6, err_msg=name)
    assert not any(module.training for module in model.modules())
    assert int(model.ours.num_batches_tracked) == int(own.ours.num_batches_tracked) > 0


def test_frozen_statistics_stay():
    model = net()
    model.ours.frozen_statistics = True
    before = model.ours.running_mean.clone()
    ADAPTER.run(model, X, training=True)
    assert torch.equal(model.ours.running_mean, before) and model.ours.frozen_statistics


def test_capture_has_the_batch_norms_and_the_order_of_calls():
    model = net()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    got = ADAPTER.run(model, X, training=False, capture=True)
    assert list(got.layers) == [r.name for r in ADAPTER.batch_norms(model)] == ["stem.1", "ours", "last"]
    order = ["stem.0", "stem.1", "group", "up", "ours", "norm", "normed", "rnn", "head", "last"]
    assert [name for name in got.calls if "parametrizations" not in name] == order
    assert set(got.calls) < {layer.name for layer in ADAPTER.read(model).layers}
    assert got.layers["ours"][0].shape == (6, 6, 16, 16)
    np.testing.assert_array_equal(got.layers["last"][1], got.output)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_everything_comes_back_after_an_error():
    model = net().train()
    with pytest.raises(RuntimeError):
        ADAPTER.run(model, X[..., :1], training=False, capture=True)
    assert all(m.training and not m._forward_hooks for m in model.stem.modules()) and torch.is_grad_enabled()


def test_outputs_come_back_channels_last_and_wide():
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.BatchNorm2d(5)).bfloat16()
    got = ADAPTER.run(model, X, training=False)
    assert got.output.shape == (6, 8, 8, 5) and got.output.dtype == np.float32
    with pytest.raises(UnsupportedError, match="returns no tensor"):
        ADAPTER.run(Nothing(), X, training=False)


class Nothing(nn.Module):
    def forward(self, x: Any) -> Any:
        return {"loss": None, "text": "none"}


def test_the_adapter_imports_no_torch():
    code = "import sys, bnlayer_torch.model; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class BatchNorm2d(nn.BatchNorm2d):
    """By its class it may compute anything, whatever its name is."""


def test_what_may_compute_something_else_is_not_guessed_to_be_a_batch_norm():
    found = ADAPTER.read(nn.Sequential(BatchNorm2d(3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)))
    assert [layer.kind for layer in found.layers] == ["BatchNorm2d that is no plain batch norm", "InstanceNorm2d"]
    assert found.batch_norms() == []
