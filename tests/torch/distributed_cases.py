"""What each of several processes does and finds, for test_distributed.py: one replica, which runs every case in turn.

Run as `python distributed_cases.py RANK FOLDER`; the findings go to a file of the rank in the folder.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm, SpecError, StateError
from bnlayer_torch import BatchNorm1d, BatchNorm2d, batch_norm, convert_sync_batchnorm

WORLD = 3
ROWS = (2, 6, 0)  # of the one big batch, on each replica
CASES: list[Callable[[int], None]] = []


def case(function: Callable[[int], None]) -> Callable[[int], None]:
    CASES.append(function)
    return function


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same on every replica."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mine(whole: Tensor, rank: int, rows: tuple[int, ...] = ROWS) -> Tensor:
    return whole.split(list(rows))[rank].clone()


def total(part: Tensor) -> Tensor:
    whole = part.detach().clone()
    dist.all_reduce(whole)
    return whole


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def layers(**options: Any) -> tuple[BatchNorm1d, BatchNorm1d]:
    """A synchronized layer, and the same for one process."""
    one = BatchNorm1d(3, dtype=torch.float64, **options)
    with torch.no_grad():
        one.weight.copy_(numbers(3, seed=8))
        one.bias.copy_(numbers(3, seed=9))
    ours = copy.deepcopy(one)
    ours.synchronized = True
    return ours, one


class Counted:
    """How often each collective was called."""

    def __enter__(self) -> Counted:
        self.calls: dict[str, int] = {}
        self._real = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}
        for name, real in self._real.items():
            setattr(dist, name, self._counting(name, real))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return real(*arguments, **options)

        return call


@case
def replicas_equal_the_one_big_batch(rank: int) -> None:
    for options in (
        {},
        {"momentum": None},
        {"zero_debias": "all"},
        {"nonfinite": "keep"},
        {"renorm": Renorm(r_max=1.5, d_max=0.5), "moving_variance_estimator": "biased"},
    ):
        ours, one = layers(**options)
        for seed in (1, 2):
            x, dy = 5 + numbers(8, 3, seed=seed), numbers(8, 3, seed=seed + 10)
            whole, part = x.clone().requires_grad_(), mine(x, rank).requires_grad_()
            y, wanted = ours(part), one(whole)
            close(y, mine(wanted, rank))
            got = torch.autograd.grad(y, [part, ours.weight, ours.bias], mine(dy, rank))
            dx, dgamma, dbeta = torch.autograd.grad(wanted, [whole, one.weight, one.bias], dy)
            close(got[0], mine(dx, rank))
            close(total(got[1]), dgamma)
            close(total(got[2]), dbeta)
            for name, buffer in one.named_buffers():
                close(ours.get_buffer(name), buffer)


@case
def one_collective_forward_and_one_backward(rank: int) -> None:
    ours, _ = layers()
    x = mine(numbers(8, 3), rank).requires_grad_()
    with Counted() as forward:
        y = ours(x)
    with Counted() as backward:
        (dx,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with Counted() as second:
        torch.autograd.grad(dx.square().sum(), [x])
    assert (forward.calls, backward.calls) == ({"all_gather": 1}, {"all_reduce": 1})
    assert set(second.calls) == {"all_reduce"}
    with Counted() as nothing:
        ours(mine(numbers(8, 3), rank)).sum().backward()  # gamma's and beta's gradients are each replica's own
    assert nothing.calls == {"all_gather": 1}


@case
def no_collective_in_eval_nor_with_frozen_statistics(rank: int) -> None:
    ours, one = layers()
    untracked = BatchNorm1d(3, dtype=torch.float64, track_running_stats=False, synchronized=True).eval()
    if rank != 1:
        return  # one replica alone must not wait for the others
    x = numbers(4, 3).requires_grad_()
    with Counted() as collectives:
        ours.eval()
        close(ours(x), one.eval()(x))
        ours.train()
        ours.frozen_statistics = True
        ours(x).sum().backward()
        untracked(x).sum().backward()
    assert collectives.calls == {}


@case
def derivatives_are_right_to_third_order(rank: int) -> None:
    spec = BatchNormSpec(3, synchronized=True, moving_variance_estimator="unbiased", param_dtype="float64")
    x, dy, direction, other = (numbers(8, 3, seed=seed) for seed in range(4))
    state = BatchNormState(
        gamma=numbers(3, seed=5), beta=numbers(3, seed=6), moving_mean=torch.zeros(3), moving_variance=torch.ones(3)
    )

    def derivatives(x: Tensor, dy: Tensor, direction: Tensor, other: Tensor, **options: Any) -> list[Tensor]:
        x = x.requires_grad_()
        y, _ = batch_norm(x, state, training=True, **options)
        found = []
        for along in (dy, direction, other):
            (y,) = torch.autograd.grad(y, [x], along, create_graph=True)
            found.append(y)
        return found

    # Weights of 1 keep torch's own kernel out, which is wrong in third order.
    plain = derivatives(
        x.clone(), dy, direction, other, spec=spec.replace(synchronized=False), weights=torch.ones(8, dtype=torch.bool)
    )
    got = derivatives(*(mine(t, rank) for t in (x, dy, direction, other)), spec=spec)
    for each, whole in zip(got, plain, strict=True):
        close(each, mine(whole, rank))


@case
def weights_and_their_gradients(rank: int) -> None:
    x, dy = 3 + numbers(8, 3), numbers(8, 3, seed=1)
    tiny, huge = 1e-300, 1e300
    for weights, rows in (
        ([0.5, 2.0, 0.0, 1.0, 0.25, 3.0, 1.0, 1.0], (2, 6, 0)),
        (
            [0.0, 0.0, 0.0, 1.0, 0.25, 3.0, 0.0, 4.0],
            (3, 3, 2),
        ),  # zeros have a gradient too, on a replica without weight
        ([tiny, tiny, 1.0, 2.0, 0.5, 1.0, 1.0, 3.0], (2, 4, 2)),
        ([huge, huge, huge, 2 * huge, huge, huge, huge, huge], (2, 4, 2)),
        ([0.0] * 8, (2, 4, 2)),
        ([0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0], (2, 4, 2)),  # n is 1, and what enters is the variance 0
    ):
        ours, one = layers()
        w = torch.tensor(weights, dtype=torch.float64)
        whole, whole_w = x.clone().requires_grad_(), w.clone().requires_grad_()
        part, part_w = mine(x, rank, rows).requires_grad_(), mine(w, rank, rows).requires_grad_()
        y, wanted = ours(part, part_w), one(whole, whole_w)
        close(y, mine(wanted, rank, rows))
        got = torch.autograd.grad(y, [part, part_w], mine(dy, rank, rows), allow_unused=True, materialize_grads=True)
        dx, dw = torch.autograd.grad(wanted, [whole, whole_w], dy, allow_unused=True, materialize_grads=True)
        close(got[0], mine(dx, rank, rows))
        scale = float(w.max()) or 1.0
        close(got[1] * scale, mine(dw, rank, rows) * scale)
        close(ours.state_dict(), one.state_dict())


@case
def a_replica_without_weights_counts_each_row_once(rank: int) -> None:
    ours, one = layers()
    x, dy = numbers(8, 3), numbers(8, 3, seed=1)
    w = torch.tensor([4.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    whole, part = x.clone().requires_grad_(), mine(x, rank).requires_grad_()
    y = ours(part, mine(w, rank)) if rank == 0 else ours(part)
    wanted = one(whole, w)
    close(y, mine(wanted, rank))
    close(torch.autograd.grad(y, part, mine(dy, rank))[0], mine(torch.autograd.grad(wanted, whole, dy)[0], rank))
    close(ours.state_dict(), one.state_dict())


@case
def what_lies_under_a_mask_does_not_matter(rank: int) -> None:
    ours, one = layers()
    x = numbers(8, 3)
    mask = torch.tensor([True, False, True, True, False, True, True, True])
    x[1, 0], x[4, 2] = torch.nan, torch.inf
    whole, part = x.clone().requires_grad_(), mine(x, rank).requires_grad_()
    y, wanted = ours(part, mine(mask, rank)), one(whole, mask)
    torch.testing.assert_close(y, mine(wanted, rank), equal_nan=True)
    dy = torch.where(mask, 1.0, 0.0).unsqueeze(1) * numbers(8, 3, seed=1)
    close(torch.autograd.grad(y, part, mine(dy, rank))[0], mine(torch.autograd.grad(wanted, whole, dy)[0], rank))
    close(ours.state_dict(), one.state_dict())


@case
def one_value_in_all_is_refused_by_all(rank: int) -> None:
    ours, _ = layers()
    before = copy.deepcopy(ours.state_dict())
    for rows in ((0, 1, 0), (1, 0, 0)):
        with pytest.raises(InputError, match="more than one value per channel"):
            ours(mine(numbers(1, 3), rank, rows))
    close(ours.state_dict(), before)
    assert torch.isfinite(ours(mine(numbers(8, 3), rank))).all()  # nobody waits for anybody
    ours.single_value = "allow"
    close(ours(mine(numbers(1, 3), rank, (0, 1, 0))), ours.bias.expand(1, 3)[: 1 if rank == 1 else 0])


@case
def what_one_replica_refuses_all_do(rank: int) -> None:
    ours, _ = layers()
    before = copy.deepcopy(ours.state_dict())
    x = mine(numbers(8, 3), rank)
    for wrong, arguments in (
        ("not negative", (x, torch.tensor([1.0, -1.0]) if rank == 0 else torch.ones(len(x)))),
        ("3 channels", (x[:, :2] if rank == 0 else x,)),
    ):
        with pytest.raises(InputError, match=(wrong if rank == 0 else "replica 0 of the process group refused")):
            ours(*arguments)
    close(ours.state_dict(), before)
    assert torch.isfinite(ours(x)).all()


@case
def no_rows_anywhere_change_nothing(rank: int) -> None:
    ours, _ = layers()
    before = copy.deepcopy(ours.state_dict())
    x = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    assert y.shape == (0, 3)
    y.sum().backward()
    close(ours.weight.grad, torch.zeros(3, dtype=torch.float64))
    close(ours.state_dict(), before)


@case
def the_state_is_the_same_to_the_bit(rank: int) -> None:
    ours = BatchNorm2d(5, synchronized=True)
    rows = (1, 7, 4)
    for seed in range(4):
        x = mine(100 + numbers(12, 5, 3, 3, seed=seed, dtype=torch.float32), rank, rows)
        ours(x.to(memory_format=torch.channels_last) if rank == 1 else x)
    for buffer in ours.buffers():
        parts = [torch.empty_like(buffer) for _ in range(WORLD)]
        dist.all_gather(parts, buffer)
        assert all(torch.equal(part, buffer) for part in parts)


@case
def half_inputs_count_in_float32(rank: int) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = numbers(8, 3, dtype=dtype)
        ours, one = BatchNorm1d(3, synchronized=True), BatchNorm1d(3)
        part, whole = mine(x, rank).requires_grad_(), x.float().requires_grad_()
        y = ours(part)
        assert y.dtype == dtype
        wanted = one(whole)
        torch.testing.assert_close(y, mine(wanted.to(dtype), rank))
        dy = numbers(8, 3, seed=1, dtype=dtype)
        (dx,) = torch.autograd.grad(wanted, whole, dy.float())
        torch.testing.assert_close(torch.autograd.grad(y, part, mine(dy, rank))[0], mine(dx.to(dtype), rank))
        torch.testing.assert_close(ours.state_dict(), one.state_dict())


@case
def groups_have_their_own_statistics(rank: int) -> None:
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    ours, one = layers()
    x = numbers(8, 3)
    rows = (2, 3, 3)
    ours.process_group = single if rank == 2 else pair
    with Counted() as collectives:
        y = ours(mine(x, rank, rows))
    close(y, one(x[5:]) if rank == 2 else mine(torch.cat([one(x[:5]), x[5:]]), rank, rows))
    assert collectives.calls == ({} if rank == 2 else {"all_gather": 1})
    close(ours.state_dict(), one.state_dict())
    close(copy.deepcopy(ours)(mine(x, rank, rows)), y)  # a copy is in the same group
    if rank == 2:
        ours.process_group = pair
        with pytest.raises(InputError, match="must be a group that this process is in"):
            ours(x)
    spec = ours.spec
    with pytest.raises(StateError, match="process_group to None"):
        pickle.dumps(ours)
    ours.process_group = None
    again = pickle.loads(pickle.dumps(ours))
    assert again.spec == spec
    assert again.spec.synchronized


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 5), BatchNorm1d(5)
    ).double()


@case
def data_parallel_training_equals_the_one_big_batch(rank: int) -> None:
    for options in ({}, {"broadcast_buffers": False}, {"find_unused_parameters": True}, {"static_graph": True}):
        one = network()
        model = torch.nn.parallel.DistributedDataParallel(convert_sync_batchnorm(network()), **options)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (one, model)]
        for seed in range(3):
            x, target = numbers(8, 4, seed=seed), numbers(8, 5, seed=seed + 10)
            for optimizer in optimizers:
                optimizer.zero_grad()
            (one(x) - target).square().sum().div(8).backward()
            # DistributedDataParallel divides the sum of the replicas' gradients by their number.
            (model(mine(x, rank)) - mine(target, rank)).square().sum().mul(WORLD / 8).backward()
            for got, wanted in zip(model.parameters(), one.parameters(), strict=True):
                close(got.grad, wanted.grad)
            for optimizer in optimizers:
                optimizer.step()
        close(model.module.state_dict(), one.state_dict())


@case
def conversion_keeps_the_spec(rank: int) -> None:
    ours = BatchNorm1d(3, eps=0.5, momentum=None, nonfinite="propagate", bias=False)
    native = torch.nn.BatchNorm2d(4, affine=False).eval()
    model = torch.nn.ModuleDict({"ours": ours, "native": native})
    was = ours.spec
    assert convert_sync_batchnorm(model) is model
    assert model["ours"] is ours
    assert ours.spec == was.replace(synchronized=True)
    assert type(model["native"]) is BatchNorm2d
    assert not model["native"].training
    assert model["native"].spec.synchronized
    assert model["native"].running_mean is native.running_mean
    ghosts = torch.nn.Sequential(torch.nn.BatchNorm1d(3), BatchNorm1d(3, virtual_batch_size=2))
    with pytest.raises(SpecError, match="1 cannot be synchronized"):
        convert_sync_batchnorm(ghosts)
    assert type(ghosts[0]) is torch.nn.BatchNorm1d


@case
def a_checkpoint_does_not_update_twice(rank: int) -> None:
    from torch.utils.checkpoint import checkpoint

    ours, one = layers()
    x, dy = numbers(8, 3), numbers(8, 3, seed=1)
    whole, part = x.clone().requires_grad_(), mine(x, rank).requires_grad_()
    checkpoint(lambda x: ours(x).sin(), part, use_reentrant=False).backward(mine(dy, rank))
    one(whole).sin().backward(dy)
    close(part.grad, mine(whole.grad, rank))
    close(ours.state_dict(), one.state_dict())


@case
def what_is_compiled_goes_through_the_collectives(rank: int) -> None:
    from torch._dynamo.utils import counters

    ours, one = layers()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = torch.compile(ours, backend=keep)
    x, dy = numbers(8, 3), numbers(8, 3, seed=1)
    whole, part = x.clone().requires_grad_(), mine(x, rank).requires_grad_()
    y, wanted = model(part), one(whole)
    y.backward(mine(dy, rank))
    wanted.backward(dy)
    close(y, mine(wanted, rank))
    close(part.grad, mine(whole.grad, rank))
    close(ours.state_dict(), one.state_dict())
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("all_gather" in target for target in called) == 1, called
    assert sum(target == "autograd_function_apply" for target in called) == 1, called
    # One look at the rows on the host, for whether any replica has refused or nobody has any weight.
    assert all("tolist" in reason for reason in counters["graph_break"]), counters["graph_break"]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    findings = {}
    for each in CASES:
        try:
            each(rank)
            findings[each.__name__] = ""
        except Exception:
            findings[each.__name__] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(findings))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
