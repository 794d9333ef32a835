"""torch.compile: one graph, no breaks, the same numbers and statistics as without."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, InputError, Renorm

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
nn = torch.nn
BatchNorm, BatchNorm1d, BatchNorm2d = bnlayer_torch.BatchNorm, bnlayer_torch.BatchNorm1d, bnlayer_torch.BatchNorm2d

OPTIONS: list[dict[str, Any]] = [
    {},
    {"moving_variance_estimator": "biased"},
    {"momentum": None},
    {"zero_debias": "all"},
    {"renorm": Renorm(r_max=1.5, d_max=0.5), "moving_variance_estimator": "biased"},
    {"virtual_batch_size": 4},
    {"nonfinite": "keep"},
    {"track_running_stats": False},
    {"scale": False},
]


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


class Graphs:
    """A backend that counts the graphs it is given, keeps them, and runs them through AOTAutograd."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.append(graph)
        return aot_eager(graph, inputs)


def compiled(module: Any, **settings: Any) -> tuple[Any, Graphs]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    graphs = Graphs()
    return torch.compile(module, fullgraph=True, backend=graphs, **settings), graphs


def step(module: Any, x: Any, *rest: Any) -> list[Any]:
    leaf = x.clone().requires_grad_()
    y = module(leaf, *rest)
    wanted = [leaf, *module.parameters()]
    return [y, *torch.autograd.grad(y, wanted, torch.cos(y.detach()))]


def agree(fast: Any, module: Any, eager: Any, batches: list[Any]) -> None:
    for x in batches:
        for got, wanted in zip(step(fast, x), step(eager, x), strict=True):
            torch.testing.assert_close(got, wanted)
    for (name, got), (_, wanted) in zip(module.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(got, wanted, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_one_graph_without_breaks(arguments: dict[str, Any], training: bool, recwarn: Any) -> None:
    module = BatchNorm2d(3, **arguments).train(training)
    eager = copy.deepcopy(module)
    fast, graphs = compiled(module)
    agree(fast, module, eager, [normal(8, 3, 2, 5, seed=s) for s in range(2)])
    assert len(graphs.graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # Nothing of ours is what torch.compile warns of.
    assert not [w for w in recwarn if "lru_cache" in str(w.message) or "bnlayer" in str(w.message)]


def test_a_plain_layer_is_torchs_kernel_and_a_counter() -> None:
    for training, wanted in ((True, {"batch_norm", "add_"}), (False, {"batch_norm", "clone"})):
        fast, graphs = compiled(BatchNorm2d(3).train(training))
        fast(normal(8, 3, 2, 5))
        called = [n for n in graphs.graphs[0].graph.nodes if n.op in ("call_function", "call_method")]
        names = {getattr(n.target, "__name__", n.target) for n in called}
        assert wanted <= names
        assert not {n for n in names if n in ("mean", "var", "square", "sqrt", "mul")}


@pytest.mark.parametrize("arguments", [o for o in OPTIONS if "virtual_batch_size" not in o], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_every_size(arguments: dict[str, Any], training: bool) -> None:
    module = BatchNorm2d(3, **arguments).train(training)
    eager = copy.deepcopy(module)
    fast, _ = compiled(module, dynamic=True)
    agree(fast, module, eager, [normal(n, 3, h, 5, seed=n) for n, h in ((8, 4), (9, 6), (12, 7))])
    # torch hands a graph over twice where a float in it turns out to be one; it runs one.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_attributes_changed_before_and_between_calls_hold() -> None:
    # Off the plain path, where the spec is asked for; and torch.compile must not go on with the old numbers.
    module = BatchNorm2d(3, moving_variance_estimator="biased")
    module.momentum, module.eps = 0.37, 0.25
    eager = copy.deepcopy(module)
    fast, graphs = compiled(module)
    agree(fast, module, eager, [normal(8, 3, 2, 5)])
    for each in (module, eager):
        each.momentum, each.eps = 0.5, 0.125
    agree(fast, module, eager, [normal(8, 3, 2, 5, seed=1)])
    for each in (module, eager):
        each.frozen_statistics = True
    agree(fast, module, eager, [normal(8, 3, 2, 5, seed=2)])
    for each in (module, eager):
        each.frozen_statistics = False
        each.eval()
    agree(fast, module, eager, [normal(8, 3, 2, 5, seed=3)])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(graphs.graphs) > 1


def test_masks_options_of_the_call_and_other_axes() -> None:
    module = BatchNorm(BatchNormSpec(3, axis=-1))
    eager = copy.deepcopy(module)
    mask = torch.tensor([True, False, True, True, True, True])

    def call(m: Any, x: Any) -> Any:
        return m(x, mask, update_stats=True) + m(x, update_stats=False)

    torch.compiler.reset()
    fast = torch.compile(lambda x: call(module, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(normal(6, 4, 3)), call(eager, normal(6, 4, 3)))
    torch.testing.assert_close(module.running_var, eager.running_var)
    assert module.num_batches_tracked == eager.num_batches_tracked == 1


def test_eval_then_train_then_backward_is_right() -> None:
    # The eval pass is differentiated after training moved the statistics that it used.
    module = BatchNorm1d(3)
    eager = copy.deepcopy(module)
    fast, _ = compiled(module)
    grads = []
    for call, owner in ((fast, module), (eager, eager)):
        x = normal(16, 3).requires_grad_()
        owner.eval()
        y = call(x)
        owner.train()
        call(normal(16, 3, seed=1) * 9)
        grads.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(grads[1], torch.full_like(grads[1], (1 + 1e-5) ** -0.5))


@pytest.mark.parametrize("arguments", [{}, {"moving_variance_estimator": "biased"}], ids=str)
def test_a_model_is_one_graph_with_it(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), BatchNorm2d(3, **arguments), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    report = torch._dynamo.explain(copy.deepcopy(model))(normal(4, 2, 6, 6))
    assert (report.graph_count, report.graph_break_count) == (1, 0)
    eager = copy.deepcopy(model)
    fast, _ = compiled(model)
    agree(fast, model, eager, [normal(4, 2, 6, 6)])


def test_the_default_compiler_compiles_it() -> None:
    torch.compiler.reset()
    module = BatchNorm2d(3, moving_variance_estimator="biased")
    eager = copy.deepcopy(module)
    fast = torch.compile(module, fullgraph=True)
    agree(fast, module, eager, [normal(8, 3, 4, 4)])


def test_what_does_not_fit_is_refused_in_a_graph_too() -> None:
    fast, _ = compiled(BatchNorm1d(3))
    with pytest.raises((InputError, torch._dynamo.exc.Unsupported), match="3"):
        fast(normal(4, 5))
