"""What this backend does not do."""

from __future__ import annotations

from bnlayer.contract import Missing

MISSING = Missing(
    fields={
        "renorm": "batch renormalization is not implemented",
        "virtual_batch_size": "ghost batches are not implemented",
        "zero_debias": "zero-debiased averages are not implemented",
        "synchronized": "statistics over replicas are not implemented",
    },
    adjustment="adjustments are not implemented",
)
