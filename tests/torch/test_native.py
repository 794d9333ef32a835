"""torch.nn's own batch norm as a conformance target: a harness around torch's class, which adds nothing to it."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import BatchNormSpec, InputError, UnsupportedError
from bnlayer.contract import Call, Request
from bnlayer_torch.native import BACKEND

torch = pytest.importorskip("torch", reason="pip install 'bnlayer[torch]'")

SPEC = BatchNormSpec(3, axis=1, moving_variance_estimator="unbiased")


def request(*shape: int, training: bool = True, **options) -> Request:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Request((Call(x, dy=np.ones_like(x)),), training=training, **options)


@pytest.mark.parametrize(("axis", "shape"), [(1, (4, 3)), (-1, (4, 3)), (-2, (4, 3, 2)), (-3, (4, 3, 2, 2))])
def test_it_is_torchs_on_axis_1_by_any_word(axis, shape):
    spec = SPEC.replace(axis=axis)
    layer, asked = BACKEND.build(spec), request(*shape)
    assert BACKEND.unsupported(spec, asked) is None
    assert BACKEND.extract(layer)[0] == spec
    plain = torch.nn.BatchNorm2d(3) if len(shape) == 4 else torch.nn.BatchNorm1d(3)
    _, outcome = BACKEND.step(layer, asked)
    x = torch.from_numpy(asked.calls[0].x)
    assert np.array_equal(outcome.calls[0].y, plain(x).detach().numpy())
    assert np.array_equal(outcome.state.moving_variance, plain.running_var.numpy())
    assert type(layer).forward is type(plain).forward
    assert layer.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("axis", "shape"), [(-1, (4, 2, 3)), (2, (4, 2, 3)), (-1, (4, 2, 2, 3)), (-2, (4, 3))])
def test_other_axes_are_unsupported_by_name(axis, shape):
    spec = SPEC.replace(axis=axis)
    assert BACKEND.unsupported(spec, request(*shape)).startswith("axis: ")
    if axis < 0:
        with pytest.raises(UnsupportedError, match="axis"):
            BACKEND.step(BACKEND.build(spec), request(*shape))
    else:
        with pytest.raises(UnsupportedError, match="axis"):
            BACKEND.build(spec)


@pytest.mark.parametrize("single_value", ["raise", "allow"])
def test_one_value_is_refused_by_torch_whatever_the_spec_says(single_value):
    spec = SPEC.replace(single_value=single_value)
    layer = BACKEND.build(spec)
    assert BACKEND.extract(layer)[0] == spec
    with pytest.raises(InputError, match="refuses x with shape"):
        BACKEND.step(layer, request(1, 3))
    assert BACKEND.extract(layer)[1].num_updates == 1  # the deviation: it counts before it refuses


def test_an_estimator_without_moving_statistics_means_nothing():
    spec = BatchNormSpec(3, axis=1, track_moving_stats=False)
    assert BACKEND.extract(BACKEND.build(spec))[0] == spec
    assert "unbiased" in BACKEND.unsupported(spec.replace(track_moving_stats=True))


def test_a_layer_that_it_did_not_build_says_what_torch_does():
    assert BACKEND.extract(torch.nn.BatchNorm2d(3))[0] == SPEC


@pytest.mark.parametrize("field", ["renorm", "virtual_batch_size", "zero_debias", "synchronized", "nonfinite"])
def test_what_torch_has_no_word_for_is_unsupported_by_name(field):
    from bnlayer import Renorm

    value = {"renorm": Renorm(), "virtual_batch_size": 2, "zero_debias": "all", "synchronized": True}.get(field, "keep")
    biased = SPEC.replace(moving_variance_estimator="biased", **{field: value})
    assert BACKEND.unsupported(biased).startswith(f"{field}: ")
