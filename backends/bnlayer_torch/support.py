"""What this backend does not do."""

from __future__ import annotations

from bnlayer.contract import Request, require


def missing(request: Request | None) -> str | None:
    """What the request asks for and this build of torch lacks, or None. Imports torch for replicas only."""
    if request is None or request.shards is None:
        return None
    distributed = require("torch.distributed", "torch")
    if distributed.is_available() and distributed.is_gloo_available():
        return None
    return "shards: this build of torch has no torch.distributed with gloo"
