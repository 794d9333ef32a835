"""torch's own module tests for batch norm, run on our classes with only the class substituted.

The cases come from `torch.testing._internal.common_modules.module_db`; what is done with each is what torch's
test/test_modules.py does. Left out, and why: tests of other devices (cuda, mps, xla) and of quantization, which have
no such machine or class here; `test_cpu_gpu_parity`, likewise; gradients of zero batches by differences, which have no
numbers to differ; an eps of 0, which torch refuses and we compute (see `test_errors`).
"""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types
import unittest
from typing import Any

import pytest

import bnlayer_torch
from bnlayer import BatchNormSpec, BatchNormState, SpecError

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")

NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
CASES = 8 + 7 + 7  # of torch 2.13; another torch may have more, not fewer


def module_db() -> Any:
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ModuleNotFoundError:
            # torch's helpers derive a TestCase from it that is not used here.
            stub = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
            sys.modules["expecttest"] = stub
    from torch.testing._internal import common_modules

    return common_modules.module_db


def infos() -> list[Any]:
    return [info for info in module_db() if info.module_cls in [getattr(torch.nn, name) for name in NAMES]]


def cases(training: bool, dtype: Any = torch.float64, requires_grad: bool = False) -> list[Any]:
    """Ours, torch's, and torch's own input, of every case."""
    torch.manual_seed(0)
    found = []
    for info in infos():
        for case in info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
        ):
            given = case.constructor_input
            built = []
            for kind in (getattr(bnlayer_torch, info.module_cls.__name__), info.module_cls):
                torch.manual_seed(1)
                module = kind(*given.args, **given.kwargs).to(dtype).train(training)
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.uniform_(0.5, 1.5)
                built.append(module)
            found.append((f"{info.module_cls.__name__} {case.desc}", *built, case.forward_input.args[0]))
    return found


def leaf(x: Any) -> Any:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def test_there_are_cases() -> None:
    assert [info.module_cls.__name__ for info in infos()] == list(NAMES)
    assert len(cases(True)) >= CASES


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_backward(training: bool, dtype: Any) -> None:
    for name, module, reference, x in cases(training, dtype):
        mine, theirs = leaf(x), leaf(x)
        for _ in range(2):
            y, wanted = module(mine), reference(theirs)
            torch.testing.assert_close(y, wanted, msg=lambda text, name=name: f"{name}: {text}")
            dy = torch.linspace(-1, 1, max(y.numel(), 1), dtype=dtype)[: y.numel()].reshape(y.shape)
            got = torch.autograd.grad(y, [mine, *module.parameters()], dy)
            expected = torch.autograd.grad(wanted, [theirs, *reference.parameters()], dy)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
        for (key, buffer), (_, other) in zip(module.named_buffers(), reference.named_buffers(), strict=True):
            if "zero_batch" in name and key == "num_batches_tracked":
                assert int(buffer) == 0  # torch counts a batch that held nothing
                continue
            torch.testing.assert_close(buffer, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training: bool) -> None:
    for name, module, _, x in cases(training):
        if not x.numel():
            continue
        parameters = dict(module.named_parameters())
        small = x[:2, :, :2, :2] if x.dim() > 3 else x

        def function(x: Any, *tensors: Any, module: Any = module, parameters: Any = parameters) -> Any:
            fresh = copy.deepcopy(module)
            named = dict(zip(parameters, tensors, strict=True))
            return torch.func.functional_call(fresh, named, (x,))

        leaves = [leaf(small), *(leaf(p) for p in parameters.values())]
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True), name
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True), name


@pytest.mark.parametrize("training", [True, False])
def test_pickles_and_copies(training: bool) -> None:
    for name, module, _, x in cases(training, torch.float32):
        module(x)
        for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            torch.testing.assert_close(twin(x), copy.deepcopy(module)(x), msg=name)
            assert list(twin.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_inputs_that_are_not_contiguous(training: bool) -> None:
    for name, module, reference, x in cases(training):
        laid = torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
        assert not x.numel() or not laid.is_contiguous()
        mine, theirs = leaf(laid), leaf(x)
        mine = mine.as_strided(mine.size(), mine.stride())
        y, wanted = module(laid.requires_grad_()), reference(theirs)
        torch.testing.assert_close(y, wanted, msg=name)
        dy = torch.stack([torch.cos(wanted.detach())] * 2, -1)[..., 0]
        got = torch.autograd.grad(y, [laid, *module.parameters()], dy)
        expected = torch.autograd.grad(wanted, [theirs, *reference.parameters()], dy.contiguous())
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_memory_formats(training: bool) -> None:
    for name, module, _, x in cases(training, torch.float32):
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        layout = layouts.get(x.dim())
        if layout is None or not x.numel():
            continue
        wanted = copy.deepcopy(module)(x)
        for moved in (True, False):  # the module's tensors too, or only the input
            twin = copy.deepcopy(module)
            y = (twin.to(memory_format=layout) if moved else twin)(x.contiguous(memory_format=layout))
            assert y.is_contiguous(memory_format=layout), name
            torch.testing.assert_close(y, wanted, msg=name)


def test_construction_on_devices_and_dtypes() -> None:
    for info in infos():
        kind = getattr(bnlayer_torch, info.module_cls.__name__)
        assert {"device", "dtype"} <= set(inspect.signature(kind).parameters)
        for case in info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
            for device, dtype in (("cpu", torch.float64), ("meta", torch.float32), ("meta", torch.float16)):
                module = kind(*args, **kwargs, device=device, dtype=dtype)
                for tensor in [*module.parameters(), *module.buffers()]:
                    assert tensor.device.type == device
                    assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.int64)


@pytest.mark.parametrize("swap", [True, False])
def test_moves_between_dtypes_and_devices_keep_the_module_whole(swap: bool) -> None:
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for name, module, _, x in cases(True, torch.float32):
            before = list(module.parameters())
            module.to(torch.float64)
            assert all(p is q for p, q in zip(before, module.parameters(), strict=True)), name
            assert module.spec.param_dtype == ("float64" if before else module.spec.param_dtype)
            assert module(x.double()).dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_training_and_eval_differ() -> None:
    for name, module, _, x in cases(True, torch.float32):
        if not x.numel() or not module.track_running_stats:
            continue
        torch.manual_seed(2)
        for _ in range(2):
            module(torch.randn_like(x) + 3)
        assert not torch.allclose(module.train()(x), module.eval()(x)), name


def test_zero_grad_and_requires_grad() -> None:
    for _, module, _, x in cases(True, torch.float32):
        parameters = list(module.parameters())
        if not parameters:
            continue
        module(x).sum().backward()
        assert all(p.grad is not None for p in parameters)
        module.zero_grad()
        assert all(p.grad is None for p in parameters)


def test_errors() -> None:
    # torch refuses an eps that is not positive, at the call. We refuse a negative one at once; 0 is an epsilon to us,
    # and what comes of it is right.
    for info in infos():
        kind = getattr(bnlayer_torch, info.module_cls.__name__)
        for case in info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            given, x = case.module_error_input.constructor_input, case.module_error_input.forward_input.args[0]
            if given.kwargs["eps"] == 0.0:
                y = kind(*given.args, **given.kwargs)(x)
                dims = [0, *range(2, x.dim())]
                torch.testing.assert_close(y.var(dims, correction=0), torch.ones(10))
            else:
                with pytest.raises(SpecError, match="epsilon"):
                    kind(*given.args, **given.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cases_of_torchs_function(dtype: Any) -> None:
    # Left out: a rank below 2, which has no channels, and a negative momentum, which no average has.
    module_db()  # for its stub
    from torch.testing._internal.common_methods_invocations import sample_inputs_batch_norm

    torch.manual_seed(0)
    run = 0
    for sample in sample_inputs_batch_norm(None, "cpu", dtype, True):
        x, (mean, variance, weight, bias) = sample.input, (*sample.args, *[None] * 4)[:4]
        options = {"training": False, "momentum": 0.1, "eps": 1e-5, **sample.kwargs}
        if x.dim() < 2 or options["momentum"] < 0 or (mean is None) != (variance is None):
            continue
        name = {torch.float32: "float32", torch.float64: "float64"}[dtype]
        spec = BatchNormSpec(
            x.shape[1], axis=1, epsilon=options["eps"], decay=1 - options["momentum"], scale=weight is not None,
            center=bias is not None, track_moving_stats=mean is not None, moving_variance_estimator="unbiased",
            param_dtype=name, stats_dtype=name,
        )  # fmt: skip
        state = BatchNormState(gamma=weight, beta=bias, moving_mean=mean, moving_variance=variance)
        y, after = bnlayer_torch.batch_norm(x, state, spec, training=options["training"])
        moved = [None if t is None else t.clone() for t in (mean, variance)]
        wanted = torch.nn.functional.batch_norm(x, *moved, weight, bias, **options)
        torch.testing.assert_close(y, wanted)
        for got, want in zip((after.moving_mean, after.moving_variance), moved, strict=True):
            torch.testing.assert_close(got, want)
        leaves = [t for t in (x, weight, bias) if t is not None]
        dy = torch.cos(wanted.detach())
        for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
            torch.testing.assert_close(got, want)
        run += 1
    assert run >= 7
