"""Who may import whom: read from every file's imports, and proven in a process that imports everything light.

The core and each backend's door must be importable where no framework is; a backend knows its own framework and no
other backend; the conformance suite knows no backend, and its runner needs neither pytest, mpmath nor jsonschema.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "bnlayer": ROOT / "bnlayer",
    **{name: ROOT / "backends" / name for name in (
        "bnlayer_numpy", "bnlayer_torch", "bnlayer_tensorflow", "bnlayer_jax", "bnlayer_keras")},
    "bnlayer_conformance": ROOT / "conformance" / "bnlayer_conformance",
}  # fmt: skip

NUMBERS = {"numpy", "ml_dtypes"}
TERMINAL = {"click", "rich"}
MAY_IMPORT = {
    "bnlayer": NUMBERS | TERMINAL,
    "bnlayer_numpy": NUMBERS | {"bnlayer"},
    "bnlayer_torch": NUMBERS | {"bnlayer", "torch"},
    "bnlayer_tensorflow": NUMBERS | {"bnlayer", "tensorflow"},
    "bnlayer_jax": NUMBERS | {"bnlayer", "jax", "flax", "equinox", "haiku"},
    # Keras runs on one of three frameworks, and its layer calls the function of that one's backend.
    "bnlayer_keras": NUMBERS | {"bnlayer", "keras"} | {
        name for framework in ("torch", "tensorflow", "jax") for name in (framework, f"bnlayer_{framework}")},
    "bnlayer_conformance": NUMBERS | TERMINAL | {"bnlayer"},
}  # fmt: skip
# What only some files of a package need, by the file's path inside it.
MAY_ALSO_IMPORT = {
    # A format's own library, which its module alone brings when a file of that format is opened or written.
    "bnlayer": [
        ("checkpoint/flax_msgpack.py", {"msgpack"}),
        ("checkpoint/hdf5.py", {"h5py"}),
        ("checkpoint/keras_h5.py", {"h5py"}),
        ("checkpoint/onnx_model.py", {"onnx", "google"}),
        ("checkpoint/orbax.py", {"tensorstore"}),
    ],
    "bnlayer_numpy": [("native_onnxruntime.py", {"onnx", "onnxruntime"})],
    "bnlayer_conformance": [
        ("plugin.py", {"pytest"}),
        ("test_*.py", {"pytest"}),
        ("oracle.py", {"mpmath"}),
        ("authoring/*", {"mpmath", "jsonschema"}),
    ],
}
# Of another backend, only its function: as an attribute of the package or from its module.
ANOTHERS = {"", "function"}

HEAVY = {
    "torch", "tensorflow", "tf_keras", "keras", "jax", "jaxlib", "flax", "equinox", "haiku", "optax", "onnx",
    "onnxruntime", "scipy",
}  # fmt: skip
FOR_FILES = {"h5py", "msgpack", "onnx", "tensorstore", "google.protobuf"}  # onnx is a conformance target as well
FOR_AUTHORS = {"pytest", "_pytest", "mpmath", "jsonschema", "hypothesis"}


# What the files say


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports: by statement, by `import_module`, or named to `require`.

    A string that is the name of one of our packages counts as well: nobody writes one but to import it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            named = str(first.value) if isinstance(first, ast.Constant) else "."
            # One dot stays inside the package.
            if name in ("import_module", "__import__", "require") and not re.match(r"\.(\w|$)", named):
                yield node.lineno, named
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] in PACKAGES:
            yield node.lineno, node.value


def escapes(tree: ast.AST, depth: int) -> Iterator[int]:
    """Lines of relative imports that leave the package of a file `depth` folders inside it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > depth + 1:
            yield node.lineno


def violations(package: str, folder: Path) -> list[str]:
    """Each import in a package's files that the design forbids, as `path:line imports what`."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        allowed = MAY_IMPORT[package] | {package} | set(sys.stdlib_module_names)
        for pattern, more in MAY_ALSO_IMPORT.get(package, []):
            if fnmatch(inside.as_posix(), pattern):
                allowed |= more
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found += [f"{package}/{inside}:{line} leaves the package" for line in escapes(tree, len(inside.parts) - 1)]
        for line, name in imported(tree):
            top, *rest = name.removesuffix(".batch_norm").split(".")
            foreign = top.startswith("bnlayer_") and top != package and top in allowed
            if top not in allowed or (foreign and ".".join(rest) not in ANOTHERS):
                found.append(f"{package}/{inside}:{line} imports {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_keep_the_directions(package: str) -> None:
    assert violations(package, PACKAGES[package]) == []


def test_every_package_of_the_repository_is_checked() -> None:
    roots = (ROOT, ROOT / "backends", ROOT / "conformance")
    assert {p.parent.name for root in roots for p in root.glob("bnlayer*/__init__.py")} == set(PACKAGES)


@pytest.mark.parametrize(
    ("package", "file", "code", "said"),
    [
        ("bnlayer", "spec.py", "import torch", "imports torch"),
        ("bnlayer", "spec.py", "import numpy, torch.nn", "imports torch.nn"),
        ("bnlayer", "spec.py", "def f():\n    from jax import numpy", "imports jax.numpy"),
        ("bnlayer", "commands/x.py", "if TYPE_CHECKING:\n    import keras", "imports keras"),
        ("bnlayer", "spec.py", "import bnlayer_numpy", "imports bnlayer_numpy"),
        ("bnlayer", "spec.py", "import bnlayer_conformance.runner", "imports bnlayer_conformance.runner"),
        ("bnlayer", "spec.py", "import importlib\nimportlib.import_module('scipy')", "imports scipy"),
        ("bnlayer", "checkpoint/npz.py", "import h5py", "imports h5py"),
        ("bnlayer", "checkpoint/onnx_model.py", "import onnxruntime", "imports onnxruntime"),
        ("bnlayer", "checkpoint/orbax.py", "from orbax import checkpoint", "imports orbax.checkpoint"),
        ("bnlayer", "spec.py", "from ..backends import x", "leaves the package"),
        ("bnlayer", "commands/x.py", "from ...y import x", "leaves the package"),
        ("bnlayer_torch", "function.py", "from bnlayer_jax import batch_norm", "imports bnlayer_jax.batch_norm"),
        ("bnlayer_torch", "function.py", "import tensorflow", "imports tensorflow"),
        ("bnlayer_torch", "backend.py", "require('keras', 'keras')", "imports keras"),
        ("bnlayer_torch", "backend.py", "HOME = 'bnlayer_numpy.function'", "imports bnlayer_numpy.function"),
        ("bnlayer_jax", "function.py", "from bnlayer_conformance import oracle", "imports bnlayer_conformance.oracle"),
        ("bnlayer_keras", "layer.py", "from bnlayer_torch.weights import x", "imports bnlayer_torch.weights.x"),
        ("bnlayer_keras", "layer.py", "import bnlayer_numpy", "imports bnlayer_numpy"),
        ("bnlayer_conformance", "runner.py", "from bnlayer_jax import state", "imports bnlayer_jax.state"),
        ("bnlayer_conformance", "runner.py", "import torch", "imports torch"),
        ("bnlayer_conformance", "runner.py", "import pytest", "imports pytest"),
        ("bnlayer_conformance", "runner.py", "def f():\n    import mpmath", "imports mpmath"),
        ("bnlayer_conformance", "compare.py", "import jsonschema", "imports jsonschema"),
        ("bnlayer_conformance", "plugin.py", "import mpmath", "imports mpmath"),
        ("bnlayer_conformance", "authoring/cases/x.py", "import pytest", "imports pytest"),
    ],
)
def test_a_planted_violation_is_found(package: str, file: str, code: str, said: str, tmp_path: Path) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(code)
    line = code.count("\n") + 1
    assert violations(package, tmp_path) == [f"{package}/{file}:{line} {said}"]


@pytest.mark.parametrize(
    ("package", "file", "code"),
    [
        ("bnlayer", "spec.py", "from __future__ import annotations\nimport json\nfrom .errors import y"),
        ("bnlayer", "commands/x.py", "from ..errors import y\nimport click\nfrom rich.table import Table"),
        ("bnlayer", "checkpoint/onnx_model.py", "import onnx\nfrom google.protobuf.message import DecodeError"),
        ("bnlayer_torch", "function.py", "import torch.nn.functional as F\nfrom bnlayer.spec import BatchNormSpec"),
        ("bnlayer_keras", "layer.py", "from bnlayer_jax import batch_norm\nimport bnlayer_torch.function"),
        ("bnlayer_keras", "layer.py", "HOMES = {'jax': 'bnlayer_jax'}\nimport tensorflow"),
        ("bnlayer_conformance", "test_vectors.py", "import pytest"),
        ("bnlayer_conformance", "authoring/cases/x.py", "import mpmath, jsonschema"),
        ("bnlayer_conformance", "oracle.py", "from mpmath import mpf"),
    ],
)
def test_what_the_design_allows_is_not_found(package: str, file: str, code: str, tmp_path: Path) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(code)
    assert violations(package, tmp_path) == []


# What really gets imported

IMPORT_AND_LOOK = """
import importlib, json, sys
modules, forbidden = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
    heavy = sorted(sys.modules.keys() & set(forbidden))
    if heavy:
        sys.exit(print(module, "imports", *heavy))
"""


def brought_in(modules: Iterable[str], forbidden: set[str], *, folder: Path) -> str:
    """Which of these modules, imported in turn in a fresh process, first brings in a forbidden one; "" if none does."""
    child = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_LOOK, json.dumps([list(modules), sorted(forbidden)])],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def modules_of(package: str) -> list[str]:
    """Every importable module of a package, by its files; `__main__` would run."""
    folder = PACKAGES[package]
    names = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join((package, *(part for part in parts if part != "__init__"))))
    return names


def runner_modules() -> list[str]:
    """The modules of the suite that a user of `bnlayer conform` needs: all but the authors' and pytest's."""
    others = ("oracle", "authoring", "plugin")
    names = (name.split(".")[1:2] for name in modules_of("bnlayer_conformance"))
    return [
        module
        for module, first in zip(modules_of("bnlayer_conformance"), names, strict=True)
        if not first or (first[0] not in others and not first[0].startswith("test_"))
    ]


def test_importing_bnlayer_imports_no_framework(tmp_path: Path) -> None:
    assert brought_in(["bnlayer"], HEAVY | FOR_FILES | FOR_AUTHORS, folder=tmp_path) == ""


def test_no_module_of_the_core_imports_a_framework(tmp_path: Path) -> None:
    modules = modules_of("bnlayer")
    formats = [f"bnlayer.{file.removesuffix('.py').replace('/', '.')}" for file, _ in MAY_ALSO_IMPORT["bnlayer"]]
    parts = {"bnlayer", "bnlayer.spec", "bnlayer.registry", "bnlayer.checkpoint", "bnlayer.porting", "bnlayer.surgery"}
    assert {*parts, *formats} <= set(modules)
    through = {"bnlayer.checkpoint.keras_archive"}  # it reads the HDF5 file that it has inside
    others = [module for module in modules if module not in {*formats, *through}]
    assert brought_in(others, HEAVY | FOR_FILES | FOR_AUTHORS, folder=tmp_path) == ""


def test_no_format_imports_a_framework(tmp_path: Path) -> None:
    """Only what is installed is tried: each needs the library of its own."""
    for file, libraries in MAY_ALSO_IMPORT["bnlayer"]:
        if all(find_spec(library) for library in libraries):
            module = f"bnlayer.{file.removesuffix('.py').replace('/', '.')}"
            forbidden = (HEAVY | FOR_FILES | FOR_AUTHORS) - libraries - {"google.protobuf"}
            assert brought_in([module], forbidden, folder=tmp_path) == ""


@pytest.mark.parametrize("framework", ["numpy", "torch", "tensorflow", "jax", "keras"])
def test_a_backend_s_door_imports_no_framework(framework: str, tmp_path: Path) -> None:
    assert brought_in([f"bnlayer_{framework}.backend"], HEAVY | FOR_AUTHORS, folder=tmp_path) == ""


def test_the_runner_imports_no_framework_and_none_of_the_authors_tools(tmp_path: Path) -> None:
    modules = runner_modules()
    assert {"bnlayer_conformance", "bnlayer_conformance.runner"} <= set(modules)
    assert brought_in(modules, HEAVY | FOR_AUTHORS, folder=tmp_path) == ""


def test_a_module_that_imports_a_framework_is_found(tmp_path: Path) -> None:
    """The tests above can fail: a planted module imports a planted framework, directly or through another."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "innocent.py").write_text("import json\ndef later():\n    import torch\n")
    (tmp_path / "guilty.py").write_text("import torch\n")
    (tmp_path / "accomplice.py").write_text("import guilty\n")
    assert brought_in(["innocent"], HEAVY, folder=tmp_path) == ""
    assert brought_in(["innocent", "guilty"], HEAVY, folder=tmp_path) == "guilty imports torch"
    assert brought_in(["innocent", "accomplice"], HEAVY, folder=tmp_path) == "accomplice imports torch"
