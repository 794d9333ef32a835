"""What is distributed: the wheel holds the seven packages and nothing else, and the sdist builds the same wheel."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "bnlayer": ROOT,
    **{f"bnlayer_{name}": ROOT / "backends" for name in ("numpy", "torch", "tensorflow", "jax", "keras")},
    "bnlayer_conformance": ROOT / "conformance",
}

pytest.importorskip("hatchling", reason="builds the wheel; run: pip install hatchling")


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(source: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_s_top_level_is_the_seven_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in contents(wheel)}
    (info,) = {top for top in tops if top.endswith(".dist-info")}
    assert info.startswith("bnlayer-")
    assert tops - {info} == set(PACKAGES)


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    expected = {
        path.relative_to(root).as_posix()
        for package, root in PACKAGES.items()
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == expected


def test_types_vectors_and_license_travel(wheel: Path) -> None:
    names = contents(wheel)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert [name for name in names if name.startswith("bnlayer_conformance/vectors/") and name.endswith(".json")]
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_the_command_and_the_backends_are_registered(wheel: Path) -> None:
    (text,) = (content for name, content in contents(wheel).items() if name.endswith(".dist-info/entry_points.txt"))
    lines = text.decode().splitlines()
    assert "bnlayer = bnlayer.cli:main" in lines
    for name in ("numpy", "torch", "tensorflow", "jax", "keras"):
        assert f"{name} = bnlayer_{name}.backend:BACKEND" in lines


def test_the_base_install_asks_for_no_framework(wheel: Path) -> None:
    (text,) = (content for name, content in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    required = [line.split(": ")[1] for line in text.decode().splitlines() if line.startswith("Requires-Dist: ")]
    base = {line.split(">")[0].replace("_", "-") for line in required if "extra ==" not in line}
    assert base == {"click", "ml-dtypes", "numpy", "rich"}


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


def test_the_sdist_holds_what_a_packager_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "noxfile.py", "constraints.txt", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert "tests/repository/test_wheel.py" in names
    assert not {name for name in names if name.startswith((".ci/", ".git/"))}
