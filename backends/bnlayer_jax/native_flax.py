"""What Flax's two batch norms have in common as conformance targets. Imports neither JAX nor Flax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnlayer.contract import Call, Missing
from bnlayer.spec import BatchNormSpec

from .native_host import NativeHost

_NO_OPTION = "Flax has no such option"


class FlaxHost(NativeHost):
    """Flax's batch norm: a moving average of the biased variance, a mask, no counter."""

    library = "flax"
    missing = Missing(
        fields={
            "moving_variance_estimator": "Flax's is biased",
            "zero_debias": _NO_OPTION,
            "renorm": _NO_OPTION,
            "virtual_batch_size": _NO_OPTION,
            "nonfinite": "Flax always propagates",
            "synchronized": "Flax's axis_name needs a mapped axis and as many rows on each device",
        },
        adjustment="Flax has no such argument",
        shards="Flax's axis_name needs as many rows on each device",
    )

    @property
    def lacks(self) -> Mapping[str, str]:
        return {"num_updates": "it has no counter", "dweights": "its mask is boolean"}

    def said(self, module: Any) -> dict[str, Any]:
        return {
            "axis": module.axis,
            "epsilon": module.epsilon,
            "decay": module.momentum,
            "center": module.use_bias,
            "scale": module.use_scale,
        }

    def lacks_of(self, spec: BatchNormSpec) -> str | None:
        if spec.decay == "cumulative":
            return "decay: Flax has no cumulative average"
        if not spec.track_moving_stats:
            return "track_moving_stats: Flax always keeps moving statistics"
        if spec.stats_dtype in ("float16", "bfloat16"):
            return "stats_dtype: Flax keeps its statistics in float32 or wider"
        return None

    def lacks_in(self, spec: BatchNormSpec, call: Call) -> str | None:
        if call.weights is not None and call.weights.dtype.kind != "b":
            return "weights: Flax takes a boolean mask"
        return None
