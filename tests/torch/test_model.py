"""Live torch models: their batch norms exchanged for ours and back, frozen and set free."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest

import bnlayer
import bnlayer_torch
from bnlayer import BatchNormSpec, InputError, Renorm, UnsupportedError
from bnlayer.contract import ModelAdapter

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
nn = torch.nn
Ours = bnlayer_torch.BatchNorm2d


class Block(nn.Module):
    def __init__(self, channels: int, shared: Any = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.05)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = shared if shared is not None else nn.BatchNorm2d(channels, momentum=None)

    def forward(self, x: Any) -> Any:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """A small one, with what real ones have: nesting, a shared layer, one without parameters, one for vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), nn.ReLU())
        shared = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, shared), Block(4, shared))
        self.blocks = nn.ModuleList([Block(4)])
        self.head = nn.ModuleDict({"norm": nn.BatchNorm1d(4, bias=False), "fc": nn.Linear(4, 3)})

    def forward(self, x: Any) -> Any:
        x = self.layer1(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head["fc"](self.head["norm"](x.mean((2, 3))))


NAMES = ["stem.1", "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "blocks.0.bn1", "blocks.0.bn2", "head.norm"]


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained() -> Any:
    torch.manual_seed(0)
    model = ResNet()
    for seed in range(2):
        model(normal(8, 2, 5, 5, seed=seed))
    return model


def steps(model: Any, optimizer: Any) -> list[Any]:
    losses = []
    for seed in range(3):
        loss = model(normal(8, 2, 5, 5, seed=10 + seed)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_the_adapter_is_registered_and_imports_no_torch() -> None:
    assert isinstance(bnlayer.registry.adapter(nn.Linear(1, 1)), ModelAdapter)
    assert bnlayer.registry.adapter(nn.Linear(1, 1)).name == "torch"
    code = (
        "import sys, bnlayer_torch.model as m; assert 'torch' not in sys.modules; assert not m.ADAPTER.owns(object())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_batch_norms_are_listed_in_the_models_order_shared_ones_once() -> None:
    records = bnlayer.batch_norms(trained())
    assert [r.name for r in records] == NAMES
    assert {r.kind for r in records} == {"native"}
    by_name = {r.name: r for r in records}
    spec = by_name["blocks.0.bn1"].spec
    assert spec == BatchNormSpec(4, axis=1, epsilon=1e-3, decay=0.95, moving_variance_estimator="unbiased")
    assert by_name["blocks.0.bn2"].spec.decay == "cumulative"
    assert not by_name["stem.1"].spec.scale
    assert not by_name["head.norm"].spec.center
    assert by_name["layer1.0.bn2"].state.num_updates == 4


@pytest.mark.parametrize("training", [True, False])
def test_there_and_back_with_the_same_bits(training: bool) -> None:
    model, reference = trained().train(training), trained().train(training)
    keys, x = list(reference.state_dict()), normal(8, 2, 5, 5, seed=5)
    done = bnlayer.convert(model)
    assert done.model is model
    assert [r.name for r in done.replaced] == NAMES
    assert [type(m).__module__ for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [
        "bnlayer_torch.layer"
    ] * len(NAMES)
    assert model.layer1[0].bn2 is model.layer1[1].bn2
    assert list(model.state_dict()) == keys
    assert str(model) == str(reference)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-5)
    back = bnlayer.convert(model, "native")
    assert [r.name for r in back.replaced] == NAMES
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name])
    torch.testing.assert_close(model(x), reference(x))


def test_one_layer_and_its_counterpart_have_the_same_bits() -> None:
    x = normal(8, 4, 5, 5)
    for training in (True, False):
        model, reference = nn.Sequential(nn.BatchNorm2d(4)), nn.Sequential(nn.BatchNorm2d(4))
        bnlayer.convert(model)
        assert torch.equal(model.train(training)(x), reference.train(training)(x))
        for name, value in model.state_dict().items():
            assert torch.equal(value, reference.state_dict()[name])


def test_an_optimizer_goes_on_with_the_parameters_that_it_holds() -> None:
    model, reference = trained(), trained()
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, reference)]
    steps(model, optimizers[0])
    steps(reference, optimizers[1])
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    bnlayer.convert(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    for got, wanted in zip(steps(model, optimizers[0]), steps(reference, optimizers[1]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_mode_flags_dtype_and_hooks_come_along() -> None:
    layer, seen = nn.BatchNorm2d(3, dtype=torch.float64).eval(), []
    layer.weight.requires_grad_(False)
    layer.note = "mine"
    handle = layer.register_forward_hook(lambda m, args, y: seen.append(type(m)))
    layer.register_load_state_dict_pre_hook(lambda m, *rest: seen.append(m))
    model = nn.Sequential(layer, nn.ReLU())
    del layer
    bnlayer.convert(model)
    ours = model[0]
    assert (ours.training, ours.note, ours.weight.requires_grad, ours.bias.requires_grad) == (
        False,
        "mine",
        False,
        True,
    )
    assert ours.spec.param_dtype == ours.spec.stats_dtype == "float64"
    model(normal(2, 3, 2, 2).double())
    model.load_state_dict(model.state_dict())
    assert seen == [Ours, ours]
    handle.remove()
    model(normal(2, 3, 2, 2).double())
    assert len(seen) == 2


def test_a_model_that_is_a_batch_norm_itself() -> None:
    layer = nn.BatchNorm1d(3)
    done = bnlayer.convert(layer)
    assert type(done.model) is bnlayer_torch.BatchNorm1d
    assert done.model.weight is layer.weight
    assert type(layer) is nn.BatchNorm1d
    assert type(bnlayer.convert(done.model, "native").model) is nn.BatchNorm1d


def test_the_rank_that_a_class_takes_stays() -> None:
    model = bnlayer.convert(nn.Sequential(nn.BatchNorm2d(3))).model
    with pytest.raises(InputError, match="4D"):
        model(normal(4, 3))
    with pytest.raises(UnsupportedError, match="any rank"):
        bnlayer.convert(bnlayer_torch.BatchNorm(model[0].spec), "native")


def test_synchronized_layers_become_synchronized_layers() -> None:
    model = bnlayer.convert(nn.Sequential(nn.SyncBatchNorm(3, momentum=0.2))).model
    assert type(model[0]) is bnlayer_torch.BatchNorm
    assert model[0].spec.synchronized
    assert model(normal(4, 3, 2)).shape == (4, 3, 2)
    back = bnlayer.convert(model, "native").model[0]
    assert (type(back), back.momentum, back.process_group) == (nn.SyncBatchNorm, 0.2, None)


class Louder(nn.BatchNorm2d):
    def forward(self, input: Any) -> Any:
        return 2 * super().forward(input)


def odd(change: str) -> Any:
    layer = nn.BatchNorm2d(3)
    if change == "forward":
        layer.forward = lambda x: x
    elif change == "untracked":
        layer.track_running_stats = False
    elif change == "momentum":
        layer.momentum = 1.5
    elif change == "counter":
        layer.num_batches_tracked = None
    elif change == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    elif change == "pruned":
        from torch.nn.utils import prune

        prune.identity(layer, "weight")
    elif change == "compiled":
        layer.compile(backend="eager")
    return layer


@pytest.mark.parametrize(("layer", "reason"), [
    (lambda: Louder(3), "Louder is a subclass of BatchNorm2d"),
    (lambda: nn.LazyBatchNorm2d(), "lazy"),
    (lambda: nn.BatchNorm2d(3, device="meta"), "meta device"),
    (lambda: odd("forward"), "forward was set on it"),
    (lambda: odd("compiled"), "_compiled_call_impl"),
    (lambda: odd("untracked"), "track_running_stats=False"),
    (lambda: odd("counter"), "running_mean, running_var"),
    (lambda: odd("momentum"), "momentum"),
    (lambda: odd("parametrized"), "subclass of BatchNorm2d"),
    (lambda: odd("pruned"), "weight are not its own"),
])  # fmt: skip
def test_what_may_compute_something_else_is_refused_with_the_reason(layer: Any, reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), layer())
    kinds = [type(m) for m in model]
    with pytest.raises(UnsupportedError, match=f"1: .*{reason}"):
        bnlayer.convert(model)
    assert [type(m) for m in model] == kinds
    done = bnlayer.convert(model, allow_partial=True)
    assert [type(m) for m in model] == [Ours, kinds[1]]
    assert reason in done.refused[0].reason
    assert "REFUSED" in str(done)


@pytest.mark.parametrize(("field", "arguments"), [
    ("moving_variance_estimator", {"moving_variance_estimator": "biased"}),
    ("zero_debias", {"zero_debias": "all"}),
    ("renorm", {"renorm": Renorm(), "moving_variance_estimator": "biased"}),
    ("virtual_batch_size", {"virtual_batch_size": 2}),
    ("single_value", {"single_value": "allow"}),
    ("nonfinite", {"nonfinite": "keep"}),
    ("stats_dtype", {"stats_dtype": torch.float64}),
    ("scale", {"scale": False}),
])  # fmt: skip
def test_torchs_own_cannot_be_what_it_has_no_words_for(field: str, arguments: dict[str, Any]) -> None:
    model = nn.Sequential(Ours(3, **arguments))
    with pytest.raises(UnsupportedError, match=field):
        bnlayer.convert(model, "native")
    assert type(model[0]) is Ours


def test_models_in_wrappers() -> None:
    model, reference = trained().eval(), trained().eval()
    x = normal(4, 2, 5, 5)
    fast = torch.compile(model, backend="eager")
    fast(x)
    done = bnlayer.convert(fast)
    assert [r.name for r in done.replaced] == [f"_orig_mod.{name}" for name in NAMES]
    torch.testing.assert_close(fast(x), reference(x))
    assert type(model.stem[1]) is Ours
    averaged = torch.optim.swa_utils.AveragedModel(trained())
    assert len(bnlayer.convert(averaged).replaced) == len(NAMES)
    traced = bnlayer.convert(torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))).model
    assert traced(x).shape == (4, 3, 5, 5)


def test_freezing_statistics_and_parameters_apart() -> None:
    model = bnlayer.convert(trained()).model
    assert bnlayer.freeze(model, "layer1.*", parameters=False) is model
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    steps(model.eval().train(), optimizer)
    after = model.state_dict()
    for name in NAMES:
        kept = name.startswith("layer1")
        assert torch.equal(after[f"{name}.running_mean"], before[f"{name}.running_mean"]) == kept
        assert (after[f"{name}.num_batches_tracked"] == before[f"{name}.num_batches_tracked"]) == kept
    assert not torch.equal(after["layer1.0.bn1.weight"], before["layer1.0.bn1.weight"])
    bnlayer.unfreeze(model, statistics=True, parameters=False)
    bnlayer.freeze(model, ["stem.1", "blocks.*"], statistics=False)
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer)  # it has momentum and weight decay, which need a gradient to go on
    after = model.state_dict()
    assert torch.equal(after["blocks.0.bn1.weight"], before["blocks.0.bn1.weight"])
    assert not torch.equal(after["blocks.0.bn1.running_var"], before["blocks.0.bn1.running_var"])
    assert not torch.equal(after["layer1.0.bn1.weight"], before["layer1.0.bn1.weight"])
    bnlayer.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_what_has_no_statistics_to_freeze_says_so() -> None:
    native = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(UnsupportedError, match=r"0: .*convert"):
        bnlayer.freeze(native)
    bnlayer.freeze(native, statistics=False)
    assert not native[0].weight.requires_grad
    mixed = nn.Sequential(Ours(3), Ours(3, track_running_stats=False))
    with pytest.raises(UnsupportedError, match="track_running_stats"):
        bnlayer.freeze(mixed)
    assert not mixed[0].frozen_statistics
    with pytest.raises(InputError, match="nothing"):
        bnlayer.freeze(mixed, "nothing")
    mixed[0].frozen_statistics = True
    with pytest.raises(UnsupportedError, match="frozen_statistics"):
        bnlayer.convert(mixed[0], "native")


def test_a_frozen_layer_keeps_its_statistics_flag_in_copies_and_files() -> None:
    model = bnlayer.freeze(bnlayer.convert(trained()).model)
    twin = copy.deepcopy(model).train()
    assert all(record.layer.frozen_statistics for record in bnlayer.batch_norms(twin))
