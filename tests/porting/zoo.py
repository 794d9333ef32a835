"""Architectures as lists of layers, and the ways in which real libraries name and order them.

No framework is needed: what decides which layer is which are names, shapes and order. Every layer has an identity, so
that a match can be held against the truth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bnlayer.checkpoint import Checkpoint, Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class L:
    """A layer: where it is (stage and block, or none), what it does there, and its canonical kernel's shape.

    `word` and `number` are two ways to say the same: libraries call a layer "expand" or "conv1".
    """

    place: tuple[int, ...]
    word: str
    number: int
    kind: str
    shape: Shape
    bias: bool = False
    of: str = ""  # of a batch norm: the kind of the layer that it follows

    @property
    def id(self) -> tuple[object, ...]:
        return (self.place, self.word, "bn" if self.kind == "bn" else "layer")


@dataclass
class Builder:
    """Collects layers; `at` says where."""

    layers: list[L] = field(default_factory=list)
    place: tuple[int, ...] = ()

    def at(self, *place: int) -> Builder:
        self.place = place
        return self

    def add(self, word: str, number: int, kind: str, *shape: int, bias: bool = False) -> None:
        self.layers.append(L(self.place, word, number, kind, shape, bias))

    def bn(self, word: str, number: int, channels: int, of: str = "conv") -> None:
        self.layers.append(L(self.place, word, number, "bn", (channels,), of=of))

    def conv(self, word: str, number: int, o: int, i: int, k: int, *, groups: int = 1, kind: str = "conv",
             bias: bool = False, bn: bool = True) -> int:  # fmt: skip
        if groups == o == i and groups > 1:
            kind = "depthwise"
        self.add(word, number, kind, o, i // groups, k, k, bias=bias)
        if bn:
            self.bn(word, number, o, kind)
        return o


def _resnet(depths: Sequence[int], *, bottleneck: bool, width: int = 64, groups: int = 1, grow: int = 1,
            classes: int = 1000, stem: int = 64, pre: bool = False) -> list[L]:  # fmt: skip
    b = Builder()
    i = b.at().conv("stem", 0, stem, 3, 7, bn=not pre)
    for s, depth in enumerate(depths):
        m = width * 2**s
        o = m * (4 // grow) if bottleneck else m
        for n in range(depth):
            b.at(s, n)
            sizes = [(m, i, 1), (m, m, 3), (o, m, 1)] if bottleneck else [(o, i, 3), (o, o, 3)]
            for j, (oo, ii, k) in enumerate(sizes, 1):
                if pre:
                    b.bn(f"conv{j}", j, ii)
                b.conv(f"conv{j}", j, oo, ii, k, groups=groups if k == 3 and bottleneck else 1, bn=not pre)
            if i != o or (bottleneck and n == 0):
                b.conv("shortcut", 0, o, i, 1, bn=not pre)
            i = o
    b.at()
    if pre:
        b.bn("final", 90, i)
    b.add("head", 99, "dense", classes, i, bias=True)
    return b.layers


def _stacked(widths: Sequence[Sequence[int]], *, bn: bool = True, dense: Sequence[int] = (512, 512, 10)) -> list[L]:
    b, i = Builder(), 3
    for s, stage in enumerate(widths):
        for n, o in enumerate(stage):
            i = b.at(s, n).conv("conv", 1, o, i, 3, bias=True, bn=bn)
    b.at()
    for n, o in enumerate(dense):
        b.add(f"head{n}", 99 + n, "dense", o, i if n else i * 4, bias=True)
        i = o
    return b.layers


def _mobilenet1() -> list[L]:
    b = Builder()
    i = b.conv("stem", 0, 32, 3, 3)
    for n, o in enumerate([64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]):
        b.at(n).conv("depthwise", 1, i, i, 3, groups=i)
        i = b.conv("project", 2, o, i, 1)
    b.at().add("head", 99, "dense", 1000, i, bias=True)
    return b.layers


def _inverted(
    rows: Sequence[tuple[int, int, int, int]], *, se: bool, dense_se: bool = False, last: int = 1280
) -> list[L]:
    b = Builder()
    i = b.conv("stem", 0, 32, 3, 3)
    for s, (t, o, depth, k) in enumerate(rows):
        for n in range(depth):
            b.at(s, n)
            m = i * t
            if t > 1:
                b.conv("expand", 1, m, i, 1)
            b.conv("depthwise", 2, m, m, k, groups=m)
            if se:
                r = max(i // 4, 4)
                one = () if dense_se else (1, 1)
                kind = "dense" if dense_se else "conv"
                b.add("reduce", 3, kind, r, m, *one, bias=True)
                b.add("grow", 4, kind, m, r, *one, bias=True)
            i = b.conv("project", 5, o, m, 1)
    b.at().conv("top", 98, last, i, 1)
    b.add("head", 99, "dense", 1000, last, bias=True)
    return b.layers


_V2 = [(1, 16, 1, 3), (6, 24, 2, 3), (6, 32, 3, 3), (6, 64, 4, 3), (6, 96, 3, 3), (6, 160, 3, 3), (6, 320, 1, 3)]
_V3 = [(1, 16, 1, 3), (4, 24, 2, 3), (3, 40, 3, 5), (6, 80, 4, 3), (6, 112, 2, 3), (6, 160, 3, 5)]
_B0 = [(1, 16, 1, 3), (6, 24, 2, 3), (6, 40, 2, 5), (6, 80, 3, 3), (6, 112, 3, 5), (6, 192, 4, 5), (6, 320, 1, 3)]


def _densenet() -> list[L]:
    b = Builder()
    i = b.conv("stem", 0, 64, 3, 7)
    for s, depth in enumerate((6, 12, 8, 4)):
        for n in range(depth):
            b.at(s, n).bn("conv1", 1, i)
            b.conv("conv1", 1, 128, i, 1, bn=False)
            b.bn("conv2", 2, 128)
            b.conv("conv2", 2, 32, 128, 3, bn=False)
            i += 32
        if s < 3:
            b.at(s).bn("transition", 1, i)
            b.conv("transition", 1, i // 2, i, 1, bn=False)
            i //= 2
    b.at().bn("final", 90, i)
    b.add("head", 99, "dense", 1000, i, bias=True)
    return b.layers


def _unet() -> list[L]:
    b, i = Builder(), 3
    for s, o in enumerate((32, 64, 128, 256)):
        b.at(s).conv("down1", 1, o, i, 3)
        i = b.conv("down2", 2, o, o, 3)
    for s, o in enumerate((128, 64, 32), 4):
        b.at(s).add("up", 3, "conv transpose", i, o, 2, 2, bias=True)
        b.conv("down1", 1, o, 2 * o, 3)
        i = b.conv("down2", 2, o, o, 3)
    b.at().conv("head", 99, 5, i, 1, bias=True, bn=False)
    return b.layers


def _convnext() -> list[L]:
    b, i = Builder(), 3
    for s, (depth, o) in enumerate(zip((3, 3, 9, 3), (96, 192, 384, 768), strict=True)):
        if s:
            b.at(s).add("before", 1, "norm", i)
        b.at(s).conv("sample", 2, o, i, 2 if s else 4, bias=True, bn=False)
        if not s:
            b.add("before", 3, "norm", o)
        for n in range(depth):
            b.at(s, n).conv("depthwise", 1, o, o, 7, groups=o, bias=True, bn=False)
            b.add("norm", 2, "norm", o)
            b.add("expand", 3, "dense", 4 * o, o, bias=True)
            b.add("project", 4, "dense", o, 4 * o, bias=True)
        i = o
    b.at().add("final", 90, "norm", i)
    b.add("head", 99, "dense", 1000, i, bias=True)
    return b.layers


def _vit() -> list[L]:
    b = Builder()
    b.conv("stem", 0, 192, 3, 16, bias=True, bn=False)
    for n in range(12):
        b.at(n).add("before", 1, "norm", 192)
        for j, word in enumerate(("query", "key", "value", "out"), 2):
            b.add(word, j, "dense", 192, 192, bias=True)
        b.add("after", 6, "norm", 192)
        b.add("expand", 7, "dense", 768, 192, bias=True)
        b.add("project", 8, "dense", 192, 768, bias=True)
    b.at().add("final", 90, "norm", 192)
    b.add("head", 99, "dense", 1000, 192, bias=True)
    return b.layers


def _mlp() -> list[L]:
    b, i = Builder(), 784
    for n, o in enumerate((256, 256, 256, 256)):
        b.at(n).add("fc", 1, "dense", o, i, bias=True)
        b.bn("fc", 1, o, "dense")
        i = o
    b.at().add("head", 99, "dense", 10, i, bias=True)
    return b.layers


def stack(blocks: int, convs: int = 1, channels: int = 32) -> list[L]:
    """Blocks of convolutions that are all of one shape."""
    b = Builder()
    for n in range(blocks):
        for j in range(1, convs + 1):
            b.at(0, n).conv(f"conv{j}", j, channels, channels, 3)
    return b.layers


def branches(words: Sequence[str] = ("left", "right"), *, equal: bool) -> list[L]:
    """Towers side by side, of one shape or of different widths."""
    b = Builder()
    for t, _ in enumerate(words):
        i = 3
        for n, o in enumerate((16, 32, 32, 32)):
            i = b.at(t, n).conv("conv", 1, o + (0 if equal else 8 * t), i, 3)
    return b.layers


ARCHITECTURES: dict[str, Callable[[], list[L]]] = {
    "ResNet-18": lambda: _resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-34": lambda: _resnet((3, 4, 6, 3), bottleneck=False),
    "ResNet-50": lambda: _resnet((3, 4, 6, 3), bottleneck=True),
    "ResNet-101": lambda: _resnet((3, 4, 23, 3), bottleneck=True),
    "ResNet-50 V2": lambda: _resnet((3, 4, 6, 3), bottleneck=True, pre=True),
    "ResNeXt-50": lambda: _resnet((3, 4, 6, 3), bottleneck=True, width=128, groups=32, grow=2),
    "WideResNet": lambda: _resnet((6, 6, 6), bottleneck=False, width=160, stem=16, classes=10),
    "VGG-16": lambda: _stacked(((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))),
    "VGG-16 plain": lambda: _stacked(((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3), bn=False),
    "small CNN": lambda: _stacked(((16,), (32,)), dense=(10,)),
    "MobileNetV1": _mobilenet1,
    "MobileNetV2": lambda: _inverted(_V2, se=False),
    "MobileNetV3": lambda: _inverted(_V3, se=True, last=960),
    "EfficientNet-B0": lambda: _inverted(_B0, se=True),
    "EfficientNet-B0, dense SE": lambda: _inverted(_B0, se=True, dense_se=True),
    "DenseNet": _densenet,
    "U-Net": _unet,
    "ConvNeXt": _convnext,
    "ViT": _vit,
    "MLP": _mlp,
    "stack 6": lambda: stack(6),
    "stack 2x2": lambda: stack(2, 2),
    "stack 5x3": lambda: stack(5, 3),
    "towers": lambda: branches(equal=False),
    "siamese": lambda: branches(equal=True),
}


# Orders in which a model may hold its layers.


def _blocks(layers: Sequence[L], change: Callable[[list[L]], list[L]]) -> list[L]:
    """Each run of layers of one place, changed."""
    result: list[L] = []
    run: list[L] = []
    for layer in layers:
        if run and layer.place != run[0].place:
            result += change(run)
            run = []
        run.append(layer)
    return result + change(run)


def _moved(run: list[L], to: Callable[[int], int]) -> list[L]:
    short = [layer for layer in run if layer.word == "shortcut"]
    rest = [layer for layer in run if layer.word != "shortcut"]
    at = to(len(rest))
    return rest[:at] + short + rest[at:]


ORDERS: dict[str, Callable[[list[L]], list[L]]] = {
    "definition": lambda layers: layers,
    "shortcut first": lambda layers: _blocks(layers, lambda run: _moved(run, lambda n: 0)),
    "shortcut between": lambda layers: _blocks(layers, lambda run: _moved(run, lambda n: n // 2 // 2 * 2)),
    "norms last": lambda layers: _blocks(
        layers, lambda run: [x for x in run if x.kind != "bn"] + [x for x in run if x.kind == "bn"]
    ),
    "reversed": lambda layers: _blocks(layers, lambda run: run[::-1]),
}


# Conventions: from the layers in their order to their names, without the tensors' own last parts.

Names = list[str]


def _kind_number(layer: L) -> str:
    return f"{'bn' if layer.kind == 'bn' else 'conv'}{layer.number}"


def torchvision(layers: Sequence[L]) -> Names:
    def name(x: L) -> str:
        if x.number >= 99:
            return "fc" if x.number == 99 else f"fc{x.number - 98}"
        own = f"downsample.{int(x.kind == 'bn')}" if x.number == 0 and x.place else _kind_number(x)
        where = [f"layer{x.place[0] + 1}", *map(str, x.place[1:])] if x.place else []
        return ".".join([*where, own])

    return [name(x) for x in layers]


def timm(layers: Sequence[L]) -> Names:
    def name(x: L) -> str:
        where = [f"{word}.{n}" for word, n in zip(("stages", "blocks"), x.place, strict=False)]
        return ".".join([*where, x.word, "bn" if x.kind == "bn" else "conv"])

    return [name(x) for x in layers]


def transformers(layers: Sequence[L]) -> Names:
    def name(x: L) -> str:
        if x.number >= 99:
            return f"classifier.{x.number - 98}"
        where = [f"{word}.{n}" for word, n in zip(("stages", "layers"), x.place, strict=False)]
        own = ["shortcut"] if x.word == "shortcut" else [f"layer.{x.number - 1}"] if x.place else ["embedder", x.word]
        return ".".join(["model.encoder", *where, *own, "normalization" if x.kind == "bn" else "convolution"])

    return [name(x) for x in layers]


def keras_applications(layers: Sequence[L]) -> Names:
    def name(x: L) -> str:
        kind = "bn" if x.kind == "bn" else "conv" if "conv" in x.kind or x.kind == "depthwise" else x.kind
        where = [f"{word}{n + 1 + (word == 'conv')}" for word, n in zip(("conv", "block"), x.place, strict=False)]
        return "_".join([*where, str(x.number), kind] if x.place else [x.word, kind])

    return [name(x) for x in layers]


def keras_words(layers: Sequence[L]) -> Names:
    return [
        "_".join([*(f"{w}{n}" for w, n in zip(("stage", "block"), x.place, strict=False)), x.word,
                  *(["bn"] if x.kind == "bn" else [])])
        for x in layers
    ]  # fmt: skip


_KERAS_CLASS = {"conv": "conv2d", "depthwise": "depthwise_conv2d", "conv transpose": "conv2d_transpose",
                "dense": "dense", "norm": "layer_normalization", "bn": "batch_normalization"}  # fmt: skip


def _suffixed(word: str, n: int) -> str:
    return f"{word}_{n}" if n else word


def keras_numbers(layers: Sequence[L]) -> Names:
    count: Counter[str] = Counter()
    result = []
    for x in layers:
        word = _KERAS_CLASS[x.kind]
        result.append(f"layers/{_suffixed(word, count[word])}")
        count[word] += 1
    return result


def tf_official(layers: Sequence[L]) -> Names:
    return [f"resnet_model/{name.removeprefix('layers/')}" for name in keras_numbers(layers)]


_LINEN_CLASS = {"conv": "Conv", "depthwise": "Conv", "conv transpose": "ConvTranspose", "dense": "Dense",
                "norm": "LayerNorm", "bn": "BatchNorm"}  # fmt: skip


def linen(layers: Sequence[L]) -> Names:
    """Blocks are counted through the model, the layers in each by class."""
    count: Counter[tuple[object, str]] = Counter()
    blocks: dict[tuple[int, ...], int] = {}
    result = []
    for x in layers:
        word = _LINEN_CLASS[x.kind]
        where = [f"Block_{blocks.setdefault(x.place, len(blocks))}"] if x.place else []
        own = f"{word}_{count[x.place, word]}"
        count[x.place, word] += 1
        result.append("/".join([*where, own]))
    return result


def nnx(layers: Sequence[L]) -> Names:
    def name(x: L) -> str:
        where = [part for word, n in zip(("stages", "blocks"), x.place, strict=False) for part in (word, str(n))]
        return "/".join([*where, x.word + ("_bn" if x.kind == "bn" else "")])

    return [name(x) for x in layers]


def haiku(layers: Sequence[L]) -> Names:
    def name(x: L) -> str:
        where = [_suffixed(f"{w}", n) for w, n in zip(("block_group", "block"), x.place, strict=False)]
        kind = "batchnorm" if x.kind == "bn" else "conv"
        own = (
            f"shortcut_{kind}" if x.word == "shortcut" else f"{kind}_{x.number - 1}" if x.place else f"{x.word}_{kind}"
        )
        return "/~/".join(["net", *where, own])

    return [name(x) for x in layers]


def equinox(layers: Sequence[L]) -> Names:
    return [name.replace("downsample.", "downsample.layers.") for name in torchvision(layers)]


def slim(layers: Sequence[L]) -> Names:
    def name(x: L) -> str:
        where = [f"{w}{n + 1}" for w, n in zip(("block", "unit_"), x.place, strict=False)]
        return "/".join(["net", *where, x.word, *(["BatchNorm"] if x.kind == "bn" else [])])

    return [name(x) for x in layers]


def sequential(layers: Sequence[L]) -> Names:
    """All in one nn.Sequential, an activation behind each norm."""
    result, n = [], 0
    for i, x in enumerate(layers):
        result.append(f"features.{n}")
        follows = i + 1 < len(layers) and layers[i + 1].kind == "bn"
        n += 1 if follows or x.kind == "dense" else 2
    return result


def fastai(layers: Sequence[L]) -> Names:
    def name(x: L) -> str:
        if not x.place:
            return f"{x.number}.{int(x.kind == 'bn')}"
        where = [str(x.place[0] + 4), *map(str, x.place[1:])]
        own = ["idpath", "0"] if x.word == "shortcut" else ["convs", str(x.number - 1)]
        return ".".join([*where, *own, str(int(x.kind == "bn"))])

    return [name(x) for x in layers]


def fine_first(layers: Sequence[L]) -> Names:
    """The number within the block comes before the block's."""
    return [
        "_".join([f"{'n' if x.kind == 'bn' else 'w'}{x.number}", *(f"l{n}" for n in reversed(x.place))]) for x in layers
    ]


@dataclass(frozen=True)
class Convention:
    """How a library names layers.

    Attributes:
        names: of layers in their order.
        dialect: whose words and layouts.
        ordered: whether the file keeps the order.
        hierarchical: whether the names say where a layer is.
        counted: whether the names count in the order of registration.
    """

    names: Callable[[Sequence[L]], Names]
    dialect: str
    ordered: bool
    hierarchical: bool = True
    counted: bool = False


CONVENTIONS = {
    "torchvision": Convention(torchvision, "torch", True),
    "timm": Convention(timm, "torch", True),
    "transformers": Convention(transformers, "torch", True),
    "fastai": Convention(fastai, "torch", True),
    "sequential": Convention(sequential, "torch", True, hierarchical=False, counted=True),
    "fine first": Convention(fine_first, "torch", True),
    "keras.applications": Convention(keras_applications, "keras", True),
    "keras words": Convention(keras_words, "keras", True),
    "keras numbers": Convention(keras_numbers, "keras", False, hierarchical=False, counted=True),
    "tf official": Convention(tf_official, "tf", False, hierarchical=False, counted=True),
    "slim": Convention(slim, "tf", False),
    "linen": Convention(linen, "flax", False, counted=True),
    "nnx": Convention(nnx, "nnx", False),
    "haiku": Convention(haiku, "haiku", False),
    "equinox": Convention(equinox, "equinox", True),
}

_AXES: dict[str, dict[str, Callable[[Shape], Shape]]] = {
    "torch": {}, "equinox": {"conv transpose": lambda s: (s[1], s[0], *s[2:])},
    "keras": {"conv": lambda s: (*s[2:], s[1], s[0]), "dense": lambda s: (s[1], s[0]),
              "depthwise": lambda s: (*s[2:], s[0], 1), "conv transpose": lambda s: (*s[2:], s[1], s[0])},
}  # fmt: skip
_AXES["tf"] = _AXES["keras"]
_AXES["flax"] = _AXES["nnx"] = {
    **_AXES["keras"],
    "depthwise": lambda s: (*s[2:], 1, s[0]),
    "conv transpose": lambda s: (*s[2:], s[0], s[1]),
}
_AXES["haiku"] = {**_AXES["flax"], "conv transpose": _AXES["keras"]["conv transpose"]}

_FORMAT = {"torch": "torch", "equinox": "equinox", "keras": "keras", "tf": "tensorflow", "flax": "flax", "nnx": "orbax",
           "haiku": "haiku"}  # fmt: skip
_LEAVES = {
    "torch": ("weight", "bias", "weight", "bias"), "equinox": ("weight", "bias", "weight", "bias"),
    "keras": ("vars/0", "vars/1", "vars/0", "vars/1"), "tf": ("kernel", "bias", "gamma", "beta"),
    "flax": ("kernel", "bias", "scale", "bias"), "nnx": ("kernel", "bias", "scale", "bias"),
    "haiku": ("w", "b", "scale", "offset"),
}  # fmt: skip


def _stats(dialect: str, name: str) -> Iterable[tuple[str, bool]]:
    """The names of a batch norm's statistics; whether each is a count."""
    if dialect == "torch":
        yield from ((f"{name}.running_mean", False), (f"{name}.running_var", False))
        yield f"{name}.num_batches_tracked", True
    elif dialect == "keras":
        yield from ((f"{name}/vars/2", False), (f"{name}/vars/3", False))
    elif dialect == "tf":
        yield from ((f"{name}/moving_mean", False), (f"{name}/moving_variance", False))
    elif dialect == "flax":
        yield from ((f"batch_stats/{name}/mean", False), (f"batch_stats/{name}/var", False))
    elif dialect == "nnx":
        yield from ((f"{name}/mean", False), (f"{name}/var", False))
    elif dialect == "haiku":
        yield from ((f"state/{name}/~/{s}_ema/{w}", False) for s in ("mean", "var") for w in ("average", "hidden"))
        yield f"state/{name}/~/mean_ema/counter", True
    else:
        yield from ((f"{name}.batch_hidden_mean", False), (f"{name}.batch_hidden_variance", False))
        yield f"{name}.batch_counter", True


def _tensor(shape: Shape, dtype: str = "float32") -> Tensor:
    return Tensor(np.dtype(dtype), shape, lambda: np.zeros(shape, dtype))


Truth = dict[str, tuple[object, ...]]


def write(layers: Sequence[L], names: Names, dialect: str, *, ordered: bool) -> tuple[Checkpoint, Truth]:
    """The checkpoint, and the identity of the layer that each tensor is of. Where the order is lost, it is the
    alphabet's."""
    kernel, bias, gamma, beta = _LEAVES[dialect]
    cut = "." if dialect in ("torch", "equinox") else "/"
    before = "params/" if dialect in ("flax", "haiku") else ""
    tensors: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    truth: Truth = {}
    aliases: dict[str, str] = {}
    own_names = names
    if dialect == "keras" and not all(name.startswith("layers/") for name in names):
        own_names = keras_numbers(layers)
        aliases = dict(zip(own_names, names, strict=True))
    for x, name in zip(layers, own_names, strict=True):
        here: dict[str, Tensor] = {}
        if x.kind in ("bn", "norm"):
            here[f"{before}{name}{cut}{gamma}"] = here[f"{before}{name}{cut}{beta}"] = _tensor(x.shape)
        else:
            shape = _AXES[dialect].get(x.kind, lambda s: s)(x.shape)
            here[f"{before}{name}{cut}{kernel}"] = _tensor(shape)
            if x.bias:
                out = x.shape[1] if x.kind == "conv transpose" else x.shape[0]
                here[f"{before}{name}{cut}{bias}"] = _tensor((out,))
        if x.kind == "bn":
            late = last if dialect == "equinox" else here
            for tensor, counts in _stats(dialect, name):
                late[tensor] = _tensor((), "int32") if counts else _tensor(x.shape)
        for tensor in (*here, *last):
            truth.setdefault(tensor, x.id)
        tensors |= here
    tensors |= last
    assert len(truth) == len(tensors)
    if not ordered and dialect != "keras":
        tensors = dict(sorted(tensors.items()))
    metadata = {"layer_names": aliases} if aliases else {}
    return Checkpoint(_FORMAT[dialect], tensors, order_is_meaningful=ordered, metadata=metadata), truth


def make(layers: list[L], convention: str, order: str = "definition") -> tuple[Checkpoint, Truth]:
    """A checkpoint of these layers, as this library names them."""
    how = CONVENTIONS[convention]
    placed = ORDERS[order](layers)
    return write(placed, how.names(placed), how.dialect, ordered=how.ordered)
