"""What this backend does not do."""

from __future__ import annotations

from bnlayer.contract import Missing

MISSING = Missing(fields={"synchronized": "NumPy has one process and one device; there is nothing to synchronize"})
