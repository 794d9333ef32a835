"""A model in which only the import was changed: torch's arguments, attributes and tools go on to work."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, InputError, Renorm, SpecError, UnsupportedError

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
nn = torch.nn
BatchNorm, BatchNorm1d = bnlayer_torch.BatchNorm, bnlayer_torch.BatchNorm1d
BatchNorm2d, BatchNorm3d = bnlayer_torch.BatchNorm2d, bnlayer_torch.BatchNorm3d

PAIRS = [(BatchNorm1d, nn.BatchNorm1d), (BatchNorm2d, nn.BatchNorm2d), (BatchNorm3d, nn.BatchNorm3d)]
SHAPES = {BatchNorm1d: (8, 3, 5), BatchNorm2d: (4, 3, 5, 6), BatchNorm3d: (2, 3, 4, 5, 6)}
# What torch.nn cannot say, as arguments of ours.
BEYOND: list[tuple[str, dict[str, Any]]] = [
    ("moving_variance_estimator", {"moving_variance_estimator": "biased"}),
    ("zero_debias", {"zero_debias": "all"}),
    ("renorm", {"renorm": Renorm(r_max=2.0), "moving_variance_estimator": "biased"}),
    ("virtual_batch_size", {"virtual_batch_size": 2}),
    ("single_value", {"single_value": "allow"}),
    ("nonfinite", {"nonfinite": "keep"}),
    ("stats_dtype", {"stats_dtype": torch.float64}),
    ("scale", {"scale": False}),
]


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(first: Any, second: Any) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_torchs_arguments_come_in_torchs_order_with_torchs_defaults(ours: Any, theirs: Any) -> None:
    wanted = inspect.signature(theirs.__init__).parameters
    mine = inspect.signature(ours.__init__).parameters
    for name, parameter in wanted.items():
        assert (mine[name].default, mine[name].kind) == (parameter.default, parameter.kind)
    assert list(mine)[: len(wanted)] == list(wanted)
    arguments = (3, 1e-3, 0.2, True, True, "cpu", torch.float64)
    module, reference = ours(*arguments), theirs(*arguments)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(module, name) == getattr(reference, name)
    same(module, reference)
    assert repr(module) == repr(reference)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False},
                                       {"affine": False, "track_running_stats": False}], ids=str)  # fmt: skip
def test_tensors_have_torchs_names_order_and_kinds(ours: Any, theirs: Any, arguments: dict[str, Any]) -> None:
    module, reference = ours(3, **arguments), theirs(3, **arguments)
    assert isinstance(module, (theirs, nn.modules.batchnorm._BatchNorm))
    for listing in ("named_parameters", "named_buffers"):
        one, other = dict(getattr(module, listing)()), dict(getattr(reference, listing)())
        assert list(one) == list(other)
        assert [(t.dtype, t.shape, t.requires_grad) for t in one.values()] == [
            (t.dtype, t.shape, t.requires_grad) for t in other.values()
        ]
    # The slots that are empty are there too, as tools look for them.
    assert list(module._parameters) == list(reference._parameters)
    assert list(module._buffers) == list(reference._buffers)


def test_an_option_adds_buffers_and_only_when_it_is_on() -> None:
    plain = set(nn.BatchNorm2d(3).state_dict())
    for _, arguments in BEYOND:
        extra = set(BatchNorm2d(3, **arguments).state_dict()) - plain
        on = "zero_debias" in arguments or "renorm" in arguments
        assert bool(extra) == on


def test_the_default_dtype_and_device_are_followed() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        module = BatchNorm2d(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in (module.weight, module.running_var)} == {torch.float64}
    with torch.device("meta"):
        assert BatchNorm2d(3).weight.is_meta
    assert BatchNorm2d(3, device="meta", dtype=torch.bfloat16).num_batches_tracked.is_meta


@pytest.mark.parametrize("arguments", [{}, {"zero_debias": "all"}, {"bias": False}, dict(BEYOND)["renorm"]], ids=str)
def test_from_the_meta_device_to_a_module_that_trains(arguments: dict[str, Any]) -> None:
    module = BatchNorm2d(3, device="meta", **arguments)
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    assert module(torch.empty(4, 3, 5, 6, device="meta")).is_meta
    module = module.to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(7)
    module.reset_parameters()
    fresh = BatchNorm2d(3, **arguments)
    same(module, fresh)
    x = normal(4, 3, 5, 6)
    assert torch.equal(module(x), fresh(x))
    same(module, fresh)


@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, *(a for _, a in BEYOND)], ids=str)
def test_copies_and_pickles_go_on_alike(arguments: dict[str, Any]) -> None:
    module = BatchNorm2d(3, **arguments)
    module(normal(4, 3, 5, 6))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twins = [
        copy.deepcopy(module),
        copy.copy(module).eval().train(),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]
    wanted = module(normal(4, 3, 5, 6, seed=1), update_stats=False)
    for twin in twins:
        assert (twin.spec, type(twin)) == (module.spec, type(module))
        assert torch.equal(twin(normal(4, 3, 5, 6, seed=1), update_stats=False), wanted)


def test_a_pickle_from_before_an_attribute_existed_gets_its_default() -> None:
    module = BatchNorm2d(3)
    state = {k: v for k, v in module.__getstate__().items() if k not in ("nonfinite", "zero_debias", "renorm")}
    old = BatchNorm2d.__new__(BatchNorm2d)
    old.__setstate__(state)
    assert old.spec == module.spec
    assert torch.equal(old(normal(4, 3, 2, 2)), module(normal(4, 3, 2, 2)))


def test_torchs_module_becomes_ours_by_its_class() -> None:
    module, reference = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    module.__class__ = BatchNorm2d
    assert module.spec == BatchNorm2d(3).spec
    assert torch.equal(module(normal(4, 3, 2, 2)), reference(normal(4, 3, 2, 2)))
    same(module, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_a_model_computes_what_it_does_with_torchs_layer(dtype: Any, training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).train(training)
    reference = copy.deepcopy(model)
    reference[1] = nn.BatchNorm2d(3).train(training)
    results = []
    for each in (model, reference):
        with torch.autocast("cpu", dtype=dtype):
            y = each(normal(8, 2, 6, 6))
        y.float().square().sum().backward()
        results.append((y, *(p.grad for p in each.parameters()), *each.buffers()))
    assert results[0][0].dtype == dtype
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2)
    # The layer itself: float32 parameters, half input, half output.
    assert model[1](normal(4, 3, 2, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("training", [True, False])
def test_modules_of_another_dtype(cast: str, training: bool) -> None:
    module, reference = (getattr(m(3), cast)().train(training) for m in (BatchNorm2d, nn.BatchNorm2d))
    assert [t.dtype for t in module.state_dict().values()] == [t.dtype for t in reference.state_dict().values()]
    x = normal(8, 3, 4, 4, dtype=module.weight.dtype)
    y, exact = module(x), nn.BatchNorm2d(3, dtype=torch.float64).train(training)
    wanted = exact(x.double())
    assert y.dtype == x.dtype == reference(x).dtype
    # Rounded once, which torch's is not always.
    once = {"rtol": torch.finfo(x.dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(y.double(), wanted, **once)
    for got, buffer in zip(module.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(got.double(), buffer.double(), **once)
    assert module.float().spec == BatchNorm2d(3).spec


@pytest.mark.parametrize("arguments", [{}, {"moving_variance_estimator": "biased"}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ours", [BatchNorm2d, BatchNorm3d])
def test_channels_last_comes_out_as_it_went_in(ours: Any, training: bool, arguments: dict[str, Any]) -> None:
    layout = torch.channels_last if ours is BatchNorm2d else torch.channels_last_3d
    module = ours(3, **arguments).train(training).to(memory_format=layout)
    plain = copy.deepcopy(module)
    x = normal(*SHAPES[ours])
    leaf = x.to(memory_format=layout).requires_grad_()
    y = module(leaf)
    assert y.is_contiguous(memory_format=layout)
    (dx,) = torch.autograd.grad(y, leaf, x.to(memory_format=layout))
    assert dx.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, plain(x))


def test_update_bn_and_averaged_model_find_it() -> None:
    batches = [normal(6, 3, seed=seed) for seed in range(4)]
    results = []
    for layer in (BatchNorm1d(3), nn.BatchNorm1d(3), BatchNorm1d(3, moving_variance_estimator="biased")):
        model = nn.Sequential(layer, nn.ReLU())
        averaged = torch.optim.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        model(normal(5, 3, seed=9))
        averaged.update_parameters(model)
        torch.optim.swa_utils.update_bn(batches, averaged)
        assert averaged.module[0].momentum == 0.1
        results.append(averaged.module[0])
    mine, reference, biased = results
    torch.testing.assert_close(mine.running_mean, reference.running_mean)
    torch.testing.assert_close(mine.running_var, reference.running_var)
    torch.testing.assert_close(biased.running_var, reference.running_var * 5 / 6)
    assert mine.num_batches_tracked == 4


def test_update_bn_complains_where_a_plain_average_contradicts_the_spec() -> None:
    with pytest.raises(SpecError, match="zero_debias"):
        torch.optim.swa_utils.update_bn([normal(6, 3)], nn.Sequential(BatchNorm1d(3, zero_debias="all")))


def trained(layer: Any, *shape: int) -> Any:
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed) + 2)
    layer(normal(*shape) * 3 + 1)
    return layer.eval()


@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"bias": False}, *(a for _, a in BEYOND)], ids=str)
def test_fusing_into_a_convolution_is_right_for_every_option(arguments: dict[str, Any]) -> None:
    # In eval they all normalize by the moving statistics, so nothing is lost.
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(2, 4, 3).eval(), trained(BatchNorm2d(4, **arguments), 8, 4, 3, 3)
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv, layer)
    x = normal(2, 2, 6, 6, seed=5)
    torch.testing.assert_close(fused(x), layer(conv(x)), rtol=1e-4, atol=1e-4)
    linear, flat = nn.Linear(3, 4).eval(), trained(BatchNorm1d(4), 8, 4)
    fused = nn.utils.fusion.fuse_linear_bn_eval(linear, flat)
    torch.testing.assert_close(fused(normal(5, 3)), flat(linear(normal(5, 3))), rtol=1e-4, atol=1e-4)


def test_fusing_another_channel_axis_is_refused() -> None:
    conv = nn.Conv2d(2, 4, 3).eval()
    layer = BatchNorm(BatchNormSpec(4, axis=-1)).eval()
    for fuse, other in ((nn.utils.fusion.fuse_conv_bn_eval, conv),
                        (nn.utils.fusion.fuse_linear_bn_eval, nn.Linear(3, 4).eval())):  # fmt: skip
        with pytest.raises(UnsupportedError, match="axis is -1"):
            fuse(other, layer)
    moved = BatchNorm2d(4).eval()
    moved.axis = 3
    with pytest.raises(UnsupportedError, match="axis is 3"):
        nn.utils.fusion.fuse_conv_bn_eval(conv, moved)
    assert layer.eps == 1e-5  # anybody else may read it
    assert hasattr(layer, "eps")


def test_fusing_without_statistics_is_refused_as_torch_refuses_it() -> None:
    layer = BatchNorm2d(4, track_running_stats=False).eval()
    with pytest.raises(AssertionError, match="running_mean"):
        nn.utils.fusion.fuse_conv_bn_eval(nn.Conv2d(2, 4, 3).eval(), layer)


def small_model(layer: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.ReLU()).eval()


def test_fx_traces_a_model_and_keeps_the_layer_whole() -> None:
    model = small_model(trained(BatchNorm2d(4), 8, 4, 3, 3))
    traced = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in traced.graph.nodes][2] == ("call_module", "1")
    assert traced.get_submodule("1").spec == model[1].spec
    x = normal(2, 2, 6, 6)
    assert torch.equal(traced(x), model(x))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm1d(3)

        def forward(self, x: Any, mask: Any) -> Any:
            return self.norm(x, mask, update_stats=False)

    masked = Masked()
    traced = torch.fx.symbolic_trace(masked)
    mask = torch.tensor([True, True, False, True])
    assert torch.equal(traced(normal(4, 3), mask), masked(normal(4, 3), mask))
    assert masked.norm.num_batches_tracked == 0


def test_fusers_that_go_by_the_exact_class_leave_it_or_refuse_it() -> None:
    from torch.fx.experimental import optimization

    model = small_model(trained(BatchNorm2d(4), 8, 4, 3, 3))
    x = normal(2, 2, 6, 6)
    torch.testing.assert_close(optimization.fuse(model)(x), model(x))
    with pytest.raises((AssertionError, NotImplementedError), match=r"BatchNorm2d|Cannot fuse"):
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])
    # Told what it may fuse, it does; or the model goes back to torch.nn's layers first (bnlayer.convert).
    known = {"additional_fuser_method_mapping": {(nn.Conv2d, BatchNorm2d): torch.ao.quantization.fuse_conv_bn}}
    fused = torch.ao.quantization.fuse_modules(model, [["0", "1"]], fuse_custom_config_dict=known)
    assert isinstance(fused[1], nn.Identity)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False},
                                       {"eps": 0.1, "momentum": 0.3}, {"synchronized": True}], ids=str)  # fmt: skip
def test_torchs_sync_conversion_keeps_what_torch_can_say(arguments: dict[str, Any]) -> None:
    layer = trained(BatchNorm2d(3, **arguments), 4, 3, 2, 2)
    spec, tensors = layer.spec, dict(layer.state_dict(keep_vars=True))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0]
    assert type(converted) is nn.SyncBatchNorm
    for name, tensor in converted.state_dict(keep_vars=True).items():
        assert tensor is tensors[name]
    assert (converted.eps, converted.momentum, converted.training) == (spec.epsilon, layer.momentum, False)


@pytest.mark.parametrize(("field", "arguments"), BEYOND, ids=[n for n, _ in BEYOND])
def test_torchs_sync_conversion_refuses_what_it_would_lose(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=f"would lose .*{field}.*bnlayer_torch.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(BatchNorm2d(3, **arguments)))


def test_torchs_sync_conversion_refuses_other_axes_and_frozen_statistics() -> None:
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    with pytest.raises(UnsupportedError, match="axis"):
        convert(BatchNorm(BatchNormSpec(3, moving_variance_estimator="unbiased")))
    layer = BatchNorm2d(3)
    layer.frozen_statistics = True
    with pytest.raises(UnsupportedError, match="frozen_statistics"):
        convert(layer)
    assert not hasattr(layer, "qconfig")  # any other question has torch's answer
    layer.qconfig = "mine"
    assert layer.qconfig == "mine"

    def convert_sync_batchnorm(module: Any) -> bool:  # somebody else's, of the same name
        return hasattr(module, "qconfig")

    assert not convert_sync_batchnorm(BatchNorm2d(3, single_value="allow"))
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


def test_a_computed_parameter_is_seen() -> None:
    class Double(nn.Module):
        def forward(self, weight: Any) -> Any:
            return 2 * weight

    from torch.nn.utils import parametrize, prune

    module = BatchNorm1d(3)
    parametrize.register_parametrization(module, "weight", Double())
    x = normal(6, 3)
    torch.testing.assert_close(module(x), 2 * BatchNorm1d(3)(x))
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is BatchNorm1d
    torch.testing.assert_close(module(x), 2 * BatchNorm1d(3)(x))
    prune.l1_unstructured(module, "bias", amount=1)
    assert "bias" not in module._parameters
    torch.testing.assert_close(module(x), 2 * BatchNorm1d(3)(x))
    prune.remove(module, "bias")
    assert "bias" in module._parameters


def test_parameters_that_do_not_learn_get_no_gradient() -> None:
    module = BatchNorm1d(3).requires_grad_(False)
    x = normal(6, 3).requires_grad_()
    module(x).square().sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None
    y = module.eval()(normal(6, 3))
    assert not y.requires_grad
    # What nobody differentiates needs no copy of the statistics either.
    assert y.grad_fn is None


def test_hooks_apply_and_stateless_calls() -> None:
    module, seen = BatchNorm1d(3), []
    handles = [
        module.register_forward_pre_hook(lambda m, args: seen.append(("pre", m, len(args)))),
        module.register_forward_hook(lambda m, args, y: y + 1),
        module.register_full_backward_hook(lambda m, dx, dy: seen.append(("backward", m, len(dx)))),
    ]
    x = normal(6, 3).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert seen == [("pre", module, 1), ("backward", module, 1)]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(y, module(x) + 1)
    module.apply(lambda m: nn.init.constant_(m.weight, 3.0))
    assert (module.weight == 3).all()
    other = {"weight": torch.full((3,), 5.0), "running_mean": torch.ones(3)}
    y = torch.func.functional_call(module.eval(), other, (x,))
    mean, variance = torch.ones(3), module.running_var
    torch.testing.assert_close(y, (x - mean) / torch.sqrt(variance + 1e-5) * 5 + module.bias)
    assert (module.weight == 3).all()


def test_lazy_layers_of_torch_stay_torchs_until_converted() -> None:
    import bnlayer

    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(UnsupportedError, match="lazy"):
        bnlayer.convert(model)
    model(normal(6, 3))
    assert type(bnlayer.convert(model).model[0]) is BatchNorm1d


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_attributes_may_be_set_at_any_time_also_back(eps: float) -> None:
    module = BatchNorm1d(3, moving_variance_estimator="biased")
    before = module.spec
    module.eps, module.momentum = 0.5, -1
    with pytest.raises(SpecError, match="momentum"):
        module(normal(6, 3))
    module.eps, module.momentum = eps, 0.1
    assert module.spec == before.replace(epsilon=eps)
    module.__dict__["momentum"] = 0.5  # some write there
    assert module.spec.decay == 0.5


def test_keywords_that_the_call_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError, match="mask"):
        BatchNorm1d(3)(normal(6, 3), mask=None)
    with pytest.raises(InputError, match="renorm"):
        BatchNorm1d(3)(normal(6, 3), renorm_clips={"r_max": 1.0})
