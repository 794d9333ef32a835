"""Batch norms are found by their names in every framework's habit; what only looks like one is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bnlayer.checkpoint import Checkpoint, CheckpointError, Layer, Tensor
from bnlayer.checkpoint.batch_norms import find


def holding(
    *names: str, shapes: dict[str, tuple[int, ...]] | None = None, ordered: bool = True, **more: Any
) -> Checkpoint:
    tensors = {name: Tensor.of(np.ones((shapes or {}).get(name, (4,)), np.float32)) for name in names}
    return Checkpoint("x", tensors, order_is_meaningful=ordered, **more)


TORCH = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
TF = ("bn/gamma", "bn/beta", "bn/moving_mean", "bn/moving_variance")


@pytest.mark.parametrize(
    ("names", "layer", "present", "dialect_epsilon"),
    [
        (TORCH, "bn", {"gamma", "beta", "moving_mean", "moving_variance"}, 1e-5),
        (TORCH[2:], "bn", {"moving_mean", "moving_variance"}, 1e-5),
        (TF, "bn", {"gamma", "beta", "moving_mean", "moving_variance"}, 1e-3),
        (tuple(f"{n}:0" for n in TF), "bn", {"gamma", "beta", "moving_mean", "moving_variance"}, 1e-3),
        (tuple(f"{n}/.ATTRIBUTES/VARIABLE_VALUE" for n in TF), "bn",
         {"gamma", "beta", "moving_mean", "moving_variance"}, 1e-3),
        (("n/BatchNorm/beta", "n/BatchNorm/moving_mean", "n/BatchNorm/moving_variance"), "n/BatchNorm",
         {"beta", "moving_mean", "moving_variance"}, 1e-3),
        (("params/a/bn/scale", "params/a/bn/bias", "batch_stats/a/bn/mean", "batch_stats/a/bn/var"), "a/bn",
         {"gamma", "beta", "moving_mean", "moving_variance"}, 1e-5),
        (("bn/scale", "bn/bias", "bn/mean", "bn/var"), "bn", {"gamma", "beta", "moving_mean", "moving_variance"}, 1e-5),
        (("bn/scale/value", "bn/bias/value", "bn/mean/value", "bn/var/value"), "bn",
         {"gamma", "beta", "moving_mean", "moving_variance"}, 1e-5),
        (("layers/batch_normalization_3/vars/0", "layers/batch_normalization_3/vars/1"), "layers/batch_normalization_3",
         {"moving_mean", "moving_variance"}, 1e-3),
    ],
)  # fmt: skip
def test_it_is_found(names: tuple[str, ...], layer: str, present: set[str], dialect_epsilon: float) -> None:
    (one,) = find(holding(*names)).batch_norms
    assert (one.name, set(one.parts), one.num_features) == (layer, present, 4)
    assert one.spec.epsilon == dialect_epsilon
    assert one.sources["epsilon"] == "assumed"
    assert (one.spec.scale, one.spec.center) == ("gamma" in present, "beta" in present)


def test_a_torch_batch_norm_may_be_an_instance_norm() -> None:
    (one,) = find(holding(*TORCH)).batch_norms
    assert one.sources["kind"] == "assumed"
    (one,) = find(holding(*TF)).batch_norms
    assert one.sources["kind"] == "file"


@pytest.mark.parametrize(
    "names",
    [
        ("ln.weight", "ln.bias"),
        ("layer_normalization/gamma", "layer_normalization/beta"),
        ("layers/normalization/vars/0", "layers/normalization/vars/1", "layers/normalization/vars/2"),
        ("normalization/mean", "normalization/variance", "normalization/count"),
        ("opt_state/0/mu/bn/scale", "opt_state/0/nu/bn/scale"),
        ("bn/gamma/Momentum", "bn/beta/Adam", "bn/beta/Adam_1"),
        ("params/LayerNorm_0/scale", "params/LayerNorm_0/bias"),
    ],
)
def test_what_is_none_is_not_taken_for_one(names: tuple[str, ...]) -> None:
    found = find(holding(*names))
    assert found.batch_norms == []
    assert found.ambiguous == []


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (tuple(f"layers/batch_normalization/vars/{i}" for i in range(3)), "gamma or beta"),
        (("bn.running_mean",), "no running_var"),
        (("bn/moving_variance", "bn/gamma"), "no moving_mean"),
        (("batch_stats/bn/var", "params/bn/scale"), "no mean"),
    ],
)  # fmt: skip
def test_what_is_unclear_is_named_and_not_guessed(names: tuple[str, ...], says: str) -> None:
    found = find(holding(*names))
    assert found.batch_norms == []
    (one,) = found.ambiguous
    assert says in one.reason


def test_shapes_that_do_not_fit_are_named() -> None:
    found = find(holding(*TORCH, shapes={"bn.weight": (5,)}))
    assert found.batch_norms == []
    assert "differ in length" in found.ambiguous[0].reason


def test_hand_written_names() -> None:
    words = {"gamma": "scale", "beta": "offset", "moving_mean": "pop_mean", "moving_variance": "pop_var"}
    (one,) = find(holding("l1/scale", "l1/offset", "l1/pop_mean", "l1/pop_var", "l1/w"), names=words).batch_norms
    assert one.name == "l1"
    assert one.parts == {
        "gamma": "l1/scale",
        "beta": "l1/offset",
        "moving_mean": "l1/pop_mean",
        "moving_variance": "l1/pop_var",
    }
    with pytest.raises(CheckpointError, match="moving_mean, moving_variance"):
        find(holding(*TORCH), names={"gamma": "scale"})
    with pytest.raises(CheckpointError, match="attributes are"):
        find(holding(*TORCH), names={**words, "gama": "x"})


def test_moving_averages_of_tensorflow() -> None:
    names = [*TF, *(f"{n}/ExponentialMovingAverage" for n in TF[:2])]
    (raw,) = find(holding(*names)).batch_norms
    (ema,) = find(holding(*names), ema="ema").batch_norms
    assert raw.parts["gamma"] == "bn/gamma"
    assert ema.parts == {"gamma": "bn/gamma/ExponentialMovingAverage", "beta": "bn/beta/ExponentialMovingAverage",
                         "moving_mean": "bn/moving_mean", "moving_variance": "bn/moving_variance"}  # fmt: skip


def test_zero_debias_of_contrib() -> None:
    base = ("BatchNorm/beta", "BatchNorm/moving_mean", "BatchNorm/moving_variance")
    hidden = ("BatchNorm/BatchNorm/moving_mean/biased", "BatchNorm/BatchNorm/moving_mean/local_step")
    (one,) = find(holding(*base, *hidden, shapes={hidden[1]: ()})).batch_norms
    assert one.spec.zero_debias == "mean"
    assert one.parts["hidden_mean"] == hidden[0]
    assert one.state().num_updates == 1


def test_renorm_of_keras() -> None:
    (one,) = find(holding(*TF, "bn/renorm_mean", "bn/renorm_stddev", "bn/moving_stddev")).batch_norms
    assert one.spec.renorm is not None
    assert one.missing == ()


def test_what_the_file_tells_is_not_assumed_and_what_is_given_fills_the_rest() -> None:
    tensors = dict(zip(("gamma", "beta", "moving_mean", "moving_variance"), TF, strict=True))
    settings = {"dialect": "keras", "epsilon": 0.5, "momentum": 0.25, "axis": [3]}
    layer = Layer("bn", "BatchNormalization", tensors, settings)
    (one,) = find(holding(*TF, layers=(layer,)), epsilon=0.125).batch_norms
    assert (one.spec.epsilon, one.spec.decay) == (0.5, 0.25)
    assert one.sources["epsilon"] == one.sources["decay"] == "file"
    (one,) = find(holding(*TF), epsilon=0.125, decay=0.75).batch_norms
    assert (one.spec.epsilon, one.spec.decay) == (0.125, 0.75)
    assert one.sources["epsilon"] == one.sources["decay"] == "given"
    (one,) = find(holding(*TF), dialect="torch").batch_norms
    assert (one.spec.epsilon, one.sources["epsilon"]) == (1e-5, "assumed")


def test_a_stored_layer_that_is_damaged_is_named() -> None:
    layer = Layer("bn", "BatchNormalization", {"moving_mean": "gone", "moving_variance": TF[3]}, {"dialect": "keras"})
    found = find(holding(*TF, layers=(layer,)))
    assert [one.name for one in found.batch_norms] == ["bn"]  # by the names, which are sound
    wrong = Layer("bn", "BatchNormalization", dict(zip(("moving_mean", "moving_variance"), TF[2:], strict=True)),
                  {"dialect": "keras", "epsilon": -3.0})  # fmt: skip
    found = find(holding(*TF, layers=(replace(wrong, name="model/bn"),)))
    assert [(one.name, one.spec.epsilon, one.sources["epsilon"]) for one in found.batch_norms] == [
        ("bn", 1e-3, "assumed")
    ]
    assert [one.name for one in found.ambiguous] == ["model/bn"]
    assert "epsilon" in found.ambiguous[0].reason


def test_the_owner_is_the_layer_before_where_the_order_means_something() -> None:
    names = ("conv1.weight", *(n.replace("bn", "bn1") for n in TORCH), "conv2.weight", "conv2.bias",
             *(n.replace("bn", "bn2") for n in TORCH))  # fmt: skip
    shapes = {"conv1.weight": (4, 3, 3, 3), "conv2.weight": (4, 4, 1, 1)}
    first, second = find(holding(*names, shapes=shapes)).batch_norms
    assert (first.owner, second.owner) == ("conv1", "conv2")
    assert [one.owner for one in find(holding(*names, shapes=shapes, ordered=False)).batch_norms] == [None, None]


def test_the_order_is_the_files() -> None:
    names = [f"{layer}.{leaf}" for layer in ("z", "a", "m") for leaf in ("running_mean", "running_var")]
    assert [one.name for one in find(holding(*names)).batch_norms] == ["z", "a", "m"]


def test_channels_shaped_for_broadcasting() -> None:
    names = ("params/bn/scale", "params/bn/offset", *(f"state/bn/~/{e}_ema/{leaf}" for e in ("mean", "var")
             for leaf in ("counter", "hidden", "average")))  # fmt: skip
    shapes = {n: (1, 1, 1, 4) for n in names if "counter" not in n} | {n: () for n in names if "counter" in n}
    (one,) = find(holding(*names, shapes=shapes)).batch_norms
    assert one.spec.zero_debias == "all"
    assert one.missing == ()
    state = one.state().astype(one.spec).checked(one.spec)
    assert state.moving_mean is not None and state.moving_mean.shape == (4,)
