"""Activation checkpointing computes a part of a model again in the backward pass; the statistics move once."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import Renorm, UnsupportedError

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")
nn = torch.nn
BatchNorm1d, BatchNorm2d = bnlayer_torch.BatchNorm1d, bnlayer_torch.BatchNorm2d

OPTIONS: list[dict[str, Any]] = [
    {},
    {"moving_variance_estimator": "biased"},
    {"momentum": None},
    {"zero_debias": "all"},
    {"virtual_batch_size": 4},
    {"track_running_stats": False},
]


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), BatchNorm2d(3, **arguments), nn.Tanh(), nn.Conv2d(3, 2, 1))


def run(part: Any, x: Any, **checkpoint: Any) -> list[Any]:
    leaf = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(part, leaf, **checkpoint) if checkpoint else part(leaf)
    y.square().sum().backward()
    return [y, leaf.grad, *(p.grad for p in part.parameters()), *part.buffers()]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_statistics_move_once_and_gradients_are_the_same(arguments: dict[str, Any], reentrant: bool) -> None:
    part, plain = model(arguments), model(arguments)
    for got, wanted in zip(
        run(part, normal(8, 2, 5, 5), use_reentrant=reentrant), run(plain, normal(8, 2, 5, 5)), strict=True
    ):
        assert torch.equal(got, wanted)


def test_several_backward_passes_and_a_part_of_the_parameters() -> None:
    part, plain = model({}), model({})
    results = []
    for each, checkpointed in ((part, True), (plain, False)):
        x = normal(8, 2, 5, 5).requires_grad_()
        y = torch.utils.checkpoint.checkpoint(each, x, use_reentrant=False) if checkpointed else each(x)
        found = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for _ in range(2)]
        found += torch.autograd.grad(y.sum(), list(each.parameters()))
        results.append([*found, *each.buffers()])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)
    assert part[1].num_batches_tracked == 1


@pytest.mark.parametrize("arguments", OPTIONS[:2], ids=str)
def test_a_chain_of_segments(arguments: dict[str, Any]) -> None:
    def chain() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3, **arguments)) for _ in range(4)))

    segmented, plain = chain(), chain()
    for each, many in ((segmented, True), (plain, False)):
        x = normal(6, 3).requires_grad_()
        y = torch.utils.checkpoint.checkpoint_sequential(each, 2, x, use_reentrant=False) if many else each(x)
        y.square().sum().backward()
    for (name, got), (_, wanted) in zip(segmented.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_frozen_and_eval_layers_and_masks_in_a_checkpoint(reentrant: bool) -> None:
    def part(layer: Any, x: Any, mask: Any) -> Any:
        return layer(x, mask)

    mask = torch.tensor([True, True, False, True, True, False])
    for frozen, training in ((False, True), (True, True), (False, False)):
        results = []
        for checkpointed in (True, False):
            layer, x = BatchNorm1d(3).train(training), normal(6, 3).requires_grad_()
            layer.frozen_statistics = frozen
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(part, layer, x, mask, use_reentrant=reentrant)
            else:
                y = part(layer, x, mask)
            y.square().sum().backward()
            results.append([x.grad, layer.weight.grad, *layer.buffers()])
        for got, wanted in zip(*results, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_renorm_cannot_be_computed_again_and_says_so(reentrant: bool) -> None:
    layer = BatchNorm1d(3, renorm=Renorm(), moving_variance_estimator="biased")
    y = torch.utils.checkpoint.checkpoint(layer, normal(6, 3).requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(UnsupportedError, match="checkpoint"):
        y.sum().backward()
    assert layer.num_batches_tracked == 1


def test_a_backward_pass_that_ended_is_no_recomputation() -> None:
    # A gradient penalty differentiates inside of the forward pass; the next call updates as ever.
    layer = BatchNorm1d(3)
    x = normal(6, 3).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (layer(x).sum() + dx.square().sum()).backward()
    layer(x)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("arguments", OPTIONS[:2], ids=str)
def test_compiled_with_the_checkpoint_inside(arguments: dict[str, Any]) -> None:
    torch.compiler.reset()
    part, plain = model(arguments), model(arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fast(x: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)

    x = normal(8, 2, 5, 5)
    fast(x).square().sum().backward()
    wanted = run(plain, x)
    for got, want in zip([*(p.grad for p in part.parameters()), *part.buffers()], wanted[2:], strict=True):
        torch.testing.assert_close(got, want)


def test_copies_made_in_a_checkpointed_run_are_whole() -> None:
    layer = BatchNorm1d(3)
    y = torch.utils.checkpoint.checkpoint(layer, normal(6, 3).requires_grad_(), use_reentrant=False)
    twin = copy.deepcopy(layer)
    y.sum().backward()
    for got, wanted in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(got, wanted)
