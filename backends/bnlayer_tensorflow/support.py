"""What this backend does not do: there is nothing."""

from __future__ import annotations

from bnlayer.contract import Missing

MISSING = Missing()
