"""The registry: backends by name, by path, from a stranger's distribution, and without their framework."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnlayer
from bnlayer import BackendUnavailable, BatchNormSpec, BatchNormState, UnknownBackend, UnsupportedError, registry
from bnlayer.contract import Backend, Missing, Request, require

SPEC = BatchNormSpec(3)
FRAMEWORKS = {"torch": "torch", "tensorflow": "tensorflow", "jax": "jax", "keras": "keras"}


class Stranger:
    """A backend that no distribution registers."""

    name = "stranger"

    def version(self) -> str:
        return "7"

    def owns(self, layer: Any) -> bool:
        return isinstance(layer, dict) and "stranger" in layer

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        return None

    def build(self, spec: BatchNormSpec, state: Any = None, *, device: Any = None) -> dict[str, Any]:
        return {"stranger": spec, "state": state, "device": device}

    def extract(self, layer: dict[str, Any]) -> Any:
        return layer["stranger"], layer["state"]

    def load(self, layer: dict[str, Any], state: Any) -> dict[str, Any]:
        return {**layer, "state": state}

    def step(self, layer: Any, request: Request) -> Any:
        raise NotImplementedError


class StrangeNN(Stranger):
    """A framework's own layer."""

    name = "strange.nn"
    deviations = Path("strange.nn.txt")
    lacks: Mapping[str, str] = {}


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    """The stranger as an importable module `strange_package`, and registered, as a native layer too."""
    module = type(sys)("strange_package")
    module.BACKEND = Stranger()  # type: ignore[attr-defined]
    module.NATIVE = StrangeNN()  # type: ignore[attr-defined]
    module.Nested = type("Nested", (), {"backend": module.BACKEND})  # type: ignore[attr-defined]
    module.Stranger = Stranger  # type: ignore[attr-defined]
    module.NUMBER = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strange_package", module)
    strangers = {
        registry.BACKENDS: {
            "stranger": "strange_package:BACKEND",
            "absent": "no_such_package.backend:BACKEND",
            "half": "strange_package:MISSING",
        },
        registry.NATIVE: {"strange.nn": "strange_package:NATIVE", "bare.nn": "strange_package:BACKEND"},
    }
    real = importlib.metadata.entry_points

    def entry_points(*, group: str) -> list[EntryPoint]:
        added = strangers.get(group, {})
        return [*real(group=group), *(EntryPoint(name, value, group) for name, value in added.items())]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    registry._load.cache_clear()
    yield module.BACKEND
    registry._load.cache_clear()


def test_ours_are_known_in_the_order_of_every_table() -> None:
    ours = [name for name, entry in registry.known().items() if registry.is_ours(entry)]
    assert ours == ["numpy", "torch", "tensorflow", "jax", "keras"]


def test_strangers_come_after_ours_and_are_not_ours(stranger: Stranger) -> None:
    known = registry.known()
    assert list(known)[:5] == ["numpy", "torch", "tensorflow", "jax", "keras"]
    assert [name for name in known if name in ("absent", "half", "stranger")] == ["absent", "half", "stranger"]
    assert not registry.is_ours(known["stranger"])


def test_numpy_by_name() -> None:
    backend = bnlayer.backend("numpy")
    assert backend.name == "numpy"
    assert backend.version() == np.__version__
    assert bnlayer.backend("numpy") is backend


def test_an_unknown_name_lists_the_known_ones(stranger: Stranger) -> None:
    with pytest.raises(UnknownBackend) as refusal:
        bnlayer.backend("nmupy")
    message = str(refusal.value)
    assert "unknown backend 'nmupy'" in message
    for name in ("numpy", "torch", "tensorflow", "jax", "keras", "stranger", "strange.nn", "package.module:ATTRIBUTE"):
        assert name in message


def test_a_native_layer_without_deviations_is_none(stranger: Stranger) -> None:
    with pytest.raises(UnknownBackend, match="registered as a native layer, but lacks `deviations` or `lacks`"):
        bnlayer.backend("bare.nn")


@pytest.mark.parametrize("name", ["", "Torch", " torch", "torch\n"])
def test_names_are_exact(name: str) -> None:
    with pytest.raises(UnknownBackend, match="unknown backend"):
        bnlayer.backend(name)


def test_an_entry_point_of_a_stranger(stranger: Stranger) -> None:
    assert bnlayer.backend("stranger") is stranger
    assert bnlayer.backend("strange.nn").name == "strange.nn"
    layer = bnlayer.build(SPEC, "stranger", device="moon")
    assert layer == {"stranger": SPEC, "state": None, "device": "moon"}
    assert bnlayer.extract(layer) == (SPEC, None)
    assert bnlayer.load(layer, BatchNormState(num_updates=4))["state"].num_updates == 4


@pytest.mark.parametrize("path", ["strange_package:BACKEND", "strange_package:Nested.backend"])
def test_a_backend_that_nobody_registered(stranger: Stranger, path: str) -> None:
    assert bnlayer.backend(path) is stranger
    assert bnlayer.build(SPEC, path)["stranger"] == SPEC


def test_a_backend_object_in_place_of_a_name() -> None:
    assert bnlayer.build(SPEC, Stranger())["stranger"] == SPEC
    assert isinstance(Stranger(), Backend)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package:BACKEND", "no backend at 'no_such_package:BACKEND': No module named 'no_such_package'"),
        ("strange_package:OTHER", "no backend at .* has no attribute 'OTHER'"),
        ("strange_package:Nested.other", "no backend at .* has no attribute 'other'"),
        ("strange_package:", "no backend at"),
        (":BACKEND", "no backend at"),
        (".relative:BACKEND", "no backend at"),
        (":", "no backend at"),
        (
            "strange_package:NUMBER",
            "is not a backend; it lacks name, version, owns, unsupported, build, extract, load, step",
        ),
        ("strange_package:Stranger", "is a class; name an object of it, such as strange_package:BACKEND"),
    ],
)
def test_a_path_that_leads_nowhere(stranger: Stranger, path: str, message: str) -> None:
    with pytest.raises(UnknownBackend, match=message):
        bnlayer.backend(path)


@pytest.mark.parametrize("name", ["absent", "half"])
def test_an_entry_point_that_cannot_be_imported(stranger: Stranger, name: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"backend '{name}' \(.*\) cannot be imported"):
        bnlayer.backend(name)


def test_the_owner_of_a_layer_is_found_past_a_broken_backend(stranger: Stranger) -> None:
    assert registry.owner({"stranger": SPEC}) is stranger
    assert registry.owner(bnlayer.build(SPEC, "numpy")).name == "numpy"


@pytest.mark.parametrize("layer", [None, 3, object(), np.ones(3)])
def test_a_layer_that_nobody_owns(layer: Any) -> None:
    with pytest.raises(UnknownBackend, match=rf"no backend owns a .*{type(layer).__name__}; known: numpy, torch"):
        bnlayer.extract(layer)
    with pytest.raises(UnknownBackend, match="no backend owns"):
        bnlayer.load(layer, BatchNormState())


def test_build_extract_load_on_numpy() -> None:
    state = BatchNormState.initial(SPEC).replace(moving_mean=np.array([1, 2, 3], np.float32), num_updates=9)
    layer = bnlayer.build(SPEC, "numpy", state)
    spec, out = bnlayer.extract(layer)
    assert spec == SPEC
    assert out.moving_mean is not None
    assert out.moving_mean.tolist() == [1, 2, 3]
    assert out.num_updates == 9
    assert bnlayer.load(layer, BatchNormState.initial(SPEC)) is layer
    assert bnlayer.extract(layer)[1].num_updates == 0


# Frameworks that are not there

# Runs first in the child: no finder finds the named modules, as if they were not installed.
BLOCKER = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def without(frameworks: set[str], code: str, folder: Path) -> str:
    """What this code prints in a process where these frameworks are absent."""
    child = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=frameworks) + code],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("use", ["backend.version()", "backend.build(bnlayer.BatchNormSpec(3))"])
def test_without_its_framework_a_backend_names_the_install_command(name: str, use: str, tmp_path: Path) -> None:
    code = f"""
import bnlayer
backend = bnlayer.backend({name!r})
assert backend.name == {name!r}
assert backend.unsupported(bnlayer.BatchNormSpec(3)) is None
assert not backend.owns(object())
try:
    {use}
except bnlayer.BackendUnavailable as error:
    print(error)
"""
    printed = without({FRAMEWORKS[name]}, code, tmp_path)
    assert "not installed" in printed
    assert f"pip install 'bnlayer[{name}]'" in printed


def test_without_any_framework_numpy_works_and_owners_are_found(tmp_path: Path) -> None:
    code = """
import bnlayer
layer = bnlayer.build(bnlayer.BatchNormSpec(3), "numpy")
print(bnlayer.extract(layer)[0].num_features)
"""
    assert without(set(FRAMEWORKS.values()), code, tmp_path) == "3\n"


def test_require_tells_absent_from_incomplete_from_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "incomplete_framework.py").write_text("import its_missing_dependency\n")
    (tmp_path / "broken_framework.py").write_text("raise OSError('libframework.so: cannot open')\n")
    (tmp_path / "whole_framework.py").write_text("__version__ = '1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert require("whole_framework", "whole").__version__ == "1"
    for module, message in (
        ("absent_framework", "absent_framework is not installed"),
        ("absent_framework.part", "absent_framework.part is not installed"),
        ("incomplete_framework", "incomplete_framework is installed, but lacks its_missing_dependency"),
        ("broken_framework", r"broken_framework fails to import \(OSError: libframework.so: cannot open\)"),
    ):
        with pytest.raises(BackendUnavailable, match=message + r"\. Run: pip install 'bnlayer\[extra\]'"):
            require(module, "extra")


# What a backend lacks, by name


def test_missing_names_the_first_thing_that_is_asked_for() -> None:
    missing = Missing(fields={"synchronized": "one device"}, dtypes={"bfloat16": "no such type"}, adjustment="not yet")
    assert missing.reason(SPEC) is None
    assert missing.reason(SPEC.replace(synchronized=True)) == "synchronized: one device"
    assert missing.reason(SPEC.replace(param_dtype="bfloat16")) == "bfloat16: no such type"
    assert missing.reason(SPEC.replace(stats_dtype="bfloat16")) == "bfloat16: no such type"
    missing.refuse("name", SPEC)
    with pytest.raises(UnsupportedError, match="backend 'name' does not support synchronized: one device"):
        missing.refuse("name", SPEC.replace(synchronized=True))


def test_missing_looks_at_every_call_of_a_request() -> None:
    import ml_dtypes

    from bnlayer.contract import Call

    missing = Missing(dtypes={"bfloat16": "no such type"}, adjustment="not yet")
    plain, adjusted = Call(np.ones((4, 3))), Call(np.ones((4, 3)), adjustment=(np.ones(3), np.zeros(3)))
    half = Call(np.ones((4, 3), ml_dtypes.bfloat16))
    assert missing.reason(SPEC, Request((plain, plain), training=True)) is None
    assert missing.reason(SPEC, Request((plain, half), training=True)) == "bfloat16: no such type"
    assert missing.reason(SPEC, Request((plain, adjusted), training=True)) == "adjustment: not yet"
