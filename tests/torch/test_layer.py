"""The `torch.nn` modules: what torch's own do by default, and attributes that are the truth."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, InputError, SpecError, StateError

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
BatchNorm, BatchNorm1d = bnlayer_torch.BatchNorm, bnlayer_torch.BatchNorm1d
BatchNorm2d, BatchNorm3d = bnlayer_torch.BatchNorm2d, bnlayer_torch.BatchNorm3d

PAIRS = [
    (BatchNorm1d, torch.nn.BatchNorm1d, (8, 3)),
    (BatchNorm1d, torch.nn.BatchNorm1d, (8, 3, 5)),
    (BatchNorm1d, torch.nn.BatchNorm1d, (64, 3)),
    (BatchNorm2d, torch.nn.BatchNorm2d, (4, 3, 5, 6)),
    (BatchNorm3d, torch.nn.BatchNorm3d, (4, 3, 2, 5, 3)),
]
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-3, "momentum": 0.01},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"dtype": torch.float64},
]


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(ours: Any, theirs: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    mine, reference = ours(3, **arguments), theirs(3, **arguments)
    with torch.no_grad():
        for seed, parameter in enumerate(reference.parameters()):
            parameter.copy_(normal(3, seed=seed))
    mine.load_state_dict(reference.state_dict())
    return mine, reference


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_the_defaults_do_what_torch_does(
    ours: Any, theirs: Any, shape: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    mine, reference = pair(ours, theirs, arguments)
    assert isinstance(mine, theirs)
    assert list(mine.state_dict()) == list(reference.state_dict())
    dtype = arguments.get("dtype", torch.float32)
    for step, training in enumerate([False, True, True, False, True]):
        mine.train(training)
        reference.train(training)
        results = []
        for module in (mine, reference):
            x = normal(*shape, seed=step, dtype=dtype).requires_grad_()
            y = module(x)
            dy = normal(*shape, seed=step + 100, dtype=dtype)
            results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], dy)])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(mine.get_buffer(name), buffer)


@pytest.mark.parametrize("arguments", [{}, {"eps": 1e-3, "momentum": 0.01}], ids=str)
def test_where_torchs_kernel_is_all_there_is_to_do_the_bits_are_the_same(arguments: dict[str, Any]) -> None:
    mine, reference = pair(BatchNorm2d, torch.nn.BatchNorm2d, arguments)
    x = normal(4, 3, 5, 6)
    assert torch.equal(mine(x), reference(x))
    assert torch.equal(mine.running_var, reference.running_var)
    assert torch.equal(mine.eval()(x), reference.eval()(x))


def test_state_dicts_go_both_ways_and_are_as_strict_as_torchs() -> None:
    mine, reference = BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    mine(normal(4, 3, 2, 2))
    reference.load_state_dict(mine.state_dict())
    for name, value in reference.state_dict().items():
        assert torch.equal(value, mine.state_dict()[name])
    old = dict(reference.state_dict())  # without metadata, as before torch counted
    del old["num_batches_tracked"]
    mine.load_state_dict(old)
    with pytest.raises(RuntimeError, match="running_mean"):
        mine.load_state_dict({k: v for k, v in old.items() if k != "running_mean"})


def test_attributes_are_the_truth() -> None:
    module = BatchNorm1d(3)
    assert module.spec == BatchNormSpec(3, axis=1, moving_variance_estimator="unbiased")
    module.momentum, module.eps, module.moving_variance_estimator = None, 0.5, "biased"
    assert module.spec.decay == "cumulative"
    batches = [normal(6, 3, seed=seed) for seed in range(3)]
    for batch in batches:
        y = module(batch)
    mean = torch.stack([b.mean(0) for b in batches]).mean(0)
    variance = torch.stack([b.var(0, correction=0) for b in batches]).mean(0)
    torch.testing.assert_close(module.running_mean, mean)
    torch.testing.assert_close(module.running_var, variance)
    last = batches[-1]
    torch.testing.assert_close(y, (last - last.mean(0)) / (last.var(0, correction=0) + 0.5).sqrt())
    assert module.double().spec.param_dtype == "float64"
    module.track_running_stats = False
    assert not module.spec.track_moving_stats


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", -1.0), ("eps", float("nan")), ("momentum", 1.5), ("momentum", -0.1), ("momentum", "fast"),
     ("moving_variance_estimator", "sample"), ("nonfinite", "drop"), ("axis", 0)],
)  # fmt: skip
def test_attributes_that_no_batch_norm_can_have_are_refused_at_the_next_call(name: str, value: Any) -> None:
    module = BatchNorm1d(3)
    setattr(module, name, value)
    with pytest.raises(SpecError, match="epsilon" if name == "eps" else name):
        module(normal(6, 3))


def test_statistics_cannot_be_tracked_without_buffers() -> None:
    module = BatchNorm1d(3, track_running_stats=False)
    module.track_running_stats = True
    with pytest.raises(StateError, match="track_running_stats"):
        module(normal(6, 3))


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.001, 0.0, 1.0, 0.003])
def test_momentum_is_the_complement_of_decay(momentum: float) -> None:
    spec = BatchNorm1d(3, momentum=momentum).spec
    assert BatchNorm(spec).momentum == momentum
    assert BatchNorm(spec).spec == spec


def test_center_and_scale_say_more_than_affine_and_bias() -> None:
    module = BatchNorm1d(3, scale=False)
    assert module.weight is None
    assert module.bias is not None
    assert (module.spec.scale, module.spec.center) == (False, True)
    assert next(iter(BatchNorm1d(3, affine=False, scale=True).state_dict())) == "weight"
    x = normal(6, 3)
    torch.testing.assert_close(module(x), BatchNorm1d(3, affine=False)(x))


@pytest.mark.parametrize("spec", [
    BatchNormSpec(3, axis=-1),
    BatchNormSpec(3, axis=2, decay="cumulative", center=False),
    BatchNormSpec(3, scale=False, track_moving_stats=False),
    BatchNormSpec(3, center=False, scale=False, param_dtype="float16", stats_dtype="float64"),
    BatchNormSpec(3, axis=1, single_value="allow", nonfinite="keep", epsilon=0.0),
])  # fmt: skip
def test_a_module_from_a_spec_has_that_spec(spec: BatchNormSpec) -> None:
    module = BatchNorm(spec)
    assert module.spec == spec
    assert copy.deepcopy(module).spec == spec
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).spec == spec


def test_frozen_statistics_survive_train() -> None:
    module = BatchNorm2d(3)
    module(normal(4, 3, 2, 2))
    module.frozen_statistics = True
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = normal(4, 3, 2, 2, seed=1)
    frozen = module.train()(x)
    assert torch.equal(frozen, module.eval()(x))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    module.frozen_statistics = False
    assert not torch.equal(module.train()(x), frozen)


def test_update_stats_false_leaves_statistics_and_counter() -> None:
    module = BatchNorm1d(3)
    x = normal(6, 3)
    wanted = copy.deepcopy(module)(x)
    torch.testing.assert_close(module(x, update_stats=False), wanted)
    assert module.num_batches_tracked == 0
    assert (module.running_mean == 0).all()


@pytest.mark.parametrize("arguments", [{}, {"moving_variance_estimator": "biased"}], ids=str)
def test_several_forwards_in_every_mode_then_one_backward(arguments: dict[str, Any]) -> None:
    # torch's own module gives the eval call the gradient of statistics that later calls moved.
    def run(together: bool) -> list[Any]:
        module, losses, grads = BatchNorm1d(3, **arguments), [], []
        leaves = [normal(6, 3, seed=seed).requires_grad_() for seed in range(4)]
        for leaf, training in zip(leaves, [True, False, True, True], strict=True):
            module.train(training)
            loss = (module(leaf) * normal(6, 3, seed=9)).sum()
            if together:
                losses.append(loss)
            else:
                grads += torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            module.running_var.fill_(100.0)
        return list(torch.autograd.grad(losses, leaves)) if together else grads

    for got, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(got, wanted)


def test_the_buffers_stay_the_same_tensors() -> None:
    module = BatchNorm1d(3, moving_variance_estimator="biased")
    held = module.running_mean
    module(normal(6, 3))
    assert module.running_mean is held
    assert held.abs().sum() > 0


@pytest.mark.parametrize("arguments", [{}, {"moving_variance_estimator": "biased"}], ids=str)
def test_masked_rows_take_no_part(arguments: dict[str, Any]) -> None:
    masked, plain = BatchNorm1d(3, **arguments), BatchNorm1d(3, **arguments)
    x = normal(6, 3)
    mask = torch.tensor([True, True, False, True, True, False])
    y = masked(x, mask)
    torch.testing.assert_close(y[mask], plain(x[mask]))
    torch.testing.assert_close(masked.running_var, plain.running_var)
    assert masked.num_batches_tracked == 1
    masked(x, torch.zeros(6))
    assert masked.num_batches_tracked == 1


@pytest.mark.parametrize(("module", "rank"), [(BatchNorm1d, 4), (BatchNorm2d, 3), (BatchNorm3d, 4)])
def test_ranks_are_checked_as_torch_checks_them(module: Any, rank: int) -> None:
    with pytest.raises(InputError, match=f"got {rank}D"):
        module(3)(torch.zeros((2, 3, 2, 2)[:rank]))


def test_inputs_that_do_not_fit_are_refused() -> None:
    module = BatchNorm1d(3)
    for x in (torch.zeros(4, 5), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(1, 3)):
        with pytest.raises(InputError):
            module(x)
    with pytest.raises(SpecError, match="num_features"):
        BatchNorm1d(0)
    module = BatchNorm1d(3, track_running_stats=False)
    module.frozen_statistics = True
    with pytest.raises(InputError, match="frozen_statistics"):
        module(torch.zeros(4, 3))


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_any_input_dtype_goes_with_any_parameter_dtype(training: bool, dtype: Any, x_dtype: Any) -> None:
    module = BatchNorm2d(3, dtype=dtype, stats_dtype=torch.float32).train(training)
    x = normal(4, 3, 2, 2, dtype=x_dtype).requires_grad_()
    y = module(x)
    dx, dgamma = torch.autograd.grad(y, [x, module.weight], torch.ones_like(y))
    assert (y.dtype, dx.dtype, dgamma.dtype) == (x_dtype, x_dtype, dtype)
    assert module.running_var.dtype == torch.float32


def test_repr_says_what_differs_from_torch() -> None:
    assert repr(BatchNorm2d(3)) == repr(torch.nn.BatchNorm2d(3))
    assert "moving_variance_estimator='biased'" in repr(BatchNorm2d(3, moving_variance_estimator="biased"))
