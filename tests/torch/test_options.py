"""renorm, ghost batches, zero-debiased averages and adjustments in torch: the function and the modules."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest

import bnlayer
import bnlayer_torch
from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm, SpecError, StateError
from bnlayer.call import ghost_slices

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
batch_norm = bnlayer_torch.batch_norm
BatchNorm, BatchNorm1d = bnlayer_torch.BatchNorm, bnlayer_torch.BatchNorm1d
BatchNorm2d = bnlayer_torch.BatchNorm2d

LAYOUTS = ["strided", "consecutive"]
OPTIONS: list[dict[str, Any]] = [
    {"renorm": Renorm(r_max=1.3, d_max=0.4), "moving_variance_estimator": "biased"},
    {"virtual_batch_size": 3},
    {"virtual_batch_size": 3, "virtual_batch_layout": "consecutive", "zero_debias": "mean"},
    {"zero_debias": "all"},
    {"virtual_batch_size": 4, "renorm": Renorm(), "moving_variance_estimator": "biased"},
]
EXTRA = {
    "renorm": ["renorm_mean", "renorm_stddev", "moving_stddev"],
    "mean": ["hidden_mean"],
    "all": ["hidden_mean", "hidden_variance"],
}


def normal(*shape: int, seed: int = 1, dtype: Any = torch.float64) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state_of(spec: BatchNormSpec, dtype: Any = torch.float64, *, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    return BatchNormState(
        **{
            name: (torch.rand(spec.num_features, generator=draw, dtype=torch.float64) + 0.5).to(dtype)
            for name in BatchNormState.initial(spec).arrays()
        }
    )


def gradients_are_right(function: Any, inputs: list[Any]) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def positive(*shape: int) -> Any:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((5, 2), 1), ((4, 2, 3), -1)])
def test_gradients_of_renorm_to_second_order(shape: tuple[int, ...], axis: int, weighted: bool) -> None:
    # With averages far off, r and d are at their clips, and differences of the function see the same constants.
    spec = BatchNormSpec(shape[axis], axis=axis, epsilon=1e-2, renorm=Renorm(r_max=2.5, d_max=0.2))
    state = state_of(spec)
    far = state.replace(renorm_mean=state.renorm_mean + 9, renorm_stddev=state.renorm_stddev / 9)

    def function(x: Any, gamma: Any, beta: Any, *weights: Any) -> Any:
        now = far.replace(gamma=gamma, beta=beta)
        return batch_norm(x, now, spec, training=True, weights=weights[0] if weights else None)[0]

    x = normal(*shape)
    inputs = [x, far.gamma.clone(), far.beta.clone(), *([positive(shape[0])] if weighted else [])]
    gradients_are_right(function, inputs)


def test_no_gradient_flows_through_the_corrections_of_renorm() -> None:
    spec = BatchNormSpec(3, axis=1, epsilon=1e-2, renorm=Renorm(r_max=1.5))
    state, x, probe = state_of(spec), normal(6, 3).requires_grad_(), normal(6, 3, seed=3)

    def reference() -> Any:
        m, v = x.mean(0), x.var(0, correction=0)
        sd = torch.sqrt(v + spec.epsilon)
        r = (sd / state.renorm_stddev).clamp(max=1.5).detach()
        d = ((m - state.renorm_mean) / state.renorm_stddev).detach()
        return state.gamma * ((x - m) / sd * r + d) + state.beta

    results = []
    for y in (batch_norm(x, state, spec, training=True)[0], reference()):
        (dx,) = torch.autograd.grad((y * probe).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad((dx * normal(6, 3, seed=4)).sum(), x)
        results.append([y, dx, ddx])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "axis", "size"), [((6, 2), 1, 3), ((5, 2), 1, 2), ((5, 2, 2), 2, 3), ((7, 2, 2), 1, 3)]
)
def test_gradients_of_ghosts_to_second_order(
    shape: tuple[int, ...], axis: int, size: int, layout: Any, weighted: bool
) -> None:
    spec = BatchNormSpec(
        2, axis=axis, epsilon=0.1, virtual_batch_size=size, virtual_batch_layout=layout, single_value="allow"
    )
    state = state_of(spec)

    def function(x: Any, gamma: Any, beta: Any, *weights: Any) -> Any:
        now = state.replace(gamma=gamma, beta=beta)
        return batch_norm(x, now, spec, training=True, weights=weights[0] if weights else None)[0]

    x = normal(*shape)
    gradients_are_right(function, [x, state.gamma.clone(), state.beta.clone(), *([positive(shape[0])] * weighted)])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("narrow", [(3,), (4, 1), (4, 3), (1, 1)])
def test_gradients_of_an_adjustment_to_second_order(narrow: tuple[int, ...], weighted: bool) -> None:
    spec = BatchNormSpec(3, axis=1, epsilon=1e-2)
    state = state_of(spec)

    def function(x: Any, gamma: Any, s: Any, b: Any, *weights: Any) -> Any:
        now = state.replace(gamma=gamma)
        w = weights[0] if weights else None
        return batch_norm(x, now, spec, training=True, weights=w, adjustment=(s, b))[0]

    given = [normal(*narrow, seed=5), normal(4, 3, seed=6)]
    gradients_are_right(function, [normal(4, 3), state.gamma.clone(), *given, *([positive(4)] * weighted)])


@pytest.mark.parametrize("renorm", [None, Renorm(r_max=1.2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "size"), [(8, 4), (7, 3), (3, 5), (5, 2), (9, 2)])
def test_each_ghost_batch_is_normalized_like_a_batch(rows: int, size: int, layout: Any, renorm: Renorm | None) -> None:
    spec = BatchNormSpec(
        3, axis=1, virtual_batch_size=size, virtual_batch_layout=layout, renorm=renorm, single_value="allow"
    )
    alone = spec.replace(virtual_batch_size=None)
    state, x = state_of(spec), normal(rows, 3, 2)
    x = x.to(memory_format=torch.contiguous_format).transpose(1, 2).contiguous().transpose(1, 2)
    weights = torch.rand(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for w in (None, weights, weights > 0.3):
        y, after = batch_norm(x, state, spec, training=True, weights=w)
        assert int(after.num_updates) == 1
        means, totals = [], []
        for ghost in ghost_slices(spec, rows):
            of_ghost = None if w is None else w[ghost]
            wanted, its_state = batch_norm(x[ghost], state, alone, training=True, weights=of_ghost)
            torch.testing.assert_close(y[ghost], wanted)
            means.append(its_state.moving_mean)
            totals.append(torch.tensor(float(len(x[ghost]))) if of_ghost is None else of_ghost.double().sum())
        shares = torch.stack(totals) / torch.stack(totals).sum()
        torch.testing.assert_close(after.moving_mean, (shares[:, None] * torch.stack(means)).sum(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ghost_batch_without_weight_is_evaluated_and_enters_nothing(layout: Any) -> None:
    spec = BatchNormSpec(
        3, axis=1, virtual_batch_size=3, virtual_batch_layout=layout, moving_variance_estimator="unbiased"
    )
    state, x = state_of(spec), normal(7, 3)
    masked, *others = ghost_slices(spec, 7)
    mask = torch.ones(7, dtype=torch.bool)
    mask[masked] = False
    x[masked, 0] = float("nan")
    y, after = batch_norm(x, state, spec, training=True, weights=mask)
    evaluated, _ = batch_norm(x, state, spec, training=False)
    torch.testing.assert_close(y[masked], evaluated[masked], equal_nan=True)
    mean = sum(x[g].mean(0) * len(x[g]) for g in others) / sum(len(x[g]) for g in others)
    variance = sum(x[g].var(0) * len(x[g]) for g in others) / sum(len(x[g]) for g in others)
    torch.testing.assert_close(after.moving_mean, 0.9 * state.moving_mean + 0.1 * mean)
    torch.testing.assert_close(after.moving_variance, 0.9 * state.moving_variance + 0.1 * variance)
    _, after = batch_norm(x, state, spec, training=True, weights=torch.zeros(7))
    assert torch.equal(after.moving_mean, state.moving_mean)
    assert int(after.num_updates) == 0


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_only_proportions_of_weights_matter_between_ghosts(scale: float) -> None:
    spec = BatchNormSpec(3, axis=1, virtual_batch_size=2)
    state, x, weights = state_of(spec), normal(6, 3), positive(6)
    wanted = batch_norm(x, state, spec, training=True, weights=weights)
    got = batch_norm(x, state, spec, training=True, weights=weights * scale)
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1].moving_mean, wanted[1].moving_mean)


@pytest.mark.parametrize("options", [*OPTIONS, {"adjusted": True}], ids=str)
def test_what_lies_under_a_mask_poisons_nothing(options: dict[str, Any]) -> None:
    options = dict(options)
    pair = [normal(8, 1, seed=7), normal(2, seed=8)] if options.pop("adjusted", False) else []
    spec = BatchNormSpec(2, axis=1, **options)
    mask = torch.tensor([True, True, False, True, True, True, False, True])
    clean, dy = normal(8, 2), normal(8, 2, seed=4)
    dy[~mask] = 0
    results = []
    for under in (0.0, float("nan"), float("inf"), 1e200):
        for weights in (mask, mask.double().requires_grad_()):
            x, state = clean.clone(), state_of(spec)
            x[~mask] = under
            leaves = [x.requires_grad_(), state.gamma.requires_grad_(), state.beta.requires_grad_()]
            leaves += [tensor.clone().requires_grad_() for tensor in pair]
            adjustment = tuple(leaves[3:]) if pair else None
            y, after = batch_norm(x, state, spec, training=True, weights=weights, adjustment=adjustment)
            grads = torch.autograd.grad(y, leaves, dy, retain_graph=True)
            results.append([y[mask], after.moving_mean, after.moving_variance, *grads])
            if weights.requires_grad:
                assert torch.isfinite(torch.autograd.grad(y, weights, dy)[0]).all()
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("counter", [int, torch.tensor])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0 - 2.0**-40])
def test_zero_debias_loses_no_digits(decay: float, counter: Any) -> None:
    spec = BatchNormSpec(3, axis=1, decay=decay, zero_debias="all")
    zeros = {"hidden_mean": torch.zeros(3), "hidden_variance": torch.zeros(3)}
    state = state_of(spec, torch.float32).replace(**zeros, num_updates=counter(0))
    x = normal(16, 3, dtype=torch.float32)
    for _ in range(3):
        _, state = batch_norm(x, state, spec, training=True)
    torch.testing.assert_close(state.moving_mean, x.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state.moving_variance, x.var(0, correction=0), rtol=1e-5, atol=0)
    assert int(state.num_updates) == 3


def test_an_adjustment_is_for_training_with_weight_only() -> None:
    spec = BatchNormSpec(3, axis=1)
    state, x, pair = state_of(spec), normal(4, 3), (normal(3, seed=2), normal(4, 1, seed=3))
    evaluated, _ = batch_norm(x, state, spec, training=False)
    torch.testing.assert_close(batch_norm(x, state, spec, training=False, adjustment=pair)[0], evaluated)
    nothing = torch.zeros(4)
    torch.testing.assert_close(
        batch_norm(x, state, spec, training=True, adjustment=pair, weights=nothing)[0], evaluated
    )
    untracked = spec.replace(track_moving_stats=False)
    bare = BatchNormState(gamma=state.gamma, beta=state.beta)
    wanted, _ = batch_norm(x, bare, untracked, training=False)
    torch.testing.assert_close(batch_norm(x, bare, untracked, training=False, adjustment=pair)[0], wanted)
    for bad in ((normal(2), pair[1]), (pair[0], normal(1, 1, 4, 3))):
        for training in (True, False):
            with pytest.raises(InputError, match="broadcast"):
                batch_norm(x, state, spec, training=training, adjustment=bad)
    with pytest.raises(InputError, match="real"):
        batch_norm(x, state, spec, training=True, adjustment=(pair[0] * 1j, pair[1]))
    with pytest.raises(InputError, match="virtual_batch_size"):
        batch_norm(x, state, spec.replace(virtual_batch_size=2), training=True, adjustment=pair)


def test_clips_of_renorm_may_change_with_every_call() -> None:
    spec = BatchNormSpec(3, axis=1, renorm=Renorm(r_max=1.5, r_min=1.5, d_max=0.0))
    state, x = state_of(spec), normal(6, 3)
    fixed, _ = batch_norm(x, state, spec, training=True)
    for clips in ({"r_max": 2.0, "r_min": 0.5, "d_max": 1.0}, {"r_max": None, "r_min": None, "d_max": None}):
        instead = spec.replace(renorm=Renorm(**clips))
        wanted, _ = batch_norm(x, state, instead, training=True)
        assert not torch.allclose(wanted, fixed)
        as_tensors = {n: None if c is None else torch.tensor(c, requires_grad=True) for n, c in clips.items()}
        for given in (clips, as_tensors):
            got, _ = batch_norm(x, state, spec, training=True, renorm_clips=given)
            torch.testing.assert_close(got, wanted)
            assert not got.requires_grad
    for bad in ({"r": 1.0}, {"r_max": -1.0}, {"r_max": 1.0, "r_min": 2.0}):
        with pytest.raises(InputError):
            batch_norm(x, state, spec, training=True, renorm_clips=bad)
    with pytest.raises(InputError, match="renorm"):
        batch_norm(x, state, spec.replace(renorm=None), training=True, renorm_clips={"r_max": 1.0})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype: Any, options: dict[str, Any]) -> None:
    spec = BatchNormSpec(3, axis=1, **options)
    half, exact, dy = state_of(spec, torch.float32), state_of(spec, torch.float32), normal(12, 3, seed=2).to(dtype)
    results = []
    for state, x in ((half, normal(12, 3).to(dtype)), (exact, normal(12, 3).to(dtype).float())):
        leaves = [x.requires_grad_(), state.gamma.requires_grad_(), state.beta.requires_grad_()]
        y, after = batch_norm(x, state, spec, training=True)
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        results.append([y, grads[0], *grads[1:], after.moving_mean, after.moving_variance])
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        assert got.dtype == (dtype if i < 2 else torch.float32)
        torch.testing.assert_close(got, wanted.to(got.dtype), rtol=torch.finfo(got.dtype).eps * 4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_averages_that_a_state_lacks_are_named(options: dict[str, Any]) -> None:
    spec = BatchNormSpec(3, axis=1, **options)
    extra = [*EXTRA.get("renorm" if spec.renorm else spec.zero_debias, [])]
    if extra:
        with pytest.raises(StateError, match=extra[0]):
            batch_norm(normal(12, 3), state_of(spec.replace(renorm=None, zero_debias="none")), spec, training=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_transforms_of_torch_func(options: dict[str, Any]) -> None:
    spec = BatchNormSpec(3, axis=1, **options)
    state, xs = state_of(spec), normal(4, 20, 3)

    def y_and_variance(x: Any) -> Any:
        y, after = batch_norm(x, state, spec, training=True)
        return y, after.moving_variance

    together = torch.func.vmap(y_and_variance)(xs)
    for i, x in enumerate(xs):
        for got, wanted in zip(together, y_and_variance(x), strict=True):
            torch.testing.assert_close(got[i], wanted)


def keys(spec: BatchNormSpec) -> list[str]:
    extra = EXTRA["renorm"] if spec.renorm is not None else EXTRA.get(spec.zero_debias, [])
    return ["weight", "bias", "running_mean", "running_var", "num_batches_tracked", *extra]


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_modules_have_the_buffers_of_their_options_and_no_other(options: dict[str, Any]) -> None:
    module = BatchNorm1d(3, **options)
    assert list(module.state_dict()) == keys(module.spec)
    assert BatchNorm(module.spec).spec == module.spec
    assert {name: getattr(module.spec, name) for name in options} == options
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module) or (name, value) == ("moving_variance_estimator", "unbiased")
    module(normal(12, 3, dtype=torch.float32))
    other = BatchNorm1d(3, **options)
    other.load_state_dict(module.state_dict())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for again in (other, copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert again.spec == module.spec
        for mode in (True, False):
            x = normal(12, 3, seed=5, dtype=torch.float32)
            assert torch.equal(copy.deepcopy(again).train(mode)(x), copy.deepcopy(module).train(mode)(x))
    module.reset_running_stats()
    wanted = BatchNormState.initial(module.spec)
    for name, array in bnlayer.extract(module)[1].arrays().items():
        torch.testing.assert_close(torch.from_numpy(array), torch.from_numpy(getattr(wanted, name)))
    assert module.double().spec.stats_dtype == "float64"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_modules_do_what_the_function_does(options: dict[str, Any]) -> None:
    module = BatchNorm1d(3, dtype=torch.float64, momentum=0.3, **options)
    spec = module.spec
    held = dict(module.named_buffers())
    state = BatchNormState(**{n: torch.from_numpy(a) for n, a in BatchNormState.initial(spec).arrays().items()})
    for step, (training, update) in enumerate([(True, True), (True, False), (True, True), (False, True), (True, True)]):
        x = normal(12, 3, seed=step)
        y, state = batch_norm(x, state, spec, training=training, update_stats=update)
        torch.testing.assert_close(module.train(training)(x, update_stats=update), y)
        got = bnlayer.extract(module)[1]
        assert got.num_updates == state.num_updates
        for name, tensor in state.arrays().items():
            torch.testing.assert_close(torch.from_numpy(getattr(got, name)), tensor)
    for name, buffer in module.named_buffers():
        assert buffer is held[name]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_forwards_then_one_backward(options: dict[str, Any]) -> None:
    def run(together: bool) -> list[Any]:
        module, losses, grads = BatchNorm1d(3, **options), [], []
        leaves = [normal(12, 3, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(4)]
        for leaf, training in zip(leaves, [True, False, True, True], strict=True):
            loss = (module.train(training)(leaf) * normal(12, 3, seed=9, dtype=torch.float32)).sum()
            if together:
                losses.append(loss)
            else:
                grads += torch.autograd.grad(loss, leaf)
        return list(torch.autograd.grad(losses, leaves)) if together else grads

    for got, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(got, wanted)


def test_modules_pass_adjustment_and_clips_on() -> None:
    x, pair = normal(6, 3, dtype=torch.float32), (torch.full((3,), 2.0), torch.ones(6, 1))
    module = BatchNorm1d(3)
    torch.testing.assert_close(module(x, adjustment=pair), BatchNorm1d(3)(x) * 2 + 1)
    assert torch.equal(module.eval()(x, adjustment=pair), module(x))
    with pytest.raises(InputError, match="broadcast"):
        module(x, adjustment=(torch.ones(5), torch.ones(3)))
    with pytest.raises(InputError, match="renorm"):
        module(x, renorm_clips={})
    module = BatchNorm1d(3, renorm=Renorm(), moving_variance_estimator="biased")
    clips = {"r_max": 1.0, "r_min": torch.tensor(1.0), "d_max": 0.0}
    plain = BatchNorm1d(3, moving_variance_estimator="biased")
    torch.testing.assert_close(module(x, renorm_clips=clips), plain(x))


def test_attributes_are_the_truth() -> None:
    module, x = BatchNorm1d(3), normal(6, 3, dtype=torch.float32)
    module.virtual_batch_size = 3
    torch.testing.assert_close(module(x)[::2], BatchNorm1d(3)(x[::2]))
    module.virtual_batch_layout = "consecutive"
    torch.testing.assert_close(module(x)[:3], BatchNorm1d(3)(x[:3]))
    module.virtual_batch_size = 0
    with pytest.raises(SpecError, match="virtual_batch_size"):
        module(x)
    module = BatchNorm1d(3)
    module.zero_debias = "all"
    with pytest.raises(StateError, match="hidden_mean, hidden_variance"):
        module(x)
    module = BatchNorm1d(3)
    module.renorm = Renorm()
    with pytest.raises(SpecError, match="unbiased"):
        module(x)
    module.renorm = {"r_max": 3.0}
    with pytest.raises(SpecError, match="Renorm"):
        module(x)
    with pytest.raises(SpecError, match="Renorm"):
        BatchNorm1d(3, renorm={"r_max": 3.0}, moving_variance_estimator="biased")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frozen_statistics_are_evaluated(options: dict[str, Any]) -> None:
    module = BatchNorm1d(3, **options)
    module(normal(12, 3, dtype=torch.float32))
    module.frozen_statistics = True
    before = copy.deepcopy(module.state_dict())
    x = normal(2, 3, seed=1, dtype=torch.float32)
    assert torch.equal(module.train()(x), module.eval()(x))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_one_value_in_a_ghost_batch_is_refused() -> None:
    module = BatchNorm1d(3, virtual_batch_size=2)
    with pytest.raises(InputError, match="ghost batch of 2"):
        module(torch.zeros(5, 3))
    assert module.eval()(torch.zeros(1, 3)).shape == (1, 3)
    assert module.train()(torch.zeros(0, 3)).shape == (0, 3)
    assert module.num_batches_tracked == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_compiles_into_one_graph(options: dict[str, Any], weighted: bool) -> None:
    torch.compiler.reset()
    module, x = BatchNorm1d(3, **options), normal(10, 3, dtype=torch.float32)
    weights = torch.linspace(0.0, 1.0, 10) if weighted else None
    reference = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weights), reference(x, weights))
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_compiles_for_any_number_of_rows(layout: Any) -> None:
    torch.compiler.reset()
    module = BatchNorm1d(3, virtual_batch_size=4, virtual_batch_layout=layout)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (12, 13, 30, 16):  # from the second on, the number of rows is a symbol
        x = normal(rows, 3, dtype=torch.float32)
        wanted = copy.deepcopy(module)(x)
        torch.testing.assert_close(compiled(x), wanted)
