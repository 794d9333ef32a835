"""What this backend does not do. Imports no JAX."""

from __future__ import annotations

from bnlayer.contract import Missing

MISSING = Missing()
