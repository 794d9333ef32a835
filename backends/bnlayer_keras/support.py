"""What this backend does not do."""

from __future__ import annotations

from bnlayer.contract import Missing

MISSING = Missing(
    shards="Keras's replicas are those of tf.distribute or torch.distributed, which a step does not start; on JAX its"
    " arrays are global, and so are the statistics"
)
