# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""How this project is tested: `nox -s tests` is all of it, the rest are parts and extras. `nox -l` lists them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from subprocess import STDOUT
from tempfile import TemporaryFile
from threading import Lock
from time import monotonic

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # with pip, which knows where a machine's CPU wheels are
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

Command = tuple[dict[str, str], list[str]]  # environment variables, and the arguments
LANES = 2  # how many of the tests' commands run at a time; each takes up to about 4 GB
SHOWING = Lock()

# Frameworks that want a process of their own: they fight over threads, memory and what they patch. In this order, for
# what takes longest must not be the last.
ALONE = ("jax", "tensorflow", "keras", "torch", "porting", "surgery", "onnx")
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax", "equinox", "haiku", "orbax", "onnxruntime", "safetensors")
# What each backend is tested with in an environment that has nothing else; Keras on the smallest of its frameworks.
NEEDS = {
    "numpy": (),
    "torch": ("torch",),
    "tensorflow": ("tensorflow-cpu",),
    "jax": ("jax",),
    "keras": ("keras", "jax"),
}
GROUPS = ("frameworks", "peers", "files", "porting", "examples", "test", "lint")  # of what the session `tests` installs
SLOWEST = ("--durations=8",)  # shown, for all of `tests` has to stay below 25 minutes
ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "2"}
# JAX compiles most programs of a test for one call, which takes far longer than the call; so it does without what makes
# them fast. Where our own functions are compiled, tests and the first of `conform_runs` have what users have, for a
# program's roundings depend on it.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
# So have these tests; TensorFlow's compiler reads the second of the two as well.
AS_USERS = (
    "tensorflow", "jax/test_agreement.py", "jax/test_options.py", "jax/test_paths.py", "jax/test_transforms.py"
)  # fmt: skip
CORPUS = "BNLAYER_CORPUS"  # names the folder of checkpoints that the frameworks made, where they lie ready
ABSENT = "from importlib.util import find_spec; import sys; sys.exit(' '.join(filter(find_spec, sys.argv[1:])) or 0)"
CHECKS: list[Command] = [({}, command.split()) for command in ("ruff check", "ruff format --check", "mypy", "pyright")]


@nox.session
def tests(session: nox.Session) -> None:
    """Everything: checks, tests and conformance with all frameworks in one environment, then what needs none."""
    session.notify("base")
    install_everything(session)
    make_corpus(session)
    run_all(session, conform_runs() + pytests() + CHECKS, lanes=LANES)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types: ruff, mypy, pyright."""
    install_everything(session)
    run_all(session, CHECKS)


@nox.session
def base(session: nox.Session) -> None:
    """A fresh machine: the base install alone, away from the checkout, runs its main job on NumPy."""
    install(session, ".")
    session.chdir(session.create_tmp())  # what is imported is the wheel, never the checkout
    session.run("bnlayer", "conform")
    session.run("bnlayer", "backends")
    session.run("bnlayer", "explain", "torch", "keras")


@nox.session
def checkpoints(session: nox.Session) -> None:
    """Every framework makes its checkpoints, then the session `reading` has none of them and reads every one."""
    if CORPUS not in os.environ:
        install_everything(session)
    make_corpus(session)


@nox.session
def reading(session: nox.Session) -> None:
    """The wheel and the formats' libraries alone read the checkpoints in BNLAYER_CORPUS, equal to the bit."""
    if CORPUS not in os.environ:
        session.error(f"{CORPUS} must name a folder of checkpoints; `nox -s checkpoints` makes one")
    install(session, ".[checkpoints]", *requirements("test", ("pytest",)))
    session.chdir(session.create_tmp())
    session.run("python", "-c", ABSENT, *FRAMEWORKS)
    folder = ROOT / "tests" / "checkpoints"
    session.run("pytest", f"--confcutdir={folder}", str(folder / "test_corpus.py"), str(folder / "test_inspect.py"))


@nox.session
@nox.parametrize("backend", list(NEEDS), ids=list(NEEDS))
def conformance(session: nox.Session, backend: str) -> None:
    """One backend's wheel in an environment of its own, judged as a stranger would judge it."""
    install(session, ".[conformance]", *requirements("frameworks", NEEDS[backend]))
    session.chdir(session.create_tmp())
    suite = ("-p", "bnlayer_conformance.plugin", "--pyargs", "bnlayer_conformance")
    session.run(
        "pytest", *suite, f"--backend={backend}", "--strict-backends", *session.posargs,
        env={**ENVIRONMENT, "KERAS_BACKEND": "jax"},
    )  # fmt: skip


@nox.session
def examples(session: nox.Session) -> None:
    """Every example in a fresh environment, from the wheel: what docs/examples.md shows."""
    install(session, ".", *nox.project.dependency_groups(PYPROJECT, "frameworks", "examples"))
    scripts = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "digits.py"]
    session.chdir(session.create_tmp())
    run_all(session, [(ENVIRONMENT, ["python", str(path)]) for path in scripts])


@nox.session
def bench(session: nox.Session) -> None:
    """How fast everything is against what it replaces, on an idle machine; arguments go to `python -m benchmarks`."""
    install(session, "-e", ".", *nox.project.dependency_groups(PYPROJECT, "frameworks", "examples"))
    session.run("python", "-m", "benchmarks", *session.posargs)


def install_everything(session: nox.Session) -> None:
    """The project as it lies here, every framework, and every tool."""
    install(session, "-e", ".", *nox.project.dependency_groups(PYPROJECT, *GROUPS))


def install(session: nox.Session, *arguments: str) -> None:
    """Install under the constraints that keep torch small."""
    session.install("-c", str(ROOT / "constraints.txt"), *arguments)


def make_corpus(session: nox.Session) -> None:
    """Have every framework make its checkpoints, unless they are there, and `reading` read them afterwards."""
    session.notify("reading")
    if CORPUS in os.environ:
        return
    # Not in create_tmp, which moves TMPDIR into the checkout, and there tests take its settings for theirs.
    folder = Path(session.virtualenv.location).resolve() / "corpus"
    rmtree(folder, ignore_errors=True)
    session.run("python", str(ROOT / "tests" / "checkpoints" / "corpus.py"), "all", str(folder), env=ENVIRONMENT)
    os.environ[CORPUS] = str(folder)  # for all that runs from here on, `reading` too


def requirements(group: str, names: tuple[str, ...]) -> list[str]:
    """The requirements of a dependency group for these distributions."""
    listed = nox.project.dependency_groups(PYPROJECT, group)
    return [line for line in listed if line.split(">=")[0] in names]


def pytests() -> list[Command]:
    """The folders of tests/ that hold tests: those that need it in processes of their own."""
    tests = ROOT / "tests"
    folders = [path for path in sorted(tests.iterdir()) if path.is_dir() and any(path.rglob("test_*.py"))]
    together = [str(path) for path in folders if path.name not in ALONE]
    commands: list[Command] = [({**ENVIRONMENT, **QUICK}, ["pytest", *SLOWEST, *together])]
    for path in sorted((path for path in folders if path.name in ALONE), key=lambda path: ALONE.index(path.name)):
        as_users = [str(tests / name) for name in AS_USERS if Path(name).parts[0] == path.name]
        if as_users:
            commands.append((ENVIRONMENT, ["pytest", *SLOWEST, *as_users]))
        if str(path) not in as_users:
            others = [f"--ignore={name}" for name in as_users]
            commands.append(({**ENVIRONMENT, **QUICK}, ["pytest", *SLOWEST, str(path), *others]))
    return commands


def conform_runs() -> list[Command]:
    """The vectors on our backends and on the frameworks' own layers, in processes of about equal length."""
    native = list(PYPROJECT["project"]["entry-points"]["bnlayer.native"])
    on_jax = [name for name in native if name.split(".")[0] in ("flax", "equinox", "haiku")]
    rest = [name for name in native if name not in on_jax and name != "keras.layers"]
    runs: list[tuple[str, dict[str, str], list[str]]] = [
        ("tensorflow", {}, []),
        ("tensorflow", QUICK, on_jax),
        ("tensorflow", {}, ["keras.layers", *rest]),
        ("jax", QUICK, ["keras", "keras.layers"]),  # Keras runs on one framework per process
        ("torch", {}, ["keras", "keras.layers"]),
    ]
    return [
        (
            {**ENVIRONMENT, **compiled, "KERAS_BACKEND": keras},
            ["bnlayer", "conform", *(p for n in names for p in ("--backend", n))],
        )
        for keras, compiled, names in runs
    ]


def run_all(session: nox.Session, commands: list[Command], *, lanes: int = 1) -> None:
    """Run every command, whatever the ones before it said; fail at the end with the list of those that failed.

    With more than one lane that many run at a time, and each one's output is shown when it ends.
    """

    def run(command: Command) -> str | None:
        environment, arguments = command
        shown = " ".join([*(f"{name}={value}" for name, value in environment.items()), *arguments])
        begun = monotonic()
        with TemporaryFile("w+") as output:
            try:
                session.run(*arguments, env=environment, stdout=output if lanes > 1 else None, stderr=STDOUT)
            except nox.command.CommandFailed:
                return shown
            finally:
                output.seek(0)
                with SHOWING:
                    print(f"----- {monotonic() - begun:.0f} s: {shown}", output.read(), sep="\n", flush=True)
        return None

    with ThreadPoolExecutor(lanes) as pool:
        failed = [shown for shown in pool.map(run, commands) if shown is not None]
    if failed:
        session.error("failed: " + "; ".join(failed))


if __name__ == "__main__":
    nox.main()
