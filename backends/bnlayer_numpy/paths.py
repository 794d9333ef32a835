"""The two ways by which this backend computes a call."""

from __future__ import annotations

from typing import Final

from bnlayer.paths import Paths

# "blocked" (blocked.py) is several times as fast, and takes every call but an adjusted or an empty one. "definition"
# (definition.py, statistics.py) is the formulas as they are written. Where a batch's own numbers are beyond what the
# first can be trusted with, it hands that batch, or ghost batch, to the second.
PATHS: Final = Paths("blocked", "definition")
