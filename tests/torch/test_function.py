"""`bnlayer_torch.batch_norm`: pure, differentiable to second order, and right where torch's own kernels are not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, BatchNormState, InputError

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
batch_norm = bnlayer_torch.batch_norm


def state_of(spec: BatchNormSpec, dtype: Any = torch.float64, *, grad: bool = False, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    count = spec.num_features

    def uniform() -> Any:
        return torch.rand(count, generator=draw, dtype=dtype) + 0.5

    return BatchNormState(
        gamma=uniform().requires_grad_(grad) if spec.scale else None,
        beta=uniform().requires_grad_(grad) if spec.center else None,
        moving_mean=uniform() if spec.track_moving_stats else None,
        moving_variance=uniform() if spec.track_moving_stats else None,
    )


def normal(*shape: int, seed: int = 1, dtype: Any = torch.float64) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def composite(x: Any, axis: int = 1, epsilon: float = 1e-5) -> Any:
    dims = [i for i in range(x.dim()) if i != axis % x.dim()]
    centered = x - x.mean(dims, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(dims, keepdim=True) + epsilon)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("center", "scale"), [*itertools.product([True, False], repeat=2)])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 2, 4), -1), ((2, 2, 3, 2), 2)])
def test_gradients_are_right_to_second_order(
    shape: tuple[int, ...], axis: int, center: bool, scale: bool, weighted: bool, training: bool
) -> None:
    spec = BatchNormSpec(shape[axis], axis=axis, epsilon=1e-2, center=center, scale=scale)
    state = state_of(spec)
    inputs = [normal(*shape).requires_grad_(), *state_of(spec, grad=True).arrays().values()][: 1 + center + scale]
    if weighted:
        weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
        inputs.append(weights.requires_grad_())

    def function(x: Any, *rest: Any) -> Any:
        rest_ = list(rest)
        gamma = rest_.pop(0) if scale else None
        beta = rest_.pop(0) if center else None
        now = state.replace(gamma=gamma, beta=beta)
        y, _ = batch_norm(x, now, spec, training=training, weights=rest_[0] if rest_ and training else None)
        return y

    if weighted and not training:
        inputs.pop()  # they have no part in y
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_weights_have_a_gradient_where_they_are_zero() -> None:
    spec = BatchNormSpec(3, axis=1)
    x, weights = normal(6, 3), torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    probe, step = normal(6, 3, seed=3), 1e-6

    def loss(w: Any) -> Any:
        return (batch_norm(x, state_of(spec), spec, training=True, weights=w)[0] * probe).sum()

    (got,) = torch.autograd.grad(loss(weights.requires_grad_()), weights)
    base = loss(weights.detach())
    for i in range(len(weights)):
        moved = weights.detach().clone()
        moved[i] += step
        assert (loss(moved) - base).item() / step == pytest.approx(got[i].item(), rel=1e-4, abs=1e-5)


def test_what_lies_under_a_mask_poisons_nothing() -> None:
    spec = BatchNormSpec(2, axis=1)
    mask = torch.tensor([True, True, False, True, False])
    clean, dy = normal(5, 2), normal(5, 2, seed=4)
    dy[~mask] = 0
    results = []
    for under in (0.0, float("nan"), float("inf"), 1e200):
        for weights in (mask, mask.double().requires_grad_()):
            x = clean.clone()
            x[~mask] = under
            state = state_of(spec, grad=True)
            x.requires_grad_()
            y, after = batch_norm(x, state, spec, training=True, weights=weights)
            grads = torch.autograd.grad(y, [x, state.gamma, state.beta], dy, retain_graph=True)
            results.append([y[mask], after.moving_mean, after.moving_variance, grads[0], grads[1], grads[2]])
            if weights.requires_grad:
                assert torch.isfinite(torch.autograd.grad(y, weights, dy)[0]).all()
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, wanted)


def test_without_weight_the_moving_statistics_normalize_and_stay() -> None:
    spec = BatchNormSpec(3, axis=1)
    state, x = state_of(spec, grad=True), normal(4, 3).requires_grad_()
    y, after = batch_norm(x, state, spec, training=True, weights=torch.zeros(4))
    wanted, _ = batch_norm(x, state, spec, training=False)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(after.moving_mean, state.moving_mean, rtol=0, atol=0)
    assert int(after.num_updates) == 0
    leaves, dy = [x, state.gamma, state.beta], normal(4, 3, seed=5)
    for got, expected in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_state_is_not_modified_and_what_comes_back_has_no_gradient() -> None:
    spec = BatchNormSpec(3, axis=1)
    state = state_of(spec, grad=True)
    before = {name: array.detach().clone() for name, array in state.arrays().items()}
    _, after = batch_norm(normal(8, 3).requires_grad_(), state, spec, training=True)
    for name, array in state.arrays().items():
        assert torch.equal(array, before[name])
    assert after.gamma is state.gamma
    assert not after.moving_mean.requires_grad
    assert not after.moving_variance.requires_grad
    assert after.num_updates == 1
    assert batch_norm(normal(8, 3), state, spec, training=True, update_stats=False)[1] is state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["rank 2", "contiguous", "channels-last", "transposed"])
def test_a_constant_channel_has_no_variance(layout: str, dtype: Any) -> None:
    # Adding up thousands of equal values one after the other drifts by hundreds of roundings.
    constants, count = torch.tensor([0.1, 100.0, 12345.678, -3.7e9], dtype=dtype), 4096
    flat = constants.expand(count, 4)
    x = {
        "rank 2": flat.contiguous(),
        "contiguous": flat.T.contiguous()[None],
        "channels-last": flat.reshape(4, 32, 32, 4).contiguous().permute(0, 3, 1, 2),
        "transposed": flat.T.contiguous().T,
    }[layout]
    spec = BatchNormSpec(4, axis=1, decay=0.0, center=False, scale=False)
    y, after = batch_norm(x, state_of(spec, dtype), spec, training=True)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(after.moving_mean, constants, rtol=unit, atol=0)
    assert (after.moving_variance <= (unit * constants) ** 2).all()
    assert (y.abs() <= 8 * unit * constants.abs().max() / 1e-5**0.5).all()


@pytest.mark.parametrize("training", [True, False])
def test_dx_is_right_whatever_the_layouts_of_x_and_dy(training: bool) -> None:
    # torch's backward kernel for the CPU misreads tensors that are contiguous and channels-last at once.
    spec = BatchNormSpec(2, axis=1, center=False, scale=False)
    state = state_of(spec)
    for shape in [(1, 2, 3, 3), (3, 2, 1, 4), (3, 2, 4, 1), (2, 2, 1, 1), (2, 2, 3, 3), (1, 2, 2, 1, 3)]:
        for axis in range(1, len(shape)):
            x0, dy0 = normal(*shape).movedim(1, axis).contiguous(), normal(*shape, seed=6).movedim(1, axis).contiguous()
            grads = []
            for x_order, dy_order in itertools.product([None, 1, 2], repeat=2):
                x, dy = (t if a is None else t.movedim(a, -1).contiguous().movedim(-1, a)
                         for t, a in ((x0, x_order), (dy0, dy_order)))  # fmt: skip
                x = x.detach().requires_grad_()
                y, _ = batch_norm(x, state, spec.replace(axis=axis), training=training)
                grads.append(torch.autograd.grad(y, x, dy)[0])
            x = x0.clone().requires_grad_()
            if training:
                grads.append(torch.autograd.grad(composite(x, axis), x, dy0)[0])
            for grad in grads[1:]:
                torch.testing.assert_close(grad, grads[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shape", [(40, 3), (6, 3, 5), (4, 3, 3, 3)])
def test_half_inputs_get_parameter_gradients_in_float32(
    shape: tuple[int, ...], scale: bool, training: bool, dtype: Any
) -> None:
    spec = BatchNormSpec(3, axis=1, scale=scale)
    state = state_of(spec, torch.float32, grad=True)
    x, dy = normal(*shape, dtype=dtype).requires_grad_(), normal(*shape, seed=7, dtype=dtype)
    y, after = batch_norm(x, state, spec, training=training)
    assert y.dtype == dtype
    assert after.moving_mean.dtype == torch.float32
    dims = [0, *range(2, len(shape))]
    dx, dbeta = torch.autograd.grad(y, [x, state.beta], dy)
    assert dx.dtype == dtype
    torch.testing.assert_close(dbeta, dy.double().sum(dims).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_a_half_input_is_rounded_once(dtype: Any) -> None:
    spec, weights = BatchNormSpec(3, axis=1), torch.arange(16.0)
    x, dy = normal(16, 3, dtype=dtype), normal(16, 3, seed=8, dtype=dtype)
    grads = []
    for given in (x.requires_grad_(), x.detach().float().requires_grad_()):
        y, _ = batch_norm(given, state_of(spec, torch.float32), spec, training=True, weights=weights)
        grads.append(torch.autograd.grad(y, given, dy.to(y.dtype))[0])
    assert torch.equal(grads[0], grads[1].to(dtype))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_comes_out_as_it_went_in(memory_format: Any) -> None:
    x = normal(40, 3, 4, 4, dtype=torch.float32).contiguous(memory_format=memory_format)
    y, _ = batch_norm(x, state_of(BatchNormSpec(3), torch.float32), BatchNormSpec(3, axis=1), training=True)
    assert y.is_contiguous(memory_format=memory_format)


def test_one_value_per_channel() -> None:
    spec = BatchNormSpec(3, axis=1, single_value="allow", moving_variance_estimator="unbiased", decay=0.5)
    state = state_of(spec)
    y, after = batch_norm(normal(1, 3), state, spec, training=True)
    torch.testing.assert_close(y, state.beta[None])
    torch.testing.assert_close(after.moving_variance, 0.5 * state.moving_variance)
    with pytest.raises(InputError, match="more than one value"):
        batch_norm(normal(1, 3), state, spec.replace(single_value="raise"), training=True)


def test_an_empty_batch_changes_nothing() -> None:
    spec = BatchNormSpec(3, axis=1)
    state, x = state_of(spec, grad=True), torch.zeros(0, 3, 4, dtype=torch.float64, requires_grad=True)
    y, after = batch_norm(x, state, spec, training=True)
    assert y.shape == x.shape
    assert after is state
    dx, dgamma, dbeta = torch.autograd.grad(y.sum(), [x, state.gamma, state.beta])
    assert dx.shape == x.shape
    assert (dgamma == 0).all()
    assert (dbeta == 0).all()


def test_an_epsilon_of_zero() -> None:
    spec = BatchNormSpec(3, axis=1, epsilon=0.0, center=False, scale=False)
    y, _ = batch_norm(normal(9, 3), state_of(spec), spec, training=True)
    torch.testing.assert_close(y, composite(normal(9, 3), epsilon=0.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_statistics_are_kept_out_channel_by_channel(bad: float) -> None:
    spec = BatchNormSpec(3, axis=1, nonfinite="keep")
    state, x = state_of(spec), normal(5, 3)
    x[2, 1] = bad
    _, after = batch_norm(x, state, spec, training=True)
    assert after.num_updates == 1
    assert after.moving_mean[1] == state.moving_mean[1]
    assert after.moving_variance[1] == state.moving_variance[1]
    assert (after.moving_mean[[0, 2]] != state.moving_mean[[0, 2]]).all()
    _, after = batch_norm(x, state, spec.replace(nonfinite="propagate"), training=True)
    assert not torch.isfinite(after.moving_mean[1])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(bad: float) -> None:
    spec = BatchNormSpec(3, axis=1)
    with pytest.raises(InputError, match="finite and not negative"):
        batch_norm(normal(3, 3), state_of(spec), spec, training=True, weights=torch.tensor([1.0, bad, 1.0]))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_only_proportions_of_weights_matter(scale: float) -> None:
    spec = BatchNormSpec(3, axis=1, moving_variance_estimator="unbiased")
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    wanted = batch_norm(normal(4, 3), state_of(spec), spec, training=True, weights=weights)
    got = batch_norm(normal(4, 3), state_of(spec), spec, training=True, weights=weights * scale)
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1].moving_variance, wanted[1].moving_variance)


def test_transforms_of_torch_func() -> None:
    spec = BatchNormSpec(3, axis=1)
    state, xs = state_of(spec), normal(4, 20, 3)

    def y_and_mean(x: Any) -> Any:
        y, after = batch_norm(x, state, spec, training=True)
        return y, after.moving_mean

    together = torch.func.vmap(y_and_mean)(xs)
    for i, x in enumerate(xs):
        for got, wanted in zip(together, y_and_mean(x), strict=True):
            torch.testing.assert_close(got[i], wanted)
    assert torch.func.jacrev(lambda x: y_and_mean(x)[0])(xs[0]).shape == (20, 3, 20, 3)


def test_inputs_that_do_not_fit_are_refused() -> None:
    spec = BatchNormSpec(3, axis=1)
    state = state_of(spec)
    for x in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(InputError):
            batch_norm(x, state, spec, training=False)
