"""Which way a batch's own statistics come: each is right wherever it can be taken, and the fast ones are taken."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm
from bnlayer_conformance import runner
from bnlayer_conformance.vector import load
from bnlayer_torch.backend import BACKEND

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")

from bnlayer_torch import layer  # noqa: E402 - they import torch
from bnlayer_torch.fused import at_once  # noqa: E402
from bnlayer_torch.paths import PATHS  # noqa: E402

BatchNorm1d, BatchNorm2d, batch_norm = bnlayer_torch.BatchNorm1d, bnlayer_torch.BatchNorm2d, bnlayer_torch.batch_norm
IMAGES, ROWS = (16, 32, 12, 12), (500, 6)


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def found(x: Any, state: Any, spec: BatchNormSpec, weights: Any = None) -> Any:
    return batch_norm(x, state, spec, training=True, weights=weights)


@pytest.mark.parametrize(
    "path", ["native", "checked", "rows", "columns", "weighted", "composite", "pieces", "foldings"]
)
def test_every_vector_holds_on_every_path(path: str) -> None:
    with PATHS.forced(path) as taken:
        results = [runner.run_vector(vector, BACKEND) for vector in load()]
    assert not [f"{r.vector}: {r.reason}" for r in results if r.status != "pass"]
    assert taken[path] > 0


@pytest.mark.parametrize(
    ("x", "path"),
    [
        (normal(*IMAGES), "rows"),
        (normal(*IMAGES).to(memory_format=torch.channels_last), "checked"),
        (normal(8, 64), "native"),
        (normal(64, 64), "native"),
        (normal(4096, 64), "checked"),
        (normal(4096, 64, dtype=torch.float64), "columns"),
        (normal(2, 3, 4, 4), "native"),
    ],
    ids=["NCHW", "channels_last", "8x64", "64x64", "4096x64", "float64", "small"],
)
def test_what_ordinary_calls_take(x: Any, path: str) -> None:
    module = (BatchNorm2d if x.dim() == 4 else BatchNorm1d)(x.shape[1], dtype=x.dtype)
    spec = BatchNormSpec(x.shape[1], axis=1)
    ones = torch.ones(x.shape[1], dtype=x.dtype)
    state = BatchNormState(gamma=ones, beta=ones, moving_mean=ones, moving_variance=ones)
    with PATHS.forced() as taken:
        module(x)
        batch_norm(x, state, spec, training=True)
        module.eval()(x)
    assert dict(taken) == ({path: 2})


def told(path: str, seed: int = 0) -> Any:
    """Inputs for the path, (n, C) as float64 and how to lay them out: channels that lie on each side of its guard."""
    shape = IMAGES if path == "rows" else ROWS
    rng = np.random.default_rng(seed)
    count = shape[0] * int(np.prod(shape[2:]))
    scale = np.array([1.0, 1.0, 1.0, 1e-3, 1e-3, 1.0])
    offset = np.array([0.0, 1.9, 2.1, 1.0, 1e3, 1e6])
    values = rng.standard_normal((count, 6)) * scale + offset
    constants = np.array([0.0, 0.1, -3.7e9, 12345.678, 1e-4, 1e-30])
    two = np.where(rng.random((count, 2)) < 0.5, 0.1, [0.0, 1.1])
    return np.concatenate([values, np.broadcast_to(constants, (count, 6)), two], 1).astype(np.float32)


def laid_out(flat: Any, path: str) -> Any:
    if path != "rows":
        return torch.from_numpy(flat)
    n, _, h, w = IMAGES
    return torch.from_numpy(flat).reshape(n, h, w, -1).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("chosen", ["all", "each"])
@pytest.mark.parametrize("path", ["rows", "columns", "checked"])
def test_both_sides_of_every_guard(path: str, chosen: str) -> None:
    # Together the channels that need it drive all into the second pass; each alone is on its own side.
    every = told(path)
    if path == "checked" and chosen == "each":
        every = every[:, :-3]  # these are where the kernel drifts and the check does not tell: the test below
    batches = [every] if chosen == "all" else [every[:, i : i + 1].copy() for i in range(every.shape[1])]
    for flat in batches:
        count, channels = flat.shape
        wide = flat.astype(np.float64)
        mean, variance = wide.mean(0), wide.var(0)
        spec = BatchNormSpec(channels, axis=1, decay=0.0, moving_variance_estimator="biased")
        ones = torch.ones(channels)
        state: Any = BatchNormState(gamma=ones, beta=0 * ones, moving_mean=ones, moving_variance=ones)
        x = laid_out(flat, path)
        with PATHS.forced(path) as taken:
            y, after = found(x, state, spec)
        assert taken[path] == 1
        # The bounds of bnlayer_conformance.bounds.
        ku = (8 + count**0.5) * 2.0**-24
        rms, sd = np.sqrt(mean**2 + variance), np.sqrt(variance + spec.epsilon)
        assert (np.abs(after.moving_mean.numpy() - mean) <= ku * rms + 1e-38).all()
        assert (np.abs(after.moving_variance.numpy() - variance) <= ku * variance + (ku * rms) ** 2 + 1e-38).all()
        xhat = (wide - mean) / sd
        error = np.abs(y.movedim(1, -1).reshape(count, -1).numpy() - xhat)
        rounding = 2.0**-24 * np.abs(xhat)
        assert (error <= ku * (rms / sd + np.abs(xhat)) + rounding + 1e-38).all()


@pytest.mark.parametrize("column", [-3, -2, -1], ids=["a constant that epsilon hides", "0 and .1", ".1 and 1.1"])
def test_where_the_check_does_not_tell_the_accuracy_is_torch_nns(column: int) -> None:
    x = torch.from_numpy(told("checked")[:, [column]])
    ours, theirs = BatchNorm1d(1, momentum=1.0), torch.nn.BatchNorm1d(1, momentum=1.0)
    with PATHS.forced("checked") as taken:
        y = ours(x)
    assert taken["checked"] == 1
    assert torch.equal(y, theirs(x))
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_common_call_of_a_module_is_computed_at_once(layout: str, passes: bool, grad: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    every = told("rows" if layout == "channels_last" else "checked")
    x = laid_out(every[:, :3] * (1 if passes else [1, 1, 0]) + (0 if passes else [0, 0, 5]), "columns").float()
    if layout == "channels_last":
        x = x.view(IMAGES[0], *IMAGES[2:], 3).permute(0, 3, 1, 2)
    came: list[Any] = []
    monkeypatch.setattr(layer, "at_once", lambda *given: came.append(at_once(*given)) or came[-1])
    module = (BatchNorm1d if layout == "rows" else BatchNorm2d)(3, momentum=0.25)
    wanted, dy = copy.deepcopy(module), normal(*x.shape, seed=1)
    results = []
    for one, path in ((module, None), (wanted, "checked")):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(grad)
        if path is None:
            y = one(leaf)
        else:
            with PATHS.forced(path) as taken:
                y = one(leaf)
            assert dict(taken) == {"checked": 1}
        gradients = torch.autograd.grad(y, [leaf, *one.parameters()], dy) if grad else ()
        results.append([y, *gradients, *one.buffers()])
    assert [found and found[1] for found in came] == [passes, None]
    for got, right in zip(*results, strict=True):
        assert torch.equal(got, right)


def test_what_is_not_a_common_call_is_not_computed_at_once(monkeypatch: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, ones, zeros = normal(500, 3), torch.ones(3), torch.zeros(3)

    def found(x: Any) -> Any:
        return at_once(x, ones, zeros, ones.clone(), ones.clone(), 0.1, 1e-5, len(x))

    assert found(x)[1]
    assert found(x[:16]) is None  # short sums do not drift
    assert found(x.double()) is None
    assert found(x.t().contiguous().t()) is None
    assert at_once(normal(*IMAGES), *[torch.ones(IMAGES[1])] * 4, 0.1, 1e-5, 2304) is None
    assert torch.func.vmap(lambda x: torch.ones(()) * (found(x) is None))(x.expand(2, -1, -1)).all()
    with torch.autograd.forward_ad.dual_level():
        assert found(x) is None
    with FlopCounterMode(display=False):
        assert found(x) is None
    seen: list[Any] = []
    leaf = x.clone().requires_grad_()
    leaf.register_hook(lambda _: seen.append(found(x)))
    leaf.sum().backward()
    assert seen == [None]


@pytest.mark.parametrize("path", ["rows", "columns", "checked"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_what_cannot_be_squared_comes_as_from_the_kernel(path: str, bad: float) -> None:
    flat = told(path)[:, :3].copy()
    flat[7, 1] = bad
    spec = BatchNormSpec(3, axis=1, decay=0.0)
    state = BatchNormState(
        gamma=torch.ones(3), beta=torch.ones(3), moving_mean=torch.ones(3), moving_variance=torch.ones(3)
    )
    both = []
    for way in (path, "native"):
        with PATHS.forced(way):
            y, after = batch_norm(laid_out(flat, path), state, spec, training=True)
        both.append((y, after.moving_mean, after.moving_variance))
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["rows", "columns", "checked"])
def test_a_module_whose_batch_fails_the_check_updates_once(path: str) -> None:
    x = laid_out(told(path), path)
    module = (BatchNorm2d if path == "rows" else BatchNorm1d)(x.shape[1], momentum=0.25)
    wanted = copy.deepcopy(module)
    with PATHS.forced(path):
        module(x)
    with PATHS.forced("native"):
        wanted(x)
    assert module.num_batches_tracked == 1
    torch.testing.assert_close(module.running_mean, wanted.running_mean)
    # The kernel's variance at a mean of 1e6 is off by the square of that mean's rounding.
    torch.testing.assert_close(module.running_var, wanted.running_var, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 40001), (3, 2, 1, 16385), (257, 3), (1031, 7), (9973, 2), (40, 5000)])
def test_lengths_that_nothing_divides(shape: tuple[int, ...]) -> None:
    path = "columns" if len(shape) == 2 else "rows"
    x = normal(*shape) + 1
    spec = BatchNormSpec(shape[1], axis=1, decay=0.0)
    ones = torch.ones(shape[1])
    state = BatchNormState(gamma=ones, beta=ones, moving_mean=ones, moving_variance=ones)
    with PATHS.forced(path) as taken:
        _, after = found(x, state, spec)
    assert taken[path] == 1
    wide = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(after.moving_mean.double(), wide.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(after.moving_variance.double(), wide.var(1, correction=0), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("path", "shape", "axis"),
    [("rows", (3, 2, 4), 1), ("rows", (2, 3, 2, 2), 1), ("rows", (2, 2, 3, 2), 2), ("columns", (6, 2), 1),
     ("columns", (2, 3, 2), -1), ("checked", (6, 2), 1)],
)  # fmt: skip
@pytest.mark.parametrize(("center", "scale"), [(True, True), (True, False), (False, False)])
def test_gradients_to_second_order(path: str, shape: tuple[int, ...], axis: int, center: bool, scale: bool) -> None:
    features = shape[axis]
    spec = BatchNormSpec(features, axis=axis, epsilon=1e-2, center=center, scale=scale, track_moving_stats=False)
    leaves = [normal(*shape, dtype=torch.float64), *(normal(features, seed=s, dtype=torch.float64) for s in (1, 2))]
    given = [leaf.requires_grad_() for leaf, there in zip(leaves, (True, scale, center), strict=True) if there]

    def function(x: Any, *rest: Any) -> Any:
        parameters = list(rest)
        gamma = parameters.pop(0) if scale else None
        state = BatchNormState(gamma=gamma, beta=parameters.pop(0) if center else None)
        return batch_norm(x, state, spec, training=True)[0]

    with PATHS.forced(path) as taken:
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)
    assert taken[path] > 0


@pytest.mark.parametrize("path", ["rows", "checked"])
def test_derivatives_that_no_graph_gives_come_another_way(path: str) -> None:
    x = normal(*IMAGES) if path == "rows" else normal(4096, 3)
    module = (BatchNorm2d if path == "rows" else BatchNorm1d)(x.shape[1])
    tangent = normal(*x.shape, seed=1)
    leaf = x.clone().requires_grad_()
    with PATHS.forced() as taken:
        y = module(leaf)
        (wanted,) = torch.autograd.grad(y, leaf, tangent)
        assert taken[path] == 1
    gradient = torch.func.vjp(lambda x: module(x, update_stats=False), x)[1](tangent)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    _, dy = torch.func.jvp(lambda x: module(x, update_stats=False), (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = module(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, dy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["rows", "columns"])
def test_several_gradients_at_a_time(path: str) -> None:
    x = (normal(2, 3, 4) if path == "rows" else normal(8, 3)).requires_grad_()
    module = BatchNorm1d(3)
    with PATHS.forced(path) as taken:
        y = module(x)
    assert taken[path] == 1
    dys = torch.stack([normal(*x.shape, seed=s) for s in (1, 2)])
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for got, dy in zip(together, dys, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, x, dy, retain_graph=True)[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("path", ["rows", "columns", "checked"])
def test_a_checkpoint_recomputes_without_an_update(path: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    x = laid_out(told(path), path)[:, :6].contiguous()
    module = (BatchNorm2d if path == "rows" else BatchNorm1d)(6)
    plain = copy.deepcopy(module)
    gradients = []
    with PATHS.forced(path):
        for call in (lambda x: checkpoint(module, x, use_reentrant=reentrant), plain):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            gradients.append(torch.autograd.grad(y, leaf, torch.cos(y)) if not reentrant else _backward(y, leaf))
    torch.testing.assert_close(*gradients)
    for (name, got), (_, wanted) in zip(module.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(got, wanted, msg=name)


def _backward(y: Any, leaf: Any) -> Any:
    y.backward(torch.cos(y.detach()))
    return (leaf.grad,)


def test_autocast_does_not_round_the_sums() -> None:
    x = normal(*IMAGES) + 3
    module = BatchNorm2d(x.shape[1])
    with torch.autocast("cpu", dtype=torch.bfloat16), PATHS.forced() as taken:
        module(x)
    assert taken["rows"] == 1
    torch.testing.assert_close(module.running_mean, 0.1 * x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)


WEIGHTED_IMAGES: Any = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("layout", [*WEIGHTED_IMAGES, "rows"])
def test_weighted_statistics_on_both_sides_of_the_guard(layout: str, boolean: bool) -> None:
    every = told("rows" if layout != "rows" else "columns")
    draw = np.random.default_rng(3).uniform(0, 1, len(every)).astype(np.float32)
    weights = draw > 0.3 if boolean else np.where(draw > 0.1, draw, 0)
    for flat in [every, *(every[:, i : i + 1].copy() for i in range(every.shape[1]))]:
        count, channels = flat.shape
        p = weights.astype(np.float64) / weights.astype(np.float64).sum()
        wide = flat.astype(np.float64)
        mean = p @ wide
        variance = p @ (wide - mean) ** 2
        spec = BatchNormSpec(channels, axis=1, decay=0.0, moving_variance_estimator="biased")
        ones = torch.ones(channels)
        state: Any = BatchNormState(gamma=ones, beta=0 * ones, moving_mean=ones, moving_variance=ones)
        x, w = laid_out(flat, "columns"), torch.from_numpy(weights)
        if layout != "rows":
            x = laid_out(flat, "rows").contiguous(memory_format=WEIGHTED_IMAGES[layout])
            w = w.reshape(IMAGES[0], *IMAGES[2:])
        with PATHS.forced() as taken:
            y, after = found(x, state, spec, w)
        assert dict(taken) == {"weighted": 1}
        assert int(after.num_updates) == 1
        # The bounds of bnlayer_conformance.bounds.
        ku = (8 + count**0.5) * 2.0**-24
        rms, sd = np.sqrt(mean**2 + variance), np.sqrt(variance + spec.epsilon)
        assert (np.abs(after.moving_mean.numpy() - mean) <= ku * rms + 1e-38).all()
        assert (np.abs(after.moving_variance.numpy() - variance) <= ku * variance + (ku * rms) ** 2 + 1e-38).all()
        xhat = (wide - mean) / sd
        error = np.abs(y.movedim(1, -1).reshape(count, -1).numpy() - xhat)
        assert (error <= ku * (rms / sd + np.abs(xhat)) + 2.0**-24 * np.abs(xhat) + 1e-38).all()


@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 4), 1), ((2, 3, 2, 2), 1), ((2, 2, 3, 2), 2), ((6, 2), 1)])
@pytest.mark.parametrize(("center", "scale"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("renorm", [None, Renorm(r_max=2.5, r_min=2.5, d_max=0.2)])
def test_weighted_gradients_to_second_order(
    shape: tuple[int, ...], axis: int, center: bool, scale: bool, renorm: Renorm | None
) -> None:
    features = shape[axis]
    spec = BatchNormSpec(features, axis=axis, epsilon=1e-2, center=center, scale=scale, renorm=renorm)
    leaves = [normal(*shape, dtype=torch.float64), *(normal(features, seed=s, dtype=torch.float64) for s in (1, 2))]
    given = [leaf.requires_grad_() for leaf, there in zip(leaves, (True, scale, center), strict=True) if there]
    weights = normal(*[n for i, n in enumerate(shape) if i != axis], seed=5, dtype=torch.float64).clamp(min=0.0)
    ones = torch.ones(features, dtype=torch.float64)
    averages = {"moving_mean": ones, "moving_variance": ones}
    if renorm is not None:  # so far off that d is at its clip, and constant as r is in finite differences
        averages |= {"renorm_mean": 9 * ones, "renorm_stddev": ones / 9, "moving_stddev": ones}

    def function(x: Any, *rest: Any) -> Any:
        parameters = list(rest)
        gamma = parameters.pop(0) if scale else None
        state = BatchNormState(gamma=gamma, beta=parameters.pop(0) if center else None, **averages)
        return batch_norm(x, state, spec, training=True, weights=weights)[0]

    with PATHS.forced() as taken:
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)
    assert set(taken) == {"weighted"}


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), 1e18, 1e35])
@pytest.mark.parametrize("layout", WEIGHTED_IMAGES)
def test_what_a_mask_hides_changes_nothing_else(layout: str, hidden: float) -> None:
    x = normal(*IMAGES).contiguous(memory_format=WEIGHTED_IMAGES[layout])
    mask = torch.rand(IMAGES[0], *IMAGES[2:], generator=torch.Generator().manual_seed(1)) > 0.2
    dy = normal(*IMAGES, seed=2) * mask.unsqueeze(1)
    module = BatchNorm2d(IMAGES[1])
    results = []
    for under in (0.5, hidden):
        leaf = torch.where(mask.unsqueeze(1), x, under).requires_grad_()
        again = copy.deepcopy(module)
        y = again(leaf, mask)
        gradients = torch.autograd.grad(y, [leaf, again.weight, again.bias], dy)
        with torch.no_grad():
            alone = copy.deepcopy(module)(leaf, mask)
        seen = mask.unsqueeze(1).expand_as(y)
        results.append([y[seen], alone[seen], *gradients, again.running_mean, again.running_var])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_weights_come_in_differentiable_operations() -> None:
    x, weights = normal(*IMAGES), torch.ones(IMAGES[0]).requires_grad_()
    with PATHS.forced() as taken:
        y = BatchNorm2d(IMAGES[1])(x, weights)
        assert torch.autograd.grad(y, weights, x)[0].shape == weights.shape
        with torch.no_grad():
            BatchNorm2d(IMAGES[1])(x, weights)
    assert dict(taken) == {"weighted": 1}


@pytest.mark.parametrize("weights", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, float("nan")])])
def test_weights_that_cannot_be_are_refused_on_the_path(weights: Any) -> None:
    with pytest.raises(InputError, match="finite and not negative"):
        BatchNorm1d(3)(normal(2, 3), weights)


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1e-30, 1.0, 1e-30]])
def test_next_to_no_weight_comes_as_from_the_composite(weights: list[float]) -> None:
    x, results = normal(3, 2, dtype=torch.float64), []
    for path in ("weighted", "composite"):
        module = BatchNorm1d(2, dtype=torch.float64, momentum=1.0)
        with PATHS.forced(path):
            results.append([module(x, torch.tensor(weights)), module.running_mean, module.running_var])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("layout", "memory", "path"),
    [("consecutive", "NCHW", "pieces"), ("consecutive", "channels_last", "pieces"),
     ("strided", "channels_last", "pieces"), ("strided", "NCHW", "foldings")],
)  # fmt: skip
@pytest.mark.parametrize("renormed", [False, True])
def test_ghosts_by_either_path_are_the_same(layout: Any, memory: str, path: str, renormed: bool) -> None:
    options: dict[str, Any] = {"renorm": Renorm(), "moving_variance_estimator": "biased"} if renormed else {}
    shape = (16, 32, 24, 24)
    x = (normal(*shape) + 1).contiguous(memory_format=WEIGHTED_IMAGES[memory])
    dy, results = normal(*shape, seed=1), []
    for way, wanted in ((None, path), ("pieces", "pieces"), ("foldings", "foldings")):
        module = BatchNorm2d(32, virtual_batch_size=4, virtual_batch_layout=layout, **options)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with PATHS.forced(way) as taken:
            y = module(leaf)
        assert taken[wanted] == 1
        gradients = torch.autograd.grad(y, [leaf, module.weight, module.bias], dy)
        results.append([y, *gradients, *module.buffers()])
    for result in results[1:]:
        for got, wanted_tensor in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, wanted_tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("layout", "rows"), [("consecutive", 5), ("consecutive", 6), ("strided", 6)])
@pytest.mark.parametrize("axis", [1, 2])
def test_gradients_of_pieces_to_second_order(layout: Any, rows: int, axis: int) -> None:
    spec = BatchNormSpec(
        2, axis=axis, epsilon=1e-2, virtual_batch_size=3, virtual_batch_layout=layout, track_moving_stats=False
    )
    given = [
        normal(*shape, seed=i, dtype=torch.float64).requires_grad_()
        for i, shape in enumerate([(rows, 2, 2), (2,), (2,)])
    ]

    def function(x: Any, gamma: Any, beta: Any) -> Any:
        return batch_norm(x, BatchNormState(gamma=gamma, beta=beta), spec, training=True)[0]

    with PATHS.forced("pieces") as taken:
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)
    assert taken["pieces"] > 0


@pytest.mark.parametrize("kind", ["weights", "pieces"])
def test_several_gradients_at_a_time_of_options(kind: str) -> None:
    x = normal(8, 3, 4).requires_grad_()
    module = BatchNorm1d(3)
    if kind == "pieces":
        module.virtual_batch_size, module.virtual_batch_layout = 4, "consecutive"
    with PATHS.forced("pieces") as taken:
        y = module(x, torch.linspace(0, 1, 8) if kind == "weights" else None)
    assert taken["weighted" if kind == "weights" else kind] == 1
    dys = torch.stack([normal(*x.shape, seed=s) for s in (1, 2)])
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for got, dy in zip(together, dys, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, x, dy, retain_graph=True)[0])
