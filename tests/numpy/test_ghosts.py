"""Ghost batches are batches: each by a call of its own gives the same, whatever lies where in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormSpec, BatchNormState, InputError, Renorm
from bnlayer_numpy import abreast, batch_norm_backward, batch_norm_forward, function

SHAPES = {"rows": (24, 5), "NCHW": (24, 5, 4, 3), "uneven": (26, 5), "large": (64, 8, 96, 96)}


def drawn(shape: tuple[int, ...], spec: BatchNormSpec, dtype: str) -> tuple[Any, Any, BatchNormState[Any]]:
    random = np.random.default_rng(len(shape))
    state: BatchNormState[Any] = BatchNormState.initial(spec)
    values = {name: random.uniform(0.5, 1.5, shape[1]).astype(array.dtype)
              for name, array in state.arrays().items()}  # fmt: skip
    x = random.normal(1.0, 2.0, shape).astype(dtype)
    return x, random.normal(size=shape).astype(dtype), state.replace(**values)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ghosts were read side by side, call by call."""
    found: list[int] = []

    def wide_call(*of: Any) -> Any:
        found.append(of[-1].ghosts)
        return abreast.wide_call(*of)

    monkeypatch.setattr(function, "wide_call", wide_call)
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["strided", "consecutive"])
@pytest.mark.parametrize("renorm", [None, Renorm(r_max=1.5, r_min=0.7, d_max=0.5)], ids=["plain", "renorm"])
def test_a_ghost_batch_is_a_batch(shape: tuple[int, ...], layout: Any, renorm: Renorm | None) -> None:
    ghosts, dtype = 4, "float32" if len(shape) == 4 else "float64"
    whole = BatchNormSpec(shape[1], axis=1, renorm=renorm, decay=0.75)
    spec = BatchNormSpec(
        shape[1],
        axis=1,
        renorm=renorm,
        decay=0.75,
        virtual_batch_size=-(-shape[0] // ghosts),
        virtual_batch_layout=layout,
    )
    x, dy, state = drawn(shape, spec, dtype)
    after: Any
    y, after, cache = batch_norm_forward(x, state, spec, training=True)
    found: Any = batch_norm_backward(dy, cache)

    rows = [np.arange(g, shape[0], ghosts) for g in range(ghosts)]
    if layout == "consecutive":
        rows = np.array_split(np.arange(shape[0]), ghosts)
    dgamma: Any = 0.0
    dbeta: Any = 0.0
    entered: list[tuple[Any, int]] = []
    for of_ghost in rows:
        one, moved, own = batch_norm_forward(x[of_ghost], state, whole, training=True)
        gradients: Any = batch_norm_backward(dy[of_ghost], own)
        np.testing.assert_allclose(y[of_ghost], one, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.dx[of_ghost], gradients.dx, rtol=1e-5, atol=1e-5)
        dgamma, dbeta = dgamma + gradients.dgamma, dbeta + gradients.dbeta
        entered.append((moved.moving_mean, len(of_ghost)))
    scale = np.sqrt(dy.size / shape[1])  # what a sum of so many normal numbers is about
    np.testing.assert_allclose(found.dgamma, dgamma, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(found.dbeta, dbeta, rtol=1e-5, atol=1e-5 * scale)
    assert after.num_updates == 1
    mean: Any = sum(value * count for value, count in entered) / shape[0]
    np.testing.assert_allclose(after.moving_mean, mean, rtol=1e-5)


def test_small_consecutive_ghosts_are_brought_side_by_side(read: list[int]) -> None:
    for rows, size, ghosts in ((24, 6, [4]), (12, 5, []), (2**15, 2**13, [])):  # the second not of one size: 5, 5, 2
        spec = BatchNormSpec(5, axis=1, virtual_batch_size=size, virtual_batch_layout="consecutive")
        x, _, state = drawn((rows, 5), spec, "float32")
        batch_norm_forward(x, state, spec, training=True)
        assert read == ghosts
        read.clear()


def test_strided_ghosts_of_adjacent_rows_are_read_side_by_side(read: list[int]) -> None:
    spec = BatchNormSpec(5, axis=1, virtual_batch_size=6)
    x, dy, state = drawn((24, 5, 4, 3), spec, "float32")
    batch_norm_forward(x, state, spec, training=True)
    assert read == [4]
    batch_norm_forward(x[:23], state, spec, training=True)  # not of one size
    batch_norm_forward(np.asfortranarray(x), state, spec, training=True)
    batch_norm_forward(x, state, spec, training=True, weights=np.ones(24, bool))
    batch_norm_forward(x, state, spec, training=False)
    assert read == [4]
    _, _, cache = batch_norm_forward(x, state, spec, training=True)
    with pytest.raises(InputError, match=r"dy must have y's shape \(24, 5, 4, 3\); got \(6, 20, 4, 3\)"):
        batch_norm_backward(dy.reshape(6, 20, 4, 3), cache)
