"""Real files of every format with a few bytes changed: they read, or are refused; nothing else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnlayer import checkpoint
from bnlayer.errors import CheckpointError

from .conftest import entries

EXAMPLES = 150  # of each kind of file
# Where: among the first bytes, in the first kilobyte, anywhere. Magic numbers and lengths are at the beginning.
PLACES = st.one_of(
    st.integers(0, 63).map(lambda at: (at, None)),
    st.integers(0, 1023).map(lambda at: (at, None)),
    st.floats(0, 1, exclude_max=True).map(lambda share: (None, share)),
)
CHANGES = st.one_of(
    st.binary(min_size=1, max_size=8).map(lambda new: (len(new), new)),  # other bytes
    st.sampled_from([b"\xff" * 8, bytes(8), (2**40).to_bytes(8, "little"), (2**31 - 1).to_bytes(4, "little")]).map(
        lambda new: (len(new), new)
    ),
    st.integers(1, 100).map(lambda length: (length, b"")),  # bytes missing
    st.binary(min_size=1, max_size=64).map(lambda new: (0, new)),  # bytes too many
    st.just((2**62, b"")),  # cut off
)


def files_of(folder: Path, name: str) -> list[Path]:
    """The files that a checkpoint is made of: itself, those in its folder, or TensorFlow's two."""
    path = folder / name
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    return [path] if path.is_file() else [folder / f"{name}.index", folder / f"{name}.data-00000-of-00001"]


@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_it_reads_or_is_refused(folder: Path, data: st.DataObject) -> None:
    known = entries(folder)
    name = data.draw(st.sampled_from(sorted(known)), label="file")
    files = files_of(folder, name)
    victim = data.draw(st.sampled_from(files), label="part")
    changed = bytearray(victim.read_bytes())
    for (at, share), (length, new) in data.draw(st.lists(st.tuples(PLACES, CHANGES), min_size=1, max_size=8)):
        place = min(at, len(changed)) if at is not None else int(share * len(changed))
        changed[place : place + length] = new
    with tempfile.TemporaryDirectory() as room:
        for file in [*files, *folder.glob("*-of-*.safetensors")]:
            copy = Path(room) / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        (Path(room) / victim.relative_to(folder)).write_bytes(changed)
        try:
            found = checkpoint.open(Path(room) / name, **known[name]["options"])
            for tensor in found:
                found[tensor]
            for one in found.batch_norms():
                one.state()
        except CheckpointError:
            return
