"""Every attack and every kind of damage is refused by name: no code runs, no other file is read, no memory is taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bnlayer import checkpoint
from bnlayer.errors import CheckpointError

from .hostile import CASES, SECRET, tensor_pickle, torch_zip

LIMIT = 1 << 30  # bytes of address space beyond what importing takes


def read_all(path: Path) -> None:
    found = checkpoint.open(path)
    for name in found:
        found[name]
    found.batch_norms()


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_the_place_and_the_cause(name: str, tmp_path: Path) -> None:
    maker, says = CASES[name]
    path = maker(tmp_path)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_all(path)
    assert str(tmp_path) in str(caught.value)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_none_takes_memory_time_or_a_file_of_its_own(tmp_path: Path) -> None:
    """All of them again in one process under a memory limit, which is told of every file that is opened."""
    program = f"""
import json, pathlib, resource, sys, time
from bnlayer import checkpoint
from bnlayer.checkpoint import formats
for entry in formats.FORMATS.values():
    entry.load()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {LIMIT}, used + {LIMIT}))
opened = []
sys.addaudithook(lambda event, arguments: event == "open" and opened.append(str(arguments[0])))
out = {{}}
for line in sys.stdin:
    name, path = json.loads(line)
    opened.clear()
    begun = time.monotonic()
    try:
        found = checkpoint.open(path)
        [found[tensor] for tensor in found]
        said = "nothing"
    except Exception as error:
        said = type(error).__name__
    ours = (str(pathlib.Path(path).parent), sys.base_prefix, sys.prefix)
    outside = [p for p in opened if not p.startswith(ours) and not p.isdigit()]
    out[name] = [said, time.monotonic() - begun, outside]
print(json.dumps(out))
"""
    lines = []
    for name, (maker, _) in CASES.items():
        room = tmp_path / name
        room.mkdir()
        lines.append(json.dumps([name, str(maker(room))]))
    done = subprocess.run(
        [sys.executable, "-c", program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    for name, (said, seconds, outside) in json.loads(done.stdout).items():
        assert said == "CheckpointError", (name, said)
        assert seconds < 20, (name, seconds)
        assert outside == [], (name, outside)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    "odd", [b"K\x05", b"N", b"G\x7f\xf8" + bytes(6), b"]](ea", b"cbuiltins\nset\nK\x05\x85R", b"ca\nb\n"],
    ids=["number", "none", "nan", "list", "set of a number", "class"],
)  # fmt: skip
def test_a_module_whose_parts_are_not_what_they_should_be_reads_as_data(odd: bytes, tmp_path: Path) -> None:
    def text(word: str) -> bytes:
        return b"X" + len(word).to_bytes(4, "little") + word.encode()

    weight = tensor_pickle()[2:-2]  # without the protocol, and what ends it: a dict of "w"
    parts = {"_parameters": weight + b"s", "_buffers": b"}", "_modules": b"}", "_non_persistent_buffers_set": odd}
    state = b"}(" + b"".join(text(name) + part for name, part in parts.items()) + b"u"
    (tmp_path / "x.pt").write_bytes(torch_zip(b"\x80\x02cnet\nNet\n)\x81" + state + b"b.", {"0": bytes(16)}))
    found = checkpoint.open(tmp_path / "x.pt", module_stubs=True)
    assert found["w"].tolist() == [0.0] * 4


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40
