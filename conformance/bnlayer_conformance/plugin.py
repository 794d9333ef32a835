"""The suite as pytest tests, for a backend's own test run.

    pytest -p bnlayer_conformance.plugin --pyargs bnlayer_conformance --backend NAME [--strict-backends]

NAME is a registered backend or package.module:ATTRIBUTE and may be repeated; without any, all of bnlayer's own. An
absent backend is skipped with its install command; with --strict-backends that is a failure.
"""

from __future__ import annotations

from functools import cache

import pytest

from bnlayer import registry
from bnlayer.errors import UnknownBackend

from .runner import Target, find


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("bnlayer conformance")
    group.addoption("--backend", action="append", default=[], metavar="NAME", help="a backend to run the vectors on")
    group.addoption("--strict-backends", action="store_true", help="an absent backend is a failure, not a skip")
    group.addoption("--device", default=None, help="where to build the layers, in the framework's words")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse an unknown name at once: one line, exit code 4."""
    try:
        for name in _names(config):
            _target(name, config.getoption("--device"))
    except UnknownBackend as error:
        raise pytest.UsageError(f"--backend: {error}") from error


def pytest_report_header(config: pytest.Config) -> str:
    """Which backends are here, and why the others are not."""
    found = [_target(name, config.getoption("--device")) for name in _names(config)]
    return "bnlayer backends: " + "; ".join(
        f"{t.name} {t.version}" if t.ready else f"{t.name} ABSENT ({t.reason})" for t in found
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that takes `target` each backend, by its name."""
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", _names(metafunc.config), indirect=True)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    """A backend that is ready."""
    found = _target(request.param, request.config.getoption("--device"))
    if not found.ready:
        if request.config.getoption("--strict-backends"):
            pytest.fail(found.reason, pytrace=False)
        pytest.skip(found.reason)
    return found


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str | None:
    """The --device option."""
    value: str | None = request.config.getoption("--device")
    return value


def _names(config: pytest.Config) -> list[str]:
    asked: list[str] = config.getoption("--backend") or []
    ours = [name for name, entry in registry.known().items() if registry.is_ours(entry)]
    return list(dict.fromkeys(asked)) or ours


@cache
def _target(name: str, device: str | None) -> Target:
    return find(name, registry.backend, device)
