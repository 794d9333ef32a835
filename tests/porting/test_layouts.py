"""Each framework's own layer, loaded with the kernel that the layouts give it, computes what torch computes.

Kernels and inputs are small integers: every sum is exact in float32, in whatever order it is taken, so outputs are
equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bnlayer.porting.layouts import LAYOUTS, Layout

BATCH, INPUTS, OUTPUTS, MULTIPLIER = 2, 4, 6, 2
SPATIAL = (7, 6, 5)


@dataclass(frozen=True)
class Case:
    """A layer, and what it is given."""

    kind: str  # of the layouts
    size: tuple[int, ...] = ()  # the kernel's, along each spatial axis
    stride: int = 1
    groups: int = 1
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # for the framework's layer

    def __str__(self) -> str:
        size = "x".join(map(str, self.size)) or "-"
        return f"{self.kind} {size} stride {self.stride} groups {self.groups}"

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical kernel's."""
        match self.kind:
            case "conv":
                return (OUTPUTS, INPUTS // self.groups, *self.size)
            case "depthwise":
                return (INPUTS * MULTIPLIER, 1, *self.size)
            case "dense":
                return (OUTPUTS, INPUTS)
            case "embedding":
                return (INPUTS, OUTPUTS)
            case _:
                return (INPUTS, OUTPUTS // self.groups, *self.size)

    @property
    def inputs(self) -> np.ndarray:
        """Channels first."""
        rng = np.random.default_rng(1)
        if self.kind == "embedding":
            return rng.integers(0, INPUTS, (BATCH, 3))
        return rng.integers(-8, 9, (BATCH, INPUTS, *SPATIAL[: self.rank])).astype(np.float32)

    @property
    def kernel(self) -> np.ndarray:
        """Canonical."""
        return np.random.default_rng(2).integers(-8, 9, self.shape).astype(np.float32)

    @property
    def expected(self) -> np.ndarray:
        """What torch computes with the canonical kernel, channels first."""
        import torch
        from torch.nn import functional

        x, kernel = torch.from_numpy(self.inputs), torch.from_numpy(self.kernel)
        match self.kind:
            case "dense":
                y = functional.linear(x, kernel)
            case "embedding":
                y = functional.embedding(x, kernel)
            case "conv" | "depthwise":
                op = (functional.conv1d, functional.conv2d, functional.conv3d)[self.rank - 1]
                y = op(x, kernel, stride=self.stride, groups=self.groups if self.kind == "conv" else INPUTS)
            case _:
                op = (functional.conv_transpose1d, functional.conv_transpose2d)[self.rank - 1]
                y = op(x, kernel, stride=self.stride, groups=self.groups)
        return y.numpy()


CONVS = [Case("conv", (3,)), Case("conv", (3, 2), 2), Case("conv", (3, 2, 1)), Case("conv", (3, 2), groups=2)]
DEPTHWISE = [Case("depthwise", (3,)), Case("depthwise", (3, 2), 2)]
# A kernel longer than the stride: where it is shorter, frameworks differ in what they add at the end.
TRANSPOSED = [Case("conv transpose", size, stride) for size in ((3,), (3, 2)) for stride in (1, 2)]
GROUPED_TRANSPOSED = Case("conv transpose", (3, 2), 2, groups=2)
OTHERS = [Case("dense"), Case("embedding")]
CASES = [*CONVS, *DEPTHWISE, *TRANSPOSED, *OTHERS]

# A layer of the framework, loaded by `load` (from its kernel's shape to its kernel): the output.
Load = Callable[[tuple[int, ...]], np.ndarray]
Compute = Callable[[Case, Load], Any]


def torch_layer(case: Case, load: Load) -> Any:
    import torch
    from torch import nn

    match case.kind:
        case "dense":
            layer = nn.Linear(INPUTS, OUTPUTS, bias=False)
        case "embedding":
            layer = nn.Embedding(INPUTS, OUTPUTS)
        case "conv" | "depthwise":
            outputs, groups = (OUTPUTS, case.groups) if case.kind == "conv" else (INPUTS * MULTIPLIER, INPUTS)
            of = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[case.rank - 1]
            layer = of(INPUTS, outputs, case.size, stride=case.stride, groups=groups, bias=False)
        case _:
            of = (nn.ConvTranspose1d, nn.ConvTranspose2d)[case.rank - 1]
            layer = of(INPUTS, OUTPUTS, case.size, stride=case.stride, groups=case.groups, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(load(tuple(layer.weight.shape))))
        return layer(torch.from_numpy(case.inputs)).numpy()


def keras_layer(case: Case, load: Load) -> Any:
    keras = pytest.importorskip("keras")
    layers = keras.layers
    options = {"strides": case.stride, "use_bias": False, "data_format": "channels_last"}
    match case.kind:
        case "dense":
            layer = layers.Dense(OUTPUTS, use_bias=False)
        case "embedding":
            layer = layers.Embedding(INPUTS, OUTPUTS)
        case "conv":
            of = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[case.rank - 1]
            layer = of(OUTPUTS, case.size, groups=case.groups, **options)
        case "depthwise":
            of = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)[case.rank - 1]
            size = case.size[0] if case.rank == 1 else case.size
            layer = of(size, depth_multiplier=MULTIPLIER, **options)
        case _:
            of = (layers.Conv1DTranspose, layers.Conv2DTranspose)[case.rank - 1]
            layer = of(OUTPUTS, case.size, **options)
    x = channels_last(case)
    layer.build(x.shape)
    kernel = layer.weights[0]
    kernel.assign(load(tuple(kernel.shape)))
    return keras.ops.convert_to_numpy(layer(x))


def linen_layer(case: Case, load: Load) -> Any:
    jax = pytest.importorskip("jax")
    from flax import linen

    match case.kind:
        case "dense":
            layer = linen.Dense(OUTPUTS, use_bias=False)
        case "embedding":
            layer = linen.Embed(INPUTS, OUTPUTS)
        case "conv" | "depthwise":
            outputs, groups = (OUTPUTS, case.groups) if case.kind == "conv" else (INPUTS * MULTIPLIER, INPUTS)
            options = {"padding": "VALID", "feature_group_count": groups, "use_bias": False}
            layer = linen.Conv(outputs, case.size, case.stride, **options)
        case _:
            strides = (case.stride,) * case.rank
            swap = case.kind.endswith("transpose_kernel")
            layer = linen.ConvTranspose(
                OUTPUTS, case.size, strides, padding="VALID", use_bias=False, transpose_kernel=swap
            )
    x = channels_last(case)
    params = layer.init(jax.random.key(0), x)["params"]
    ((name, kernel),) = params.items()
    return layer.apply({"params": {name: load(kernel.shape)}}, x)


def nnx_layer(case: Case, load: Load) -> Any:
    pytest.importorskip("flax")
    from flax import nnx

    rngs = nnx.Rngs(0)
    match case.kind:
        case "dense":
            layer = nnx.Linear(INPUTS, OUTPUTS, use_bias=False, rngs=rngs)
        case "embedding":
            layer = nnx.Embed(INPUTS, OUTPUTS, rngs=rngs)
        case "conv" | "depthwise":
            outputs, groups = (OUTPUTS, case.groups) if case.kind == "conv" else (INPUTS * MULTIPLIER, INPUTS)
            options = {"padding": "VALID", "feature_group_count": groups, "use_bias": False, "rngs": rngs}
            layer = nnx.Conv(INPUTS, outputs, case.size, strides=case.stride, **options)
        case _:
            options = {"padding": "VALID", "use_bias": False, "rngs": rngs}
            swap = case.kind.endswith("transpose_kernel")
            layer = nnx.ConvTranspose(
                INPUTS, OUTPUTS, case.size, strides=(case.stride,) * case.rank, transpose_kernel=swap, **options
            )
    param = layer.embedding if case.kind == "embedding" else layer.kernel
    param[...] = load(param.shape)
    return layer(channels_last(case))


def haiku_layer(case: Case, load: Load) -> Any:
    haiku = pytest.importorskip("haiku")
    import jax

    def layer(x: Any) -> Any:
        options = {"with_bias": False, "padding": "VALID"}
        match case.kind:
            case "dense":
                return haiku.Linear(OUTPUTS, with_bias=False)(x)
            case "embedding":
                return haiku.Embed(INPUTS, OUTPUTS)(x)
            case "conv":
                of = (haiku.Conv1D, haiku.Conv2D, haiku.Conv3D)[case.rank - 1]
                return of(OUTPUTS, case.size, case.stride, feature_group_count=case.groups, **options)(x)
            case "depthwise":
                of = (haiku.DepthwiseConv1D, haiku.DepthwiseConv2D)[case.rank - 1]
                return of(MULTIPLIER, case.size, case.stride, **options)(x)
            case _:
                of = (haiku.Conv1DTranspose, haiku.Conv2DTranspose)[case.rank - 1]
                return of(OUTPUTS, case.size, case.stride, **options)(x)

    net = haiku.without_apply_rng(haiku.transform(layer))
    x = channels_last(case)
    params = net.init(jax.random.key(0), x)
    return net.apply(jax.tree.map(lambda kernel: load(kernel.shape), params), x)


def equinox_layer(case: Case, load: Load) -> Any:
    equinox = pytest.importorskip("equinox")
    import jax

    nn, key = equinox.nn, jax.random.key(0)
    options = {"use_bias": False, "key": key}
    match case.kind:
        case "dense":
            layer = nn.Linear(INPUTS, OUTPUTS, **options)
        case "embedding":
            layer = nn.Embedding(INPUTS, OUTPUTS, key=key)
        case "conv" | "depthwise":
            outputs, groups = (OUTPUTS, case.groups) if case.kind == "conv" else (INPUTS * MULTIPLIER, INPUTS)
            layer = nn.Conv(case.rank, INPUTS, outputs, case.size, case.stride, groups=groups, **options)
        case _:
            layer = nn.ConvTranspose(case.rank, INPUTS, OUTPUTS, case.size, case.stride, groups=case.groups, **options)
    weight = jax.numpy.asarray(load(layer.weight.shape))
    layer = equinox.tree_at(lambda layer: layer.weight, layer, weight)
    return (jax.vmap(jax.vmap(layer)) if case.kind == "embedding" else jax.vmap(layer))(case.inputs)


def channels_last(case: Case) -> np.ndarray:
    return np.moveaxis(case.inputs, 1, -1) if case.rank else case.inputs


FRAMEWORKS: dict[str, tuple[str, Compute]] = {
    "torch": ("torch", torch_layer),
    "keras": ("keras", keras_layer),
    "linen": ("flax", linen_layer),
    "nnx": ("flax", nnx_layer),
    "haiku": ("haiku", haiku_layer),
    "equinox": ("equinox", equinox_layer),
}
SWAPPED = [Case("conv transpose, transpose_kernel", case.size, case.stride) for case in TRANSPOSED]
TRIALS = [
    (framework, case)
    for framework, (dialect, _) in FRAMEWORKS.items()
    for case in [*CASES, *(SWAPPED if dialect == "flax" else []), *([GROUPED_TRANSPOSED] if dialect == "torch" else [])]
]


@pytest.mark.parametrize(("framework", "case"), TRIALS, ids=str)
def test_a_layer_with_the_stored_kernel_computes_what_torch_computes(framework: str, case: Case) -> None:
    pytest.importorskip("torch")
    dialect, compute = FRAMEWORKS[framework]
    layout, kernel = LAYOUTS[dialect][case.kind], case.kernel
    asked = []

    def load(shape: tuple[int, ...]) -> np.ndarray:
        asked.append(shape)
        stored = layout.stored(kernel, shape)
        assert stored.shape == shape
        assert stored.flags.c_contiguous
        return stored

    output = np.asarray(compute(case, load))
    if case.rank and dialect not in ("torch", "equinox"):
        output = np.moveaxis(output, -1, 1)
    np.testing.assert_array_equal(output, case.expected)
    (shape,) = asked
    assert layout.canonical_shape(shape) == kernel.shape
    np.testing.assert_array_equal(layout.canonical(layout.stored(kernel, shape)), kernel)


@pytest.mark.parametrize("dialect", LAYOUTS)
def test_every_layout_is_tried(dialect: str) -> None:
    tried = {case.kind for framework, case in TRIALS if FRAMEWORKS[framework][0] == dialect}
    assert tried == set(LAYOUTS[dialect])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8"])
@pytest.mark.parametrize(
    "layout", dict.fromkeys(layout for kinds in LAYOUTS.values() for layout in kinds.values()), ids=str
)
def test_any_dtype_comes_back_bit_by_bit(layout: Layout, dtype: str) -> None:
    stored = np.arange(3 * 2 * 4 * 5).reshape(3, 2, 4, 5).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    canonical = layout.canonical(stored)
    assert canonical.dtype == stored.dtype
    assert layout.stored(canonical, stored.shape).tobytes() == stored.tobytes()
