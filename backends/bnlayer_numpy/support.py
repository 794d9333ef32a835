"""What this backend does not do."""

from __future__ import annotations

from bnlayer.contract import Missing

MISSING = Missing(
    shards="NumPy has no engine that runs a layer on several replicas",
    direction="the backward pass is written out, and NumPy cannot differentiate it again",
)
