"""torch's own `BatchNorm1d/2d/3d` as a conformance target: what they do with the same vectors. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from bnlayer.call import trains
from bnlayer.contract import Missing, NDArray, Outcome, Request, require
from bnlayer.dialects import complement
from bnlayer.errors import InputError, UnsupportedError
from bnlayer.spec import BatchNormSpec
from bnlayer.state import BatchNormState

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.modules.batchnorm import _BatchNorm

_NO_OPTION = "torch.nn has no such option"
_MISSING = Missing(
    fields={
        "renorm": _NO_OPTION,
        "virtual_batch_size": _NO_OPTION,
        "zero_debias": _NO_OPTION,
        "synchronized": "torch.nn has another class for it, SyncBatchNorm",
        "nonfinite": "torch.nn always propagates",
    },
    adjustment="torch.nn has no such argument",
)
_WORDS = ("axis", "single_value", "moving_variance_estimator")
_AXIS = "axis: torch.nn's channel axis is 1"


class TorchNN:
    """torch.nn's batch norm, of the class that the rank of its input asks for."""

    name = "torch.nn"

    def __init__(self) -> None:
        # What a layer was built for and does not know of: the spec's word for axis 1, and what has no effect on it.
        self._words: WeakKeyDictionary[_BatchNorm, dict[str, Any]] = WeakKeyDictionary()

    @property
    def deviations(self) -> Path:
        """The file of torch.nn's known deviations."""
        return Path(__file__).with_name("deviations") / "torch.nn.txt"

    @property
    def lacks(self) -> Mapping[str, str]:
        return {}

    def version(self) -> str:
        return str(require("torch", "torch").__version__)

    def owns(self, layer: Any) -> bool:
        if "torch" not in sys.modules:
            return False
        from torch.nn import SyncBatchNorm
        from torch.nn.modules.batchnorm import _BatchNorm

        ours = sys.modules.get("bnlayer_torch.layer")
        foreign = SyncBatchNorm if ours is None else (SyncBatchNorm, ours.Module)
        return isinstance(layer, _BatchNorm) and not isinstance(layer, foreign)

    def unsupported(self, spec: BatchNormSpec, request: Request | None = None) -> str | None:
        reason = _MISSING.reason(spec, request)
        if reason is not None:
            return reason
        if spec.axis != 1 and not -4 <= spec.axis < 0:
            return _AXIS
        if spec.track_moving_stats and spec.moving_variance_estimator != "unbiased":
            return "moving_variance_estimator: torch.nn's is unbiased"
        if spec.center and not spec.scale:
            return "scale: torch.nn has no bias without a weight"
        if spec.param_dtype != spec.stats_dtype:
            return "stats_dtype: torch.nn has one dtype for parameters and statistics"
        return None if request is None else _unsupported_request(spec, request)

    def build(
        self, spec: BatchNormSpec, state: BatchNormState[NDArray] | None = None, *, device: Any = None
    ) -> _BatchNorm:
        require("torch", "torch")
        self._refuse(spec)
        from .bridge import write_state
        from .devices import checked
        from .dtypes import DTYPES
        from .native_layer import AnyRank

        layer = AnyRank(
            spec.num_features,
            eps=spec.epsilon,
            momentum=None if spec.decay == "cumulative" else complement(float(spec.decay)),
            affine=spec.scale,
            bias=spec.center,
            track_running_stats=spec.track_moving_stats,
            device=checked(device),
            dtype=DTYPES[spec.param_dtype],
        )
        self._words[layer] = {name: getattr(spec, name) for name in _WORDS}
        if state is not None:
            write_state(layer, state, spec)
        return layer

    def extract(self, layer: _BatchNorm) -> tuple[BatchNormSpec, BatchNormState[NDArray]]:
        from .bridge import read_state

        spec = self._spec_of(layer)
        return spec, read_state(layer, spec)

    def load(self, layer: _BatchNorm, state: BatchNormState[NDArray]) -> _BatchNorm:
        from .bridge import write_state

        write_state(layer, state, self._spec_of(layer))
        return layer

    def step(self, layer: _BatchNorm, request: Request) -> tuple[_BatchNorm, Outcome]:
        from .bridge import run_step

        spec = self._spec_of(layer)
        self._refuse(spec, request)
        # Frozen statistics are, in torch's idiom, a batch norm left in eval mode.
        layer.train(trains(spec, request.training, request.frozen_statistics))

        def forward(x: Tensor, *_: object) -> Tensor:  # what else a call may have, `unsupported` refuses
            try:
                y: Tensor = layer(x)
            except (ValueError, RuntimeError, NotImplementedError) as error:  # how torch refuses an input
                raise InputError(f"torch.nn refuses x with shape {tuple(x.shape)}: {error}") from error
            return y

        return layer, run_step(layer, spec, request, forward)

    def _spec_of(self, layer: _BatchNorm) -> BatchNormSpec:
        from .dtypes import dtype_name

        stored = next((t.dtype for t in (layer.weight, layer.running_mean) if t is not None), None)
        dtype = "float32" if stored is None else dtype_name(stored)
        spec = BatchNormSpec(
            layer.num_features,
            axis=1,
            epsilon=layer.eps,
            decay="cumulative" if layer.momentum is None else complement(layer.momentum),
            center=layer.bias is not None,
            scale=layer.weight is not None,
            moving_variance_estimator="unbiased",
            track_moving_stats=layer.running_mean is not None,
            param_dtype=dtype,
            stats_dtype=dtype,
        )
        return spec.replace(**self._words.get(layer, {}))

    def _refuse(self, spec: BatchNormSpec, request: Request | None = None) -> None:
        reason = self.unsupported(spec, request)
        if reason is not None:
            raise UnsupportedError(f"backend {self.name!r} does not support {reason}.")


def _unsupported_request(spec: BatchNormSpec, request: Request) -> str | None:
    if not request.update_stats and request.training and spec.track_moving_stats:
        return "update_stats: torch.nn always updates in training"
    for call in request.calls:
        if spec.axis < 0 and call.x.ndim >= 2 and spec.axis + call.x.ndim != 1:
            return _AXIS
        if call.weights is not None:
            return "weights: torch.nn has no such argument"
        dtype = call.x.dtype.name
        mixed = dtype in ("float16", "bfloat16") and spec.param_dtype == "float32"
        if dtype in ("float16", "bfloat16", "float32", "float64") and dtype != spec.param_dtype and not mixed:
            return f"{dtype}: torch.nn takes x of the parameters' dtype, or half x with float32 parameters"
    return None


BACKEND = TorchNN()
