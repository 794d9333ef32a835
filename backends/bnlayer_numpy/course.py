"""The pair of functions that courses on neural networks ask for: batch normalization of an (N, D) array, by hand.

The formulas are those of this package's own function; to see them, read `batch_moments` in statistics.py,
`updated` in averages.py, then `output` and `gradients` in definition.py. (blocked.py has the same formulas, taken apart
for speed.) In a course's words, for one column of x:

    mean, var = x.mean(), x.var()                               the batch's own, biased (divided by N)
    xhat = (x - mean) / sqrt(var + eps)
    out = gamma * xhat + beta

    running_mean = momentum * running_mean + (1 - momentum) * mean        what mode "test" normalizes with
    running_var = momentum * running_var + (1 - momentum) * var           biased too

    dbeta = sum(dout)
    dgamma = sum(dout * xhat)
    dx = gamma / sqrt(var + eps) * (dout - (dbeta + xhat * dgamma) / N)   mean and var depend on x as well

Beware of the word: momentum here weighs the OLD average, as `decay` does everywhere in bnlayer; torch's weighs the new.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnlayer.errors import InputError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

from .cache import Cache
from .function import batch_norm_backward, batch_norm_forward

NDArray = np.ndarray[Any, np.dtype[Any]]


def batchnorm_forward(x: NDArray, gamma: NDArray, beta: NDArray, bn_param: dict[str, Any]) -> tuple[NDArray, Cache]:
    """Normalize every column of x, then scale and shift it.

    Args:
        x: (N, D); N = 1 is normalized to beta.
        gamma, beta: (D,), scale and shift.
        bn_param: the layer's settings and its memory, updated in place:

            * "mode": "train" (the batch's mean and variance) or "test" (the running ones). Required.
            * "eps": added to the variance; 1e-5 where it is missing.
            * "momentum": weight on the old running averages; 0.9 where it is missing.
            * "running_mean", "running_var": (D,); zeros where they are missing. New arrays after every call in mode
              "train"; the arrays that were there are not written to.

    Returns:
        out, of x's shape, and the cache for `batchnorm_backward`. out has the dtype in which NumPy would multiply x by
        gamma and add beta, and so have the gradients; half precision is computed in float32 within.

    Raises:
        InputError: x is not (N, D), or "mode" is neither "train" nor "test".
        StateError: gamma, beta or a running average is not (D,), or a running variance is negative.
        SpecError: "eps" or "momentum" is out of range, or a dtype is not a floating-point one.
    """
    mode = bn_param.get("mode")
    if mode not in ("train", "test"):
        raise InputError(f'bn_param["mode"] must be "train" or "test"; got {mode!r}.')
    x, gamma, beta = np.asarray(x), np.asarray(gamma), np.asarray(beta)
    dtype = np.result_type(x, gamma, beta)
    if x.ndim != 2:
        raise InputError(
            f"x must be (N, D); got shape {x.shape}. For images move the channels last and make each pixel a row:"
            " x.transpose(0, 2, 3, 1).reshape(-1, C)."
        )
    zeros = np.zeros(x.shape[1], dtype)
    running_mean = np.asarray(bn_param.get("running_mean", zeros))
    running_var = np.asarray(bn_param.get("running_var", zeros))

    spec = BatchNormSpec(
        x.shape[1],
        epsilon=bn_param.get("eps", 1e-5),
        decay=bn_param.get("momentum", 0.9),
        single_value="allow",
        param_dtype=dtype.name,
        stats_dtype=np.result_type(dtype, running_mean, running_var).name,
    )
    state = BatchNormState(gamma=gamma, beta=beta, moving_mean=running_mean, moving_variance=running_var)
    out, after, cache = batch_norm_forward(
        x.astype(dtype), state.astype(spec).checked(spec), spec, training=mode == "train"
    )
    bn_param["running_mean"], bn_param["running_var"] = after.moving_mean, after.moving_variance
    return out, cache


def batchnorm_backward(dout: NDArray, cache: Cache) -> tuple[NDArray, NDArray, NDArray]:
    """Gradients of a scalar loss, from dout = dloss/dout of the call that gave `cache`, in either mode.

    In mode "train" they go through the batch's mean and variance too; in mode "test" these are constants.

    Args:
        dout: (N, D).
        cache: what `batchnorm_forward` returned beside out.

    Returns:
        dx (N, D), dgamma (D,) and dbeta (D,).

    Raises:
        InputError: dout is not of out's shape.
    """
    gradients = batch_norm_backward(dout, cache)
    assert gradients.dgamma is not None and gradients.dbeta is not None  # the layer has both parameters
    return gradients.dx, gradients.dgamma, gradients.dbeta
