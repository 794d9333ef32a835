"""Real models, ported from files between frameworks: no layer goes astray, and what arrives computes what left.

Each pair is a model as its framework's users have it and transformers' torch model of the same architecture, both with
random weights and moving statistics. Files are the frameworks' own; the template is a live model with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from bnlayer import checkpoint
from bnlayer.checkpoint import Checkpoint
from bnlayer.porting import Plan, load_into, plan, read
from bnlayer.porting.models import filled
from bnlayer.porting.sidecars import write_sidecar
from bnlayer.registry import adapter

from . import by_hand, truth
from .by_hand import Layers
from .truth import Pair

WIDTH = 16  # of ResNet-18: as deep as the real one, and thin
SIZE = 65
SORTED = ".sorted.msgpack"
SORTING = (SORTED, ".safetensors")  # files that do not keep the model's order
TELLING = (".keras", ".eqx")  # epsilon and decay; the latter by way of a live model
ROUNDING = 2.0**-23
CARRIED = ("gamma", "beta", "moving_mean", "moving_variance")

Options = Mapping[str, Any]


@dataclass
class Side:
    """A model of one framework, and how its files are made.

    Attributes:
        build: a seed to a model with weights of that seed.
        suffix: of the files that a port into this model is saved to.
        write: by suffix, what writes a model into a file.
        untold: what these files do not tell, as a user would say it (`source_options`).
        layers: reads a model by hand.
        correction: whether its moving variances are estimates of the population's.
    """

    build: Callable[[int], Any]
    suffix: str
    write: Mapping[str, Callable[[Any, Path], object]]
    untold: Options
    layers: Callable[[Any], Layers]
    correction: bool = False
    _models: dict[int, Any] = field(default_factory=dict)

    def model(self, seed: int) -> Any:
        """Shared: it must be left as it is."""
        if seed not in self._models:
            self._models[seed] = self.build(seed)
        return self._models[seed]

    def file(self, suffix: str, folder: Path) -> Path:
        """The model of seed 0 in a file."""
        path = folder / f"source{suffix}"
        if not path.exists():
            self.write[suffix](self.model(0), path)
        return path

    def opened(self, path: Path) -> Checkpoint:
        """A file; of Equinox's, which has no names, with those of a live model."""
        return checkpoint.open(path, template=read(self.model(1)) if path.suffix == ".eqx" else None)

    def options(self, path: Path) -> Options:
        """What a user would say of a file of this model."""
        return {} if path.name.endswith(TELLING) else self.untold


@dataclass
class Port:
    """One direction of a pair, from the source model's file into the target's."""

    source: Side
    target: Side
    truth: list[Pair]  # this direction's
    folder: Path

    def planned(self, suffix: str, *, live: bool = False, **options: Any) -> Plan:
        """From the source's file of this suffix into a live model; `live`: by way of a live model of the source too."""
        path = self.source.file(suffix, self.folder)
        told = {"source_options": self.source.options(path), **options}
        given = self.source.opened(path)
        if live:
            _, given = filled(self.source.build(1), given, told.pop("source_options"))
        return plan(given, read(self.target.model(1)), **told)

    @cached_property
    def plan(self) -> Plan:
        """From the source's first file, applied."""
        made = self.planned(next(iter(self.source.write)))
        made.apply().save(self.path)
        write_sidecar(self.path, made.specs())
        return made

    @property
    def path(self) -> Path:
        """Of the port."""
        return self.folder / f"port{self.target.suffix}"

    @cached_property
    def loaded(self) -> Any:
        """A model that had other weights, with the port in it."""
        assert not self.plan.refused, self.plan.report
        return load_into(self.target.model(1), self.path)


@dataclass
class Both:
    """A pair, in both directions."""

    there: Port
    back: Port

    def __getitem__(self, direction: str) -> Port:
        return self.there if direction == "there" else self.back


def reversed_truth(pairs: list[Pair]) -> list[Pair]:
    return [Pair(pair.kind, pair.target, pair.source) for pair in pairs]


def both(source: Side, target: Side, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Both:
    folders = [tmp_path_factory.mktemp(name) for name in ("there", "back")]
    return Both(Port(source, target, pairs, folders[0]), Port(target, source, reversed_truth(pairs), folders[1]))


def sorted_safetensors(model: Any, path: Path) -> None:
    """As safetensors' own writer has them: by dtype and name."""
    numpy_io = pytest.importorskip("safetensors.numpy")
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    numpy_io.save_file({name: tensors[name] for name in sorted(tensors)}, path)


def torch_side(build: Callable[[int], Any], **untold: float) -> Side:
    return Side(
        build, ".pt",
        {".pt": lambda model, path: torch.save(model.state_dict(), path), ".safetensors": sorted_safetensors},
        untold, by_hand.of_torch, correction=True,
    )  # fmt: skip


def torch_resnet18(seed: int) -> Any:
    from .models import torch_models

    return torch_models.resnet18(WIDTH, seed=seed)


def keras_side(build: Callable[[int], Any], **untold: float) -> Side:
    return Side(
        build, ".weights.h5",
        {".weights.h5": lambda model, path: model.save_weights(path), ".keras": lambda model, path: model.save(path)},
        untold, by_hand.of_keras,
    )  # fmt: skip


def keras_resnet50(made: pytest.TempPathFactory) -> Both:
    pytest.importorskip("keras")
    from .models import keras_models, torch_models

    source = keras_side(lambda seed: keras_models.resnet50(SIZE, seed=seed), epsilon=1.001e-5, decay=0.99)
    target = torch_side(lambda seed: torch_models.resnet50(seed=seed), epsilon=1e-5, decay=0.9)
    return both(source, target, truth.keras_resnet50(), made)


def keras_mobilenet_v2(made: pytest.TempPathFactory) -> Both:
    pytest.importorskip("keras")
    from .models import keras_models

    source = keras_side(lambda seed: keras_models.mobilenet_v2(SIZE, seed=seed), epsilon=1e-3, decay=0.999)
    return both(source, torch_mobilenet_v2(), truth.keras_mobilenet_v2(), made)


def torch_mobilenet_v2() -> Side:
    from .models import torch_models

    # transformers gives torch TensorFlow's momentum, which means the opposite there.
    return torch_side(lambda seed: torch_models.mobilenet_v2(seed=seed), epsilon=1e-3, decay=1 - 0.997)


def nnx_resnet18(made: pytest.TempPathFactory) -> Both:
    nnx = pytest.importorskip("flax.nnx")
    serialization = pytest.importorskip("flax.serialization")
    from .models import nnx_models

    def write_sorted(model: Any, path: Path) -> None:
        path.write_bytes(serialization.to_bytes(nnx.to_pure_dict(nnx.state(model))))

    source = Side(
        lambda seed: nnx_models.resnet18(WIDTH, seed=seed), ".msgpack",
        {".msgpack": lambda model, path: read(model).save(path), SORTED: write_sorted},
        {"epsilon": 1e-5, "decay": 0.9}, by_hand.of_nnx,
    )  # fmt: skip
    return both(source, torch_side(torch_resnet18, epsilon=1e-5, decay=0.9), truth.nnx_resnet18(), made)


def linen_resnet18(made: pytest.TempPathFactory) -> Both:
    serialization = pytest.importorskip("flax.serialization")
    from .models import linen_models

    source = Side(
        lambda seed: linen_models.resnet18(WIDTH, seed=seed), ".msgpack",
        {".msgpack": lambda model, path: path.write_bytes(serialization.to_bytes(model[1]))},
        {"epsilon": 1e-5, "decay": 0.9}, lambda model: by_hand.of_linen(model[1], 1e-5),
    )  # fmt: skip
    return both(source, torch_side(torch_resnet18, epsilon=1e-5, decay=0.9), truth.linen_resnet18(), made)


def equinox_resnet18(made: pytest.TempPathFactory) -> Both:
    equinox = pytest.importorskip("equinox")
    from .models import equinox_models, randomize

    source = Side(
        lambda seed: equinox_models.resnet18(WIDTH, seed=seed, updates=randomize.SETTLED), ".eqx",
        {".eqx": lambda model, path: equinox.tree_serialise_leaves(path, model)}, {},
        lambda model: by_hand.of_equinox(*model),
    )  # fmt: skip
    return both(source, torch_side(torch_resnet18, epsilon=1e-5, decay=0.9), truth.equinox_resnet18(), made)


PAIRS = [keras_resnet50, keras_mobilenet_v2, nnx_resnet18, linen_resnet18, equinox_resnet18]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda made: made.__name__)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """One after the other, so that the models of one are in memory at a time."""
    return request.param(tmp_path_factory)


@pytest.fixture(params=["there", "back"])
def port(request: pytest.FixtureRequest, pair: Both) -> Port:
    return pair.there if request.param == "there" else pair.back


def dotted(name: str) -> str:
    """NNX's files have slashes where its objects have dots."""
    return name.replace("/", ".")


def images(seed: int, batch: int) -> np.ndarray:
    """Of different brightness, or noise would look like noise to the last layers."""
    noise = np.random.default_rng(seed).normal(size=(batch, SIZE, SIZE, 3))
    return (noise + np.linspace(-1, 1, batch).reshape(batch, 1, 1, 1)).astype(np.float32)


def evaluated(model: Any) -> np.ndarray:
    return np.asarray(adapter(model).run(model, images(5, 2), training=False).output)


def test_every_pair_of_layers_is_the_true_one(port: Port) -> None:
    true = {(dotted(p.source), dotted(p.target)) for p in port.truth}
    for suffix in port.source.write:
        made = port.planned(suffix)
        found = [(dotted(m.source), dotted(m.target)) for m in made.matching.matches]
        assert len(set(found)) == len(found)
        assert set(found) <= true, suffix
        if suffix in SORTING and made.refused:  # what names alone do not tell is not guessed; a live source tells it
            print(f"{suffix}: {len(found)} of {len(true)}")
            made = port.planned(suffix, live=True)
            found = [(dotted(m.source), dotted(m.target)) for m in made.matching.matches]
        assert not made.refused, f"{suffix}: {made.report}"
        assert set(found) == true, suffix
        assert all(m.votes for m in made.matching.matches)
        assert not any("default" in what for what in made.report.notes["assumed"]), made.report


def test_what_a_file_does_not_tell_is_assumed_and_said(port: Port) -> None:
    norms = {dotted(p.target) for p in port.truth if p.kind == "batch norm"}
    for suffix in set(port.source.write) - set(SORTING):
        assumed = port.planned(suffix, source_options={}).report.notes["assumed"]
        said = {what.split()[0]: {dotted(n) for n in names} for what, names in assumed.items() if "default" in what}
        assert said == ({} if suffix in TELLING else {"epsilon": norms, "decay": norms}), suffix


def test_a_port_evaluates_as_its_source_does(port: Port) -> None:
    expected = evaluated(port.source.model(0))
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()  # the images reach the outputs
    error = by_hand.relative_error(evaluated(port.loaded), expected)
    print(f"eval: {error:.1e}")
    assert error < 1e-5


def test_a_port_trains_as_its_source_does(port: Port) -> None:
    """Moving statistics after three steps; of the convolutions' biases, the means' share is taken off on both sides."""
    own, ported = Trained(port.source, port.source.model(0)), Trained(port.target, port.loaded)
    for step in range(3):
        x = images(10 + step, 4)
        own.step(x)
        ported.step(x)
    torch_one = own if port.source.correction else ported
    mine, theirs = own.finished(), ported.finished()
    assert own.decay == pytest.approx(ported.decay, abs=1e-9)
    kept = own.decay**3
    worst = [0.0, 0.0]
    norms = [(conv, norm) for conv, norm in pairwise(port.truth) if norm.kind == "batch norm"]
    for conv, norm in norms:
        n, deviation = torch_one.moments[norm.source if torch_one is own else norm.target]
        one, other = mine(conv.source, norm.source), theirs(conv.target, norm.target)
        assert np.abs(one[1].mean - kept * one[0].mean).max() > 1e-3 * (1 - kept) * deviation  # it has moved
        worst[0] = max(worst[0], np.abs(one[1].mean - other[1].mean).max() / deviation)
        grown = [
            (now.variance - kept * was.variance) * ((n - 1) / n if side.correction else 1)
            for (was, now), side in ((one, port.source), (other, port.target))
        ]
        worst[1] = max(worst[1], np.abs(grown[0] - grown[1]).max() / deviation**2)
    print(f"{len(norms)} layers: means {worst[0]:.1e}, variances {worst[1]:.1e}")
    assert worst[0] < 1e-5
    assert worst[1] < 2e-5  # a square has twice the error


class Statistics(NamedTuple):
    """Of a batch norm, float64; of the mean, the bias of the layer before is taken off."""

    mean: np.ndarray
    variance: np.ndarray


class Trained:
    """A model in training; it is as it was once `finished`."""

    def __init__(self, side: Side, model: Any) -> None:
        self.side, self.model, self.reach = side, model, adapter(model)
        own = read(model)
        self.own = own.replace({name: own[name].copy() for name in own})
        self.before = copied(side.layers(model))
        self.moments: dict[str, tuple[int, float]] = {}  # values of a channel, and the largest deviation of one
        (self.decay,) = {record.spec.decay for record in self.reach.batch_norms(model)}

    def step(self, x: np.ndarray) -> None:
        done = self.reach.run(self.model, x, training=True, capture=self.side.correction)
        self.model = done.model
        for name, (into, _) in done.layers.items():
            deviation = float(into.astype(np.float64).std(axis=(0, 2, 3)).max())
            self.moments[name] = (into.size // into.shape[1], max(deviation, self.moments.get(name, (0, 0.0))[1]))

    def finished(self) -> Callable[[str, str], tuple[Statistics, Statistics]]:
        """Of a convolution and its batch norm, the statistics before and after."""
        after = copied(self.side.layers(self.model))
        self.reach.write(self.model, self.own)

        def of(layers: Layers, conv: str, norm: str) -> Statistics:
            bias = layers[conv].get("bias", 0)
            return Statistics(layers[norm]["mean"] - bias, layers[norm]["variance"])

        return lambda conv, norm: (of(self.before, conv, norm), of(after, conv, norm))


def copied(layers: Layers) -> Layers:
    """Biases and statistics, float64, which no training moves."""
    words = ("bias", "mean", "variance")
    return {n: {w: np.array(a, np.float64) for w, a in layer.items() if w in words} for n, layer in layers.items()}


def test_the_way_back(port: Port) -> None:
    """Batch norms come back bit by bit; where a convolution's bias went into the mean, within one rounding of it."""
    there = port.plan
    spec = next(iter(there.specs().values()))
    back = plan(
        port.target.opened(port.path), read(port.source.model(1)),
        source_options={"epsilon": spec.epsilon, "decay": spec.decay},
    )  # fmt: skip
    assert not back.refused, back.report
    held, tensors = there.source.checkpoint, back.apply()
    units = {dotted(u.name): u for u in there.source.units}
    again = {dotted(u.name): u for u in back.target.units}
    converted = {dotted(n) for names in there.report.notes["converted"].values() for n in names}
    exact = rounded = 0
    norms = [(conv, norm) for conv, norm in pairwise(port.truth) if norm.kind == "batch norm"]
    for conv, norm in norms:
        unit = units[dotted(norm.source)]
        for role in CARRIED:
            was, now = held[unit.parts[role]], tensors[again[dotted(norm.source)].parts[role]]
            if was.tobytes() == now.tobytes():
                exact += 1
                continue
            assert role == "moving_mean", f"{norm.source}: {role}"
            assert dotted(norm.target) in converted
            bias = held[units[dotted(conv.source)].parts["bias"]].astype(np.float64)
            assert not tensors[again[dotted(conv.source)].parts["bias"]].any()
            assert (np.abs(now - (was - bias)) <= ROUNDING * np.maximum(np.abs(was), np.abs(bias))).all()
            rounded += 1
    print(f"{exact} tensors exact, {rounded} within one rounding")
    biased = sum("bias" in units[dotted(conv.source)].parts for conv, _ in norms)
    assert rounded == biased
    assert exact == len(CARRIED) * len(norms) - rounded


def test_equinoxs_young_averages_are_a_loss_in_training_alone(tmp_path: Path) -> None:
    equinox = pytest.importorskip("equinox")
    from .models import equinox_models, randomize

    reports = {}
    for updates in (randomize.UPDATES, randomize.SETTLED):
        model = equinox_models.resnet18(WIDTH, updates=updates)
        path = tmp_path / f"{updates}.eqx"
        equinox.tree_serialise_leaves(path, model)
        made = plan(checkpoint.open(path, template=read(model)), read(torch_resnet18(1)))
        made.apply().save(tmp_path / f"{updates}.pt")
        write_sidecar(tmp_path / f"{updates}.pt", made.specs())
        ported = load_into(torch_resnet18(2), tmp_path / f"{updates}.pt")
        assert by_hand.relative_error(evaluated(ported), evaluated(model)) < 1e-5
        reports[updates] = made.report
    norms = sum(p.kind == "batch norm" for p in truth.equinox_resnet18())
    ((what, names),) = reports[randomize.UPDATES].notes["lossy"].items()
    assert "zero-debiased" in what
    assert len(names) == norms
    assert not reports[randomize.SETTLED].notes["lossy"]


# TensorFlow 1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .models import tf1_mobilenet

    return tf1_mobilenet.write(tmp_path_factory.mktemp("tf1") / "mobilenet.ckpt", seed=3)


TOLD = {"epsilon": 1e-3, "decay": 0.997}


@pytest.mark.parametrize("ema", ["raw", "ema"])
def test_a_checkpoint_of_tensorflow_1(bundle: Path, tmp_path: Path, ema: str) -> None:
    pytest.importorskip("keras")
    from .models import keras_models, tf1_mobilenet

    side = torch_mobilenet_v2()
    template = read(side.model(1))
    made = plan(checkpoint.open(bundle), template, source_options={**TOLD, "ema": ema})
    assert not made.refused, made.report
    assert {(m.source, m.target) for m in made.matching.matches} == {
        (p.source, p.target) for p in truth.tf1_mobilenet_v2()
    }
    made.apply().save(tmp_path / "port.pt")
    write_sidecar(tmp_path / "port.pt", made.specs())
    target = load_into(side.build(2), tmp_path / "port.pt")

    values = tf1_mobilenet.variables(seed=3)
    if ema == "ema":
        twins = tf1_mobilenet.variables(seed=4)
        values = {name: values[name] if "moving_" in name else twins[name] for name in values}
    source = tf1_mobilenet.into_keras(keras_models.mobilenet_v2(SIZE, seed=5), values)
    error = by_hand.relative_error(evaluated(target), evaluated(source))
    print(f"{ema}: {error:.1e}")
    assert error < 1e-5

    reach = adapter(source)
    specs = {record.name: record.spec.replace(decay=TOLD["decay"]) for record in reach.batch_norms(source)}
    own, ported = Trained(keras_side(lambda _: source), reach.configure(source, specs)), Trained(side, target)
    for step in range(3):
        x = images(10 + step, 4)
        own.step(x)
        ported.step(x)
    mine, theirs = own.finished(), ported.finished()
    for conv, norm in pairwise(zip(truth.keras_mobilenet_v2(), truth.tf1_mobilenet_v2(), strict=True)):
        assert norm[0].target == norm[1].target
        if norm[0].kind != "batch norm":
            continue
        n, deviation = ported.moments[norm[0].target]
        first, one = mine(conv[0].source, norm[0].source)
        _, other = theirs(conv[0].target, norm[0].target)
        assert np.abs(one.mean - other.mean).max() < 1e-5 * deviation
        start = TOLD["decay"] ** 3 * first.variance
        grown = (one.variance - start) * n / (n - 1)
        assert np.abs(grown - (other.variance - start)).max() < 1e-5 * deviation**2


def test_back_to_tensorflow_1(bundle: Path, tmp_path: Path) -> None:
    """From torch into a file like the one that there is, and back again."""
    from .models import tf1_mobilenet

    side = torch_mobilenet_v2()
    template = checkpoint.open(bundle)
    source = checkpoint.open(side.file(".pt", tmp_path))
    made = plan(source, template, source_options=side.untold)
    assert not made.refused, made.report
    assert {(m.target, m.source) for m in made.matching.matches} == {
        (p.source, p.target) for p in truth.tf1_mobilenet_v2()
    }
    made.apply().save(tmp_path / "back.ckpt", "tensorflow")
    again = plan(checkpoint.open(tmp_path / "back.ckpt"), read(side.model(1)), source_options=side.untold)
    assert not again.refused, again.report
    tensors = again.apply()
    for name in source:
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(tensors[name], source[name], err_msg=name)
    written = checkpoint.open(tmp_path / "back.ckpt")
    hand = by_hand.of_tf1({name: written[name] for name in tf1_mobilenet.variables()}, epsilon=1e-3)
    own = by_hand.of_torch(side.model(0))
    for pair_ in truth.tf1_mobilenet_v2():
        for word, value in hand[pair_.source].items():
            np.testing.assert_array_equal(value, own[pair_.target][word], err_msg=f"{pair_.source} {word}")
