"""Training calls with options that modules compute on their own tensors: the same as what `batch_norm` gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import InputError, Renorm, StateError

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")

from bnlayer_torch import layer  # noqa: E402 - it imports torch

BIASED = {"moving_variance_estimator": "biased"}
SHAPES: Any = {
    "NC": (64, 6),
    "NCHW": (8, 6, 5, 5),
    "channels_last": (8, 6, 5, 5),
    "large NCHW": (8, 32, 40, 40),
    "large channels_last": (8, 32, 40, 40),
    "large NC": (8192, 32),
}
OPTIONS: Any = {
    "mask": {},
    "weights": {},
    "small weights": {},
    "biased weights": BIASED,
    "renorm": {"renorm": Renorm(r_max=1.3, d_max=0.4), **BIASED},
    "clipped renorm": {"renorm": Renorm(r_max=1.0, r_min=1.0, d_max=0.0), **BIASED},
    "renormed mask": {"renorm": Renorm(), **BIASED},
    "strided ghosts": {"virtual_batch_size": 0},
    "consecutive ghosts": {"virtual_batch_size": 0, "virtual_batch_layout": "consecutive"},
    "biased ghosts": {"virtual_batch_size": 0, "virtual_batch_layout": "consecutive", **BIASED},
}
NOT_DIRECT = {("strided ghosts", "channels_last"), ("consecutive ghosts", "channels_last"),
              ("biased ghosts", "channels_last")}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(option: str, shape: tuple[int, ...], layout: str, **more: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """A module that has seen a batch, an input for it, and its weights."""
    fields = OPTIONS.get(option, {}) | more
    if "virtual_batch_size" in fields:
        fields["virtual_batch_size"] = shape[0] // 4
    cls = bnlayer_torch.BatchNorm2d if len(shape) == 4 else bnlayer_torch.BatchNorm1d
    module = cls(shape[1], **fields)
    with torch.no_grad():
        module.weight.copy_(normal(shape[1], seed=3)) if module.weight is not None else None
        module.bias.copy_(normal(shape[1], seed=4)) if module.bias is not None else None
        module(2 * normal(*shape, seed=5) + 1)
    order = torch.channels_last if "channels_last" in layout else torch.contiguous_format
    x = (normal(*shape) + 0.5).contiguous(memory_format=order)
    drawn = normal(shape[0], *shape[2:], seed=6).abs()
    if "mask" in option:
        return module, x, (drawn > 0.2,)
    return module, x, (drawn * 1e-9 if "small" in option else drawn,) if "weights" in option else ()


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("batch_norm was called")


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_y_gradients_and_averages_are_those_of_batch_norm(option: str, layout: str, monkeypatch: Any) -> None:
    module, x, weights = made(option, SHAPES[layout], layout)
    dy, results = normal(*x.shape, seed=1), []
    for name, instead in (("batch_norm", refuse), ("trained", lambda *_: None)):
        if name == "batch_norm" and (option, layout) in NOT_DIRECT:
            continue
        monkeypatch.undo()
        monkeypatch.setattr(layer, name, instead)
        again = copy.deepcopy(module)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = again(leaf, *weights)
        assert y.stride() == x.stride() or name == "trained"
        gradients = torch.autograd.grad(y, [leaf, again.weight, again.bias], dy)
        with torch.no_grad():
            torch.testing.assert_close(copy.deepcopy(module)(x, *weights), y.detach())
        assert again.num_batches_tracked == 2
        results.append([y, *gradients, *again.buffers()])
    for got, wanted in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("affine", "bias"), [(False, False), (True, False)])
def test_without_parameters(option: str, affine: bool, bias: bool, monkeypatch: Any) -> None:
    module, x, weights = made(option, SHAPES["NCHW"], "NCHW", affine=affine, bias=bias)
    wanted = copy.deepcopy(module)
    with torch.no_grad():
        monkeypatch.setattr(layer, "batch_norm", refuse)
        y = module(x, *weights)
        monkeypatch.undo()
        monkeypatch.setattr(layer, "trained", lambda *_: None)
        torch.testing.assert_close(y, wanted(x, *weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["mask", "weights", "renorm", "strided ghosts", "consecutive ghosts"])
@pytest.mark.parametrize("shape", [(8, 2), (8, 2, 3, 1)])
def test_gradients_to_second_order(option: str, shape: tuple[int, ...], monkeypatch: Any) -> None:
    module, x, weights = made(option, shape, "", eps=1e-2)
    module.double()
    monkeypatch.setattr(layer, "batch_norm", refuse)

    def function(x: Any, gamma: Any, beta: Any) -> Any:
        again = copy.deepcopy(module)
        if option == "renorm":  # r and d are constants to a gradient, and have to be in finite differences
            again.renorm = Renorm(r_max=1.5, r_min=1.5, d_max=0.0)
        return torch.func.functional_call(again, {"weight": gamma, "bias": beta}, (x, *weights))

    given = [t.detach().double().requires_grad_() for t in (x, module.weight, module.bias)]
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


OPTIONS_AND_NONE = ["none", "weights", "renorm", "strided ghosts", "consecutive ghosts"]


@pytest.mark.parametrize("option", OPTIONS_AND_NONE)
@pytest.mark.parametrize("layout", ["large NCHW", "large channels_last"])
def test_y_may_be_changed_in_place(option: str, layout: str) -> None:
    module, x, weights = made(option, SHAPES[layout], layout)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(leaf, *weights).relu_()
    y.sum().backward()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("layout", ["large NCHW", "large channels_last", "large NC"])
@pytest.mark.parametrize("ghosts", ["strided", "consecutive"])
def test_ghosts_with_a_large_mean_are_as_accurate(layout: str, ghosts: Any) -> None:
    shape = SHAPES[layout]
    module, x, _ = made(f"{ghosts} ghosts", shape, layout, momentum=1.0)
    x = x + 1000.0
    y = module(x).detach().double()
    groups = x.double().view(shape[0] // 4, 4, *shape[1:]) if ghosts == "strided" else None
    wide = groups.transpose(0, 1) if groups is not None else x.double().reshape(4, shape[0] // 4, *shape[1:])
    dims = [1, *range(3, wide.dim())]
    mean, variance = wide.mean(dims, keepdim=True), wide.var(dims, correction=0, keepdim=True)
    gamma, beta = (t.detach().double().view(-1, *[1] * (len(shape) - 2)) for t in (module.weight, module.bias))
    wanted = (wide - mean) / torch.sqrt(variance + module.eps) * gamma + beta
    got = y.view(shape[0] // 4, 4, *shape[1:]).transpose(0, 1) if groups is not None else y.reshape(wide.shape)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)  # x is rounded to 6e-5 at a mean of 1000
    torch.testing.assert_close(module.running_mean.double(), mean.mean(0).flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", [0.5, 3.0, 5.0, 1000.0])
@pytest.mark.parametrize("ghosts", ["strided", "consecutive"])
def test_gradients_of_ghosts_do_not_lose_to_the_mean(ghosts: Any, mean: float) -> None:
    # On both sides of the check of the sums; dy goes with xhat, so that dx is a small difference.
    shape = SHAPES["large channels_last"]
    module, x, _ = made(f"{ghosts} ghosts", shape, "large channels_last")
    leaf = (x + mean).clone(memory_format=torch.preserve_format).requires_grad_()
    dy = x + 0.1 * normal(*shape, seed=7)
    gradients = torch.autograd.grad(module(leaf), [leaf, module.weight, module.bias], dy)
    wide = leaf.detach().double().requires_grad_()
    rows = torch.arange(shape[0])
    members = [rows[g::4] if ghosts == "strided" else rows[2 * g : 2 * g + 2] for g in range(4)]
    gamma, beta = (t.detach().double().requires_grad_() for t in (module.weight, module.bias))
    for part in members:
        y = torch.nn.functional.batch_norm(wide[part], None, None, gamma, beta, True, eps=module.eps)
        y.backward(dy[part].double())
    for got, wanted in zip(gradients, (wide.grad, gamma.grad, beta.grad), strict=True):
        assert wanted is not None
        scale = dy.abs().max() if got.dim() == 4 else wanted.abs().max()
        # What any sum of so many may lose, and a few roundings of values as large as the mean.
        assert (got.double() - wanted).abs().max() <= (8 + 3200**0.5 + 4 * mean) * 2.0**-24 * scale


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_not_finite_comes_as_from_batch_norm(option: str, bad: float, monkeypatch: Any) -> None:
    module, x, weights = made(option, SHAPES["large channels_last"], "channels_last")
    x[3, 1, 2, 2] = bad
    wanted = copy.deepcopy(module)
    with torch.no_grad():
        y = module(x, *weights)
        monkeypatch.setattr(layer, "trained", lambda *_: None)
        torch.testing.assert_close(y, wanted(x, *weights), equal_nan=True, rtol=1e-4, atol=1e-4)
    for got, right in zip(module.buffers(), wanted.buffers(), strict=True):
        torch.testing.assert_close(got, right, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_that_cannot_be_are_refused(training: bool, bad: float) -> None:
    module, x, (weights,) = made("weights", SHAPES["NC"], "NC")
    weights[3] = bad
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad(), pytest.raises(InputError, match="finite and not negative"):
        module.train(training)(x, weights)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("shape", [(7,), (8, 5), (8, 6, 5, 5), (5, 5), (2, 8, 5, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...], training: bool) -> None:
    module, x, _ = made("weights", SHAPES["NCHW"], "NCHW")
    with torch.no_grad(), pytest.raises(InputError, match="weights must have shape"):
        module.train(training)(x, torch.ones(shape))


def test_eval_with_weights_is_eval_without(monkeypatch: Any) -> None:
    module, x, (weights,) = made("weights", SHAPES["NCHW"], "NCHW")
    monkeypatch.setattr(layer, "batch_norm", refuse)
    with torch.no_grad():
        assert torch.equal(module.eval()(x, weights), module(x))
        assert torch.equal(module(x, weights > 0.5), module(x))


def test_renorm_without_its_averages_is_refused() -> None:
    module = bnlayer_torch.BatchNorm1d(6, moving_variance_estimator="biased")
    module.renorm = Renorm()
    with pytest.raises(StateError, match="renorm_mean"):
        module(normal(*SHAPES["NC"]))
    assert module.num_batches_tracked == 0


def test_a_later_call_does_not_change_the_gradients_of_an_earlier_one() -> None:
    module, x, (mask,) = made("renormed mask", SHAPES["NCHW"], "NCHW")
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(copy.deepcopy(module)(leaf, mask).square().sum(), leaf)
    y = module(leaf, mask)
    module(x, mask)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaf)[0], wanted)
