"""The course pair computes what a student writes down from the definition, in the course's words."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnlayer.errors import InputError, SpecError, StateError
from bnlayer_numpy import batchnorm_backward, batchnorm_forward

NDArray = np.ndarray[Any, np.dtype[Any]]


def case(n: int = 6, d: int = 4, dtype: Any = np.float64) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """x, gamma, beta and dout."""
    random = np.random.default_rng(n * 100 + d)
    x = random.normal(3.0, 2.0, (n, d))
    return (
        x.astype(dtype),
        random.normal(1.0, 0.3, d).astype(dtype),
        random.normal(0.0, 1.0, d).astype(dtype),
        random.normal(size=(n, d)).astype(dtype),
    )


def by_definition(x: NDArray, gamma: NDArray, beta: NDArray, eps: float = 1e-5) -> NDArray:
    return gamma * (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + eps) + beta


def test_training_normalizes_with_the_batch() -> None:
    x, gamma, beta, _ = case()
    out, _ = batchnorm_forward(x, gamma, beta, {"mode": "train"})
    np.testing.assert_allclose(out, by_definition(x, gamma, beta), rtol=1e-12)
    np.testing.assert_allclose(out.mean(axis=0), beta, atol=1e-12)


def test_running_averages_start_at_zero_and_keep_the_momentum_s_share_of_the_old() -> None:
    x, gamma, beta, _ = case()
    bn_param: dict[str, Any] = {"mode": "train"}
    batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_allclose(bn_param["running_mean"], 0.1 * x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(bn_param["running_var"], 0.1 * x.var(axis=0), rtol=1e-12)  # biased
    bn_param["momentum"] = 0.7
    batchnorm_forward(x + 5.0, gamma, beta, bn_param)
    np.testing.assert_allclose(
        bn_param["running_mean"], 0.7 * 0.1 * x.mean(axis=0) + 0.3 * (x.mean(axis=0) + 5.0), rtol=1e-12
    )
    np.testing.assert_allclose(bn_param["running_var"], (0.7 * 0.1 + 0.3) * x.var(axis=0), rtol=1e-12)


def test_testing_normalizes_with_the_running_averages_and_leaves_them() -> None:
    x, gamma, beta, _ = case()
    mean, var = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 0.25])
    bn_param = {"mode": "test", "eps": 0.5, "running_mean": mean, "running_var": var}
    out, _ = batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_allclose(out, gamma * (x - mean) / np.sqrt(var + 0.5) + beta, rtol=1e-12)
    np.testing.assert_array_equal(bn_param["running_mean"], mean)
    np.testing.assert_array_equal(bn_param["running_var"], var)


def test_testing_without_any_training_has_running_averages_of_zero() -> None:
    x, gamma, beta, _ = case()
    bn_param: dict[str, Any] = {"mode": "test"}
    out, _ = batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_allclose(out, gamma * x / np.sqrt(1e-5) + beta, rtol=1e-12)
    np.testing.assert_array_equal(bn_param["running_mean"], np.zeros(4))
    np.testing.assert_array_equal(bn_param["running_var"], np.zeros(4))


def test_only_the_dictionary_is_updated_in_place() -> None:
    x, gamma, beta, dout = case()
    mean, var = np.ones(4), np.ones(4)
    given = [x, gamma, beta, mean, var, dout]
    before = [array.copy() for array in given]
    bn_param = {"mode": "train", "momentum": 0.5, "running_mean": mean, "running_var": var, "mine": "untouched"}
    _, cache = batchnorm_forward(x, gamma, beta, bn_param)
    batchnorm_backward(dout, cache)
    for array, old in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, old)
    assert bn_param["running_mean"] is not mean and bn_param["mine"] == "untouched"
    assert set(bn_param) == {"mode", "momentum", "running_mean", "running_var", "mine"}


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_gradients_are_the_finite_differences(mode: str, eps: float) -> None:
    x, gamma, beta, dout = case()
    settings = {"mode": mode, "eps": eps, "running_mean": np.full(4, 2.5), "running_var": np.full(4, 3.0)}
    _, cache = batchnorm_forward(x, gamma, beta, dict(settings))
    gradients = batchnorm_backward(dout, cache)

    def loss() -> float:
        out, _ = batchnorm_forward(x, gamma, beta, dict(settings))
        return float((out * dout).sum())

    for array, gradient in zip((x, gamma, beta), gradients, strict=True):
        numerical = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + 1e-5
            above = loss()
            array[place] = kept - 1e-5
            numerical[place] = (above - loss()) / 2e-5
            array[place] = kept
        np.testing.assert_allclose(gradient, numerical, rtol=1e-7, atol=1e-8)


def test_in_training_a_shift_of_x_changes_nothing_so_its_gradient_is_zero() -> None:
    x, gamma, beta, dout = case()
    _, cache = batchnorm_forward(x, gamma, beta, {"mode": "train"})
    dx, _, _ = batchnorm_backward(dout, cache)
    np.testing.assert_allclose(dx.sum(axis=0), 0.0, atol=1e-12)


def test_a_small_network_learns_through_the_pair() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 5))
    target = np.tanh(x @ random.normal(size=(5, 3)))
    weight, gamma, beta = random.normal(size=(5, 3)), np.ones(3), np.zeros(3)
    bn_param: dict[str, Any] = {"mode": "train"}
    losses = []
    for _ in range(200):
        out, cache = batchnorm_forward(x @ weight, gamma, beta, bn_param)
        losses.append(float(np.mean((out - target) ** 2)))
        dx, dgamma, dbeta = batchnorm_backward(2.0 * (out - target) / out.size, cache)
        weight, gamma, beta = weight - 0.5 * x.T @ dx, gamma - 0.5 * dgamma, beta - 0.5 * dbeta
    assert losses[-1] < 0.2 * losses[0]
    out, _ = batchnorm_forward(x @ weight, gamma, beta, {**bn_param, "mode": "test"})
    assert float(np.mean((out - target) ** 2)) < 1.2 * losses[-1]  # the running averages have arrived


@pytest.mark.parametrize(
    ("x_dtype", "parameter_dtype", "out_dtype"),
    [
        (np.float64, np.float64, np.float64),
        (np.float32, np.float32, np.float32),
        (np.float32, np.float64, np.float64),
        (np.float16, np.float16, np.float16),
        (ml_dtypes.bfloat16, np.float32, np.float32),
        (np.int64, np.float32, np.float64),
    ],
)
def test_dtypes_are_numpy_s_own(x_dtype: Any, parameter_dtype: Any, out_dtype: Any) -> None:
    x, gamma, beta, dout = case()
    x, gamma, beta = x.astype(x_dtype), gamma.astype(parameter_dtype), beta.astype(parameter_dtype)
    bn_param: dict[str, Any] = {"mode": "train"}
    out, cache = batchnorm_forward(x, gamma, beta, bn_param)
    results = [
        out,
        *batchnorm_backward(dout.astype(out.dtype), cache),
        *(bn_param[f"running_{s}"] for s in ("mean", "var")),
    ]
    assert [array.dtype for array in results] == [np.dtype(out_dtype)] * 6
    assert (x * gamma + beta).dtype == out.dtype
    expected = by_definition(x.astype(np.float64), gamma.astype(np.float64), beta.astype(np.float64))
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=16 * np.finfo(out_dtype).eps)


def test_running_averages_keep_a_wider_dtype() -> None:
    x, gamma, beta, _ = case(dtype=np.float32)
    bn_param = {"mode": "train", "running_mean": np.zeros(4), "running_var": np.zeros(4)}
    out, _ = batchnorm_forward(x, gamma, beta, bn_param)
    assert out.dtype == np.float32 and bn_param["running_mean"].dtype == np.float64


def test_one_row_is_normalized_to_beta() -> None:
    x, gamma, beta, dout = case(n=1)
    out, cache = batchnorm_forward(x, gamma, beta, {"mode": "train"})
    np.testing.assert_array_equal(out, beta[None])
    np.testing.assert_array_equal(batchnorm_backward(dout, cache)[0], np.zeros((1, 4)))


@pytest.mark.parametrize("mode", [None, "eval", "TRAIN", True])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    x, gamma, beta, _ = case()
    bn_param = {} if mode is None else {"mode": mode}
    with pytest.raises(InputError, match=r'bn_param\["mode"\] must be "train" or "test"'):
        batchnorm_forward(x, gamma, beta, bn_param)
    assert "running_mean" not in bn_param


def test_images_are_refused_with_the_way_to_make_rows_of_them() -> None:
    _, gamma, beta, _ = case()
    with pytest.raises(InputError, match=r"x must be \(N, D\); got shape \(2, 4, 3, 3\)\..*transpose\(0, 2, 3, 1\)"):
        batchnorm_forward(np.zeros((2, 4, 3, 3)), gamma, beta, {"mode": "train"})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eps": -1.0}, SpecError, "epsilon must be"),
        ({"momentum": 1.5}, SpecError, "decay must be"),
        ({"running_mean": np.zeros(3)}, StateError, r"moving_mean must have shape \(4,\)"),
        ({"running_var": -np.ones(4)}, StateError, "moving_variance must not be negative"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_dictionary(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, gamma, beta, _ = case()
    bn_param = {"mode": "train", **settings}
    with pytest.raises(error, match=message):
        batchnorm_forward(x, gamma, beta, bn_param)
    assert bn_param.keys() == {"mode", *settings}


def test_parameters_and_gradients_of_another_shape_are_refused() -> None:
    x, gamma, beta, dout = case()
    with pytest.raises(StateError, match=r"gamma must have shape \(4,\)"):
        batchnorm_forward(x, gamma[:3], beta, {"mode": "train"})
    _, cache = batchnorm_forward(x, gamma, beta, {"mode": "train"})
    with pytest.raises(InputError, match="dy must have y's shape"):
        batchnorm_backward(dout[:3], cache)
