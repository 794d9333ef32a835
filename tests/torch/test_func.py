"""torch.func: transforms of a module that trains, which torch.nn's refuses, and of the function."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, BatchNormState, Renorm, UnsupportedError

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
func, nn = torch.func, torch.nn
BatchNorm1d, BatchNorm2d = bnlayer_torch.BatchNorm1d, bnlayer_torch.BatchNorm2d

OPTIONS: list[dict[str, Any]] = [
    {},
    {"moving_variance_estimator": "biased"},
    {"momentum": None},
    {"zero_debias": "mean"},
    {"renorm": Renorm(), "moving_variance_estimator": "biased"},
    {"virtual_batch_size": 3},
]


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def twins(arguments: dict[str, Any], *, training: bool = True) -> tuple[Any, Any]:
    module = BatchNorm1d(3, dtype=torch.float64, **arguments).train(training)
    module(normal(6, 3, seed=9))
    return module, copy.deepcopy(module)


def same_statistics(one: Any, other: Any) -> None:
    for (name, got), (_, wanted) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(got), name
        torch.testing.assert_close(got, wanted, msg=name)


def loss(y: Any) -> Any:
    return (y * torch.cos(y)).sum()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_grad_of_a_module_is_autograds_and_updates_once(arguments: dict[str, Any], training: bool) -> None:
    module, reference = twins(arguments, training=training)
    x = normal(6, 3)
    parameters = dict(module.named_parameters())

    def objective(parameters: Any, x: Any) -> Any:
        return loss(func.functional_call(module, parameters, (x,)))

    (dparameters, dx), value = func.grad_and_value(objective, argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    expected = loss(reference(leaf))
    wanted = torch.autograd.grad(expected, [leaf, *reference.parameters()])
    torch.testing.assert_close(value, expected)
    for got, want in zip([dx, *dparameters.values()], wanted, strict=True):
        torch.testing.assert_close(got, want)
    same_statistics(module, reference)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_jacobians_hessians_and_tangents(arguments: dict[str, Any], training: bool) -> None:
    module, reference = twins(arguments, training=training)
    x, tangent = normal(6, 3), normal(6, 3, seed=1)

    def pure(x: Any) -> Any:
        return reference(x, update_stats=False)

    jacobian = torch.autograd.functional.jacobian(pure, x)
    torch.testing.assert_close(func.jacrev(module)(x), jacobian)
    # Of renorm, which reads what the call before has updated, each transform gets a module of its own.
    module = copy.deepcopy(reference)
    torch.testing.assert_close(func.jacfwd(module)(x), jacobian)
    module = copy.deepcopy(reference)
    y, dy = func.jvp(module, (x,), (tangent,))
    torch.testing.assert_close(y, pure(x))
    torch.testing.assert_close(dy, torch.einsum("ijkl,kl->ij", jacobian, tangent))
    before = copy.deepcopy(reference)
    torch.testing.assert_close(
        func.hessian(lambda x: loss(before(x)))(x), torch.autograd.functional.hessian(lambda x: loss(pure(x)), x)
    )
    # One update a call, whatever the transform evaluates.
    reference(x)
    same_statistics(module, reference)
    same_statistics(before, reference)


@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_an_ensemble_updates_each_members_statistics(arguments: dict[str, Any]) -> None:
    members = [BatchNorm1d(3, dtype=torch.float64, **arguments) for _ in range(2)]
    with torch.no_grad():
        for seed, member in enumerate(members):
            member.weight.copy_(normal(3, seed=seed))
            member(normal(6, 3, seed=seed + 5))
    references = copy.deepcopy(members)
    parameters, buffers = func.stack_module_state(members)
    x = normal(2, 6, 3)

    def call(parameters: Any, buffers: Any, x: Any) -> Any:
        return func.functional_call(members[0], (parameters, buffers), (x,))

    ys = func.vmap(call)(parameters, buffers, x)
    for i, reference in enumerate(references):
        torch.testing.assert_close(ys[i], reference(x[i]))
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer, msg=name)
    # With derivatives inside of it, too.
    ensemble = func.vmap(func.grad(lambda p, b, x: loss(call(p, b, x))))(parameters, buffers, x)
    for i, reference in enumerate(references):
        wanted = torch.autograd.grad(loss(reference(x[i])), list(reference.parameters()))
        for got, want in zip(ensemble.values(), wanted, strict=True):
            torch.testing.assert_close(got[i], want)
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer, msg=name)


@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_vmap_over_examples_without_an_update(arguments: dict[str, Any]) -> None:
    module, _ = twins(arguments)
    before = copy.deepcopy(module)
    x = normal(2, 6, 3)
    ys = func.vmap(lambda x: module(x, update_stats=False))(x)
    torch.testing.assert_close(ys, torch.stack([module(each, update_stats=False) for each in x]))
    module.eval()
    torch.testing.assert_close(func.vmap(module)(x), torch.stack([module(each) for each in x]))
    same_statistics(module, before)


@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_vmap_that_would_need_many_statistics_says_what_to_do(arguments: dict[str, Any]) -> None:
    module, before = twins(arguments)
    with pytest.raises(UnsupportedError, match="update_stats=False"):
        func.vmap(module)(normal(2, 6, 3))
    same_statistics(module, before)


def test_the_function_returns_each_examples_statistics() -> None:
    spec = BatchNormSpec(3, axis=1, decay=0.5)
    state = BatchNormState(
        gamma=normal(3), beta=normal(3, seed=1), moving_mean=torch.zeros(3).double(),
        moving_variance=torch.ones(3).double(), num_updates=torch.tensor(4),
    )  # fmt: skip

    def call(x: Any) -> Any:
        y, after = bnlayer_torch.batch_norm(x, state, spec, training=True)
        return y, after.moving_mean, after.moving_variance, after.num_updates

    x = normal(2, 6, 3)
    mapped = func.vmap(call, out_dims=(0, 0, 0, None))(x)
    for i in range(2):
        for got, wanted in zip(mapped[:3], call(x[i]), strict=False):
            torch.testing.assert_close(got[i], wanted)
    assert mapped[3] == 5
    per_example = func.vmap(func.grad(lambda x: loss(call(x)[0])))(x)
    for i in range(2):
        torch.testing.assert_close(per_example[i], func.grad(lambda x: loss(call(x)[0]))(x[i]))


def test_what_torch_func_does_to_batch_norms_it_does_to_ours() -> None:
    model = nn.Sequential(BatchNorm1d(3), nn.ReLU())
    func.replace_all_batch_norm_modules_(model)
    assert not model[0].spec.track_moving_stats
    x = normal(2, 6, 3, dtype=torch.float32)
    torch.testing.assert_close(func.vmap(model)(x)[0], model(x[0]))


def test_forward_mode_without_torch_func() -> None:
    import torch.autograd.forward_ad as forward

    module, reference = twins({})
    x, tangent = normal(6, 3), normal(6, 3, seed=1)
    with forward.dual_level():
        y, dy = forward.unpack_dual(module(forward.make_dual(x, tangent)))
    jacobian = torch.autograd.functional.jacobian(lambda x: reference(x, update_stats=False), x)
    torch.testing.assert_close(dy, torch.einsum("ijkl,kl->ij", jacobian, tangent))
    torch.testing.assert_close(y, reference(x))
    same_statistics(module, reference)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"momentum": None}, {"virtual_batch_size": 2}], ids=str)
def test_a_modules_gradients_to_second_order(arguments: dict[str, Any], weighted: bool, training: bool) -> None:
    # Of renorm, differences would see r and d move; tests/torch/test_options.py has its gradients at the clips.
    module = BatchNorm1d(2, dtype=torch.float64, **arguments).train(training)
    module(normal(6, 2, seed=9))
    weights = torch.tensor([0.5, 1.0, 0.25, 2.0], dtype=torch.float64)

    def function(x: Any, weight: Any, bias: Any) -> Any:
        tensors = {"weight": weight, "bias": bias}
        given = (x, weights) if weighted else (x,)
        return func.functional_call(module, tensors, given, {"update_stats": False})

    leaves = [normal(4, 2).requires_grad_(), *(normal(2, seed=s).requires_grad_() for s in (1, 2))]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
