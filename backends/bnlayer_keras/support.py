"""What this backend does not do."""

from __future__ import annotations

from bnlayer.contract import Missing

MISSING = Missing(fields={"synchronized": "statistics over replicas are not implemented"})
