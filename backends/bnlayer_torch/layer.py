"""`torch.nn` modules over `batch_norm`: `BatchNorm1d/2d/3d` with torch's own arguments, `BatchNorm` from a spec.

They are instances of torch's classes, with the same parameters, buffers and state_dict keys, so that tools find them.
Attributes are the truth: set `layer.momentum`, `layer.eps` and so on at any time; `layer.spec` is computed from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Final, Literal, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from bnlayer.call import trains
from bnlayer.dialects import complement
from bnlayer.errors import InputError, SpecError, StateError, UnsupportedError
from bnlayer.spec import BatchNormSpec, Estimator, GhostLayout, NonFinite, Renorm, SingleValue, ZeroDebias
from bnlayer.state import BatchNormState, array_names

from .direct import trained
from .dtypes import DTYPES, HALVES, dtype_name
from .function import batch_norm
from .fused import at_once, checked, from_batch, is_ambiguous, loses_gradients, unchecked, way_of
from .surroundings import around, write
from .synchronized import GroupReference
from .tensors import EXTRA_BUFFERS, tensors_of
from .tools import Qconfig, fx_node, refuse_fusing, scriptable
from .weights import check_weights, fits


class CallOptions(TypedDict, total=False):
    """What a module's call takes by keyword, all of it optional; see `Module.forward`."""

    update_stats: bool
    adjustment: tuple[Tensor, Tensor] | None
    renorm_clips: Mapping[str, float | Tensor | None] | None


# Arguments of `_spec`: what the attributes of a module say that it is.
_Said = tuple[
    int, int, float, float | None, bool, bool, bool, Estimator, ZeroDebias, Renorm | None, int | None, GhostLayout,
    SingleValue, NonFinite, bool, str, str,
]  # fmt: skip
_SPEAKING: Final = frozenset(
    {"num_features", "axis", "eps", "momentum", "weight", "bias", "track_running_stats", "running_mean",
     "moving_variance_estimator", "zero_debias", "renorm", "virtual_batch_size", "virtual_batch_layout",
     "single_value", "nonfinite", "synchronized"}
)  # fmt: skip


class Module(TorchBatchNorm):
    """What all our modules share.

    Attributes:
        num_features, eps, momentum, affine, track_running_stats: as torch's; `momentum` None averages all updates.
        axis: the channel axis.
        moving_variance_estimator, zero_debias, renorm, virtual_batch_size, virtual_batch_layout, single_value,
            nonfinite, synchronized: as the spec's.
        process_group: whose processes a synchronized module's statistics are over; None for all, where
            torch.distributed is initialized (see `bnlayer_torch.batch_norm`). A copy of the module has the same group;
            a module with one cannot be pickled.
        frozen_statistics: True: the moving statistics normalize and stay as they are, in training too; `train()` does
            not change it.
        weight, bias: gamma and beta, or None.
        running_mean, running_var, num_batches_tracked: the moving statistics and their counter, or None.
        hidden_mean, hidden_variance, renorm_mean, renorm_stddev, moving_stddev: the averages behind them, as in
            `bnlayer.BatchNormState`; buffers of a module that was built with zero_debias or renorm only.
    """

    _ranks: ClassVar[tuple[int, ...]] = ()  # of the inputs that the class takes; empty for any

    # The values of a module that never heard of them: one of torch.nn's that is made ours by its `__class__`, or from a
    # file that is older than the attribute.
    axis: int = 1
    moving_variance_estimator: Estimator = "unbiased"
    zero_debias: ZeroDebias = "none"
    renorm: Renorm | None = None
    virtual_batch_size: int | None = None
    virtual_batch_layout: GhostLayout = "strided"
    single_value: SingleValue = "raise"
    nonfinite: NonFinite = "propagate"
    synchronized: bool = False
    frozen_statistics: bool = False
    _process_group: GroupReference | None = None
    _param_dtype: str = "float32"
    _stats_dtype: str = "float32"
    _remembered: tuple[_Said, BatchNormSpec, tuple[bool, bool]] | None = None

    qconfig = Qconfig()

    def _set_up(self, spec: BatchNormSpec, device: Any, process_group: dist.ProcessGroup | None) -> None:
        """Fill a new module that torch's constructor left without parameters and buffers."""
        self.num_features = spec.num_features
        self.eps = spec.epsilon  # pyright: ignore[reportIncompatibleVariableOverride]
        self.momentum = None if spec.decay == "cumulative" else complement(float(spec.decay))
        self.affine = spec.scale
        self.track_running_stats = spec.track_moving_stats
        self.axis = spec.axis
        self.moving_variance_estimator = spec.moving_variance_estimator
        self.zero_debias = spec.zero_debias
        self.renorm = spec.renorm
        self.virtual_batch_size = spec.virtual_batch_size
        self.virtual_batch_layout = spec.virtual_batch_layout
        self.single_value = spec.single_value
        self.nonfinite = spec.nonfinite
        self.synchronized = spec.synchronized
        self.process_group = process_group
        self.frozen_statistics = False
        # A module without parameters or without statistics has no tensor that would tell their dtype.
        self._param_dtype, self._stats_dtype = spec.param_dtype, spec.stats_dtype
        for name, present in (("weight", spec.scale), ("bias", spec.center)):
            values = torch.empty(spec.num_features, dtype=DTYPES[spec.param_dtype], device=device)
            self.register_parameter(name, torch.nn.Parameter(values) if present else None)
        if spec.track_moving_stats:
            extra = [name for name in array_names(spec) if name in EXTRA_BUFFERS]
            for name in ("running_mean", "running_var", *extra):
                self.register_buffer(
                    name, torch.empty(spec.num_features, dtype=DTYPES[spec.stats_dtype], device=device)
                )
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        self.reset_parameters()
        self._remember()

    @property
    def eps(self) -> float:
        """What is added to the variance inside the square root."""
        if self.axis != 1:
            refuse_fusing(self.axis)
        value: float | None = self.__dict__.get("eps")
        if value is None:
            raise AttributeError("eps")
        return value

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    @property
    def spec(self) -> BatchNormSpec:
        """What the module is now, by its attributes and the dtypes of its tensors.

        Raises:
            SpecError: an attribute was set to what no batch norm can be.
        """
        said = self._said()
        if self._remembered is not None and self._remembered[0] == said:
            return self._remembered[1]
        return _spec(*said)

    def _said(self) -> _Said:
        stored = self.weight if self.weight is not None else self.bias
        tracked = self.running_mean
        return (
            self.num_features,
            self.axis,
            self.__dict__["eps"],
            self.momentum,
            self.bias is not None,
            self.weight is not None,
            self.track_running_stats,
            self.moving_variance_estimator,
            self.zero_debias,
            _checked_renorm(self.renorm),
            self.virtual_batch_size,
            self.virtual_batch_layout,
            self.single_value,
            self.nonfinite,
            self.synchronized,
            self._param_dtype if stored is None else dtype_name(stored.dtype),
            self._stats_dtype if tracked is None else dtype_name(tracked.dtype),
        )

    def _remember(self) -> None:
        """Find the spec now that nothing is traced: torch.compile cannot follow how it is checked."""
        try:
            said = self._said()
            self.__dict__["_remembered"] = said, _spec(*said), self._plain()
        except SpecError:
            self.__dict__["_remembered"] = None  # the next call refuses it

    def _plain(self) -> tuple[bool, bool]:
        """Whether torch's kernel can do all that the attributes ask for: in eval, in training."""
        epsilon, momentum = self.__dict__["eps"], self.momentum
        in_eval = (
            self.track_running_stats and self.axis == 1 and isinstance(epsilon, float) and 0.0 < epsilon < torch.inf
        )
        return in_eval, (
            in_eval
            and isinstance(momentum, float)
            and 0.0 <= momentum <= 1.0
            and self.moving_variance_estimator == "unbiased"
            and self.nonfinite == "propagate"
            and self.zero_debias == "none"
            and self.renorm is None
            and self.virtual_batch_size is None
            and not self.synchronized
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _SPEAKING and "_remembered" in self.__dict__:
            self._remember()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._remember()
        return applied

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_remembered"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._remember()

    def __prepare_scriptable__(self) -> TorchBatchNorm:
        """torch.nn's module over the same tensors, which torch.jit.script compiles in place of this one.

        Raises:
            UnsupportedError: torch.nn's would compute something else.
        """
        return scriptable(self)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Whose processes a synchronized module's statistics are over."""
        held = self._process_group
        return None if held is None else held.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._process_group = None if group is None else GroupReference(group)

    def reset_running_stats(self) -> None:
        """Back to moving statistics that nothing entered: mean 0, variance 1, counter 0, and what that means for the
        averages behind them."""
        super().reset_running_stats()
        initial = {"renorm_stddev": (1.0 + self.eps) ** 0.5, "moving_stddev": (1.0 + self.eps) ** 0.5}
        for name in EXTRA_BUFFERS:
            buffer = self._buffers.get(name)
            if buffer is not None:
                buffer.fill_(initial.get(name, 0.0))

    def reset_parameters(self) -> None:
        """Back to a module that never trained: gamma 1, beta 0, moving mean 0, moving variance 1, counter 0."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, weights: Tensor | None = None, **options: Unpack[CallOptions]) -> Tensor:
        """Normalize `input`, and in training update the moving statistics.

        Inside of a backward pass nothing is updated: a call there computes again what already was (activation
        checkpointing). What torch.compile has compiled cannot tell: compile what contains the checkpoint.

        Args:
            input: float tensor, `num_features` long on the channel axis.
            weights: mask or weights of shape (N,), the input's shape without the channel axis, or with 1 on it.
            update_stats: False: batch statistics normalize, but the moving ones and the counter stay (for
                recomputation and extra forward passes). By default True.
            adjustment: in training, a scale and a bias of the normalized values before weight and bias; each
                broadcastable to the input.
            renorm_clips: "r_max", "r_min" or "d_max" in place of the module's for this call; None is no clip.

        Returns:
            A tensor of the input's shape and dtype.

        Raises:
            InputError: the input, the weights, the adjustment or the clips do not fit the module.
            SpecError: an attribute was set to what no batch norm can be.
            StateError: an attribute asks for statistics that the module was built without.
            UnsupportedError: torch.func.vmap would give the module as many statistics as there are examples, or a
                checkpoint would compute a renorm again.
        """
        if type(input) is not Tensor and isinstance(input, Proxy):
            return fx_node(self, input, weights, options)
        self._check_input_dim(input)
        if not options:
            training = self.training and not self.frozen_statistics
            y = self._fused(input, training) if weights is None or _left_out(weights, input, training) else None
            if y is None and training:
                y = trained(self, input, weights)
            if y is not None:
                return y
        return self._by_spec(input, weights, **options)

    def _by_spec(
        self,
        x: Tensor,
        weights: Tensor | None,
        *,
        update_stats: bool = True,
        adjustment: tuple[Tensor, Tensor] | None = None,
        renorm_clips: Mapping[str, float | Tensor | None] | None = None,
    ) -> Tensor:
        spec = self.spec
        training = trains(spec, self.training, self.frozen_statistics)
        if training and update_stats and around() == "recomputation":
            if spec.renorm is not None:
                # Its averages have moved on since, and r and d would be others.
                raise UnsupportedError(
                    "renorm cannot be computed again in the backward pass, as torch.utils.checkpoint does: it reads the"
                    " averages from before the update. Keep the layer out of the checkpoint."
                )
            update_stats = False
        before = self._state(spec, copied=not training and torch.is_grad_enabled())
        y, after = batch_norm(
            x,
            before,
            spec,
            training=training,
            weights=weights,
            update_stats=update_stats,
            adjustment=adjustment,
            renorm_clips=renorm_clips,
            process_group=self.process_group,
        )
        if after is not before:
            self._keep(after, spec)
        return y

    def _fused(self, x: Tensor, training: bool) -> Tensor | None:
        """y from torch's kernel on the module's own tensors, where that is all there is to do; else None.

        Always None for what has to be refused: `batch_norm` says what is wrong with it. As attributes a module's
        tensors are slow to look up, so they are taken from where it keeps them.
        """
        remembered, buffers, parameters = self._remembered, self._buffers, self._parameters
        in_eval, in_training = self._plain() if remembered is None else remembered[2]
        if not (in_training if training else in_eval):
            return None
        mean, variance = buffers.get("running_mean"), buffers.get("running_var")
        if mean is None or variance is None:
            return None
        stored, shape, features = mean.dtype, x.shape, self.num_features
        if not (stored is x.dtype is torch.float32 or _computes(stored, x)) or (
            len(shape) < 2 or shape[1] != features or (len(shape) > 3 and is_ambiguous(x))
        ):
            return None
        if "weight" in parameters and "bias" in parameters:
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # what computes a parameter from others keeps it elsewhere
            weight, bias = self.weight, self.bias
        if bias is not None and (weight is None or bias.dtype is not stored):
            return None
        if weight is not None and weight.dtype is not stored:
            return None
        count, eps, momentum = x.numel() // features, self.__dict__["eps"], self.momentum
        if training:
            counter = buffers.get("num_batches_tracked")
            if count < 2 or counter is None:
                return None
            assert momentum is not None
            found = at_once(x, weight, bias, mean, variance, momentum, eps, count)
            if found is not None:
                counter.add_(_ONE)
                y, passed = found
                if passed:
                    return y
                way = unchecked(x, 1)
            else:
                what = around()
                way = way_of(x, 1, count, eps, plain=what == "nothing" or what == "recomputation")
                if what == "transform" or way.centered:
                    return None
                if what == "recomputation":
                    mean, variance = mean.clone(), variance.clone()  # the update goes nowhere
                else:
                    counter.add_(1)
                    if what == "nothing" and torch.is_grad_enabled():
                        mean, variance = mean.data, variance.data  # see `at_once`
            if way.path == "checked":
                y, passed = checked(x, weight, bias, mean, variance, momentum, eps)
                if passed:
                    return y
                way = unchecked(x, 1)
            if way.path != "native":
                y, (batch_mean, batch_variance) = from_batch(x, weight, bias, eps, 1, count, way)
                mean.mul_(1.0 - momentum).add_(batch_mean, alpha=momentum)
                variance.mul_(1.0 - momentum).add_(batch_variance, alpha=momentum * (count / (count - 1)))
                return y
        elif count == 0:
            return None
        elif (
            torch.is_grad_enabled()
            and (x.requires_grad or _learns(weight) or _learns(bias))
            and around() != "trace"  # there an exporter looks for the module's own tensors
        ):
            # Here the backward pass does use them, and a later training call changes them in place.
            mean, variance = mean.clone(), variance.clone()
        factor = momentum if isinstance(momentum, float) else 0.0  # in eval too: an exported file says what it was
        return torch.batch_norm(
            x, weight, bias, mean, variance, training, factor, eps, torch.backends.cudnn.enabled
        )  # fmt: skip

    def _state(self, spec: BatchNormSpec, *, copied: bool = False) -> BatchNormState[Tensor]:
        """The module's tensors as a state; with `copied`, statistics that later calls do not change in place."""
        found = tensors_of(self, spec)
        counter = self.num_batches_tracked if spec.track_moving_stats else 0
        missing = [name for name, tensor in found.items() if tensor is None]
        if missing or counter is None:
            raise StateError(
                f"the module was built without {', '.join(missing) or 'num_batches_tracked'}; build it with the"
                " track_running_stats, zero_debias and renorm that it has now."
            )
        if copied:
            for name in ("moving_mean", "moving_variance"):  # all that eval reads
                tensor = found.get(name)
                found[name] = None if tensor is None else tensor.clone()
        return BatchNormState(**found, num_updates=counter)

    def _keep(self, after: BatchNormState[Tensor], spec: BatchNormSpec) -> None:
        """Write moved statistics into the buffers, which stay the same tensors for whoever holds them."""
        assert self.num_batches_tracked is not None
        for name, tensor in tensors_of(self, spec).items():
            moved = getattr(after, name)
            if moved is not tensor:
                assert tensor is not None
                write(tensor, moved)
        write(self.num_batches_tracked, after.num_updates)

    def _check_input_dim(self, input: Tensor) -> None:
        if self._ranks and input.dim() not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise InputError(f"{type(self).__name__} expects {expected} input; got {input.dim()}D.")

    def extra_repr(self) -> str:
        """torch's line, and what differs from torch's defaults."""
        said = [
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine},"
            f" bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        ]
        said += [f"{name}={getattr(self, name)!r}" for name, usual in _USUAL.items() if getattr(self, name) != usual]
        return ", ".join(said)


# What a counter on the CPU goes up by; the number would be made a tensor every time. Where operations are recorded, so
# would be that it came from here.
_ONE: Final = torch.ones((), dtype=torch.long, device="cpu")

_USUAL: Final = {
    name: getattr(Module, name)
    for name in (
        "axis",
        "moving_variance_estimator",
        "zero_debias",
        "renorm",
        "virtual_batch_size",
        "virtual_batch_layout",
        "single_value",
        "nonfinite",
        "synchronized",
        "frozen_statistics",
    )
}


# What a module's own dictionary has beyond that of torch.nn's.
OWN_ATTRIBUTES: Final = (*_USUAL, "_process_group", "_param_dtype", "_stats_dtype", "_remembered")


class BatchNorm(Module):
    """Batch normalization of any rank and channel axis, from a spec; otherwise as `BatchNorm1d/2d/3d`."""

    def __init__(
        self, spec: BatchNormSpec, *, device: Any = None, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(0, affine=False, track_running_stats=False)
        self._set_up(spec, device, process_group)


class _TorchArguments(Module):
    """Torch's own arguments and defaults, channels on axis 1."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        center: bool | None = None,
        scale: bool | None = None,
        moving_variance_estimator: Estimator = "unbiased",
        zero_debias: ZeroDebias = "none",
        renorm: Renorm | None = None,
        virtual_batch_size: int | None = None,
        virtual_batch_layout: GhostLayout = "strided",
        single_value: SingleValue = "raise",
        nonfinite: NonFinite = "propagate",
        synchronized: bool = False,
        process_group: dist.ProcessGroup | None = None,
        stats_dtype: torch.dtype | None = None,
    ) -> None:
        """Torch's arguments, and by keyword what a spec has beyond them.

        Args:
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as torch's.
            center, scale: whether there is a bias, a weight; None for what `affine` and `bias` say.
            moving_variance_estimator, zero_debias, renorm, virtual_batch_size, virtual_batch_layout, single_value,
                nonfinite, synchronized: as in `bnlayer.BatchNormSpec`; renorm goes with
                moving_variance_estimator="biased" only.
            process_group: whose processes the statistics of a synchronized module are over; None for all.
            stats_dtype: of the moving statistics; None for `dtype`.

        Raises:
            SpecError: an argument is out of range, or two contradict each other.
        """
        super().__init__(0, affine=False, track_running_stats=False)
        param_dtype = dtype_name(dtype or torch.get_default_dtype())
        spec = _spec(
            num_features,
            1,
            eps,
            momentum,
            affine and bias if center is None else center,
            affine if scale is None else scale,
            track_running_stats,
            moving_variance_estimator,
            zero_debias,
            _checked_renorm(renorm),
            virtual_batch_size,
            virtual_batch_layout,
            single_value,
            nonfinite,
            synchronized,
            param_dtype,
            param_dtype if stats_dtype is None else dtype_name(stats_dtype),
        )
        self._set_up(spec, device, process_group)


class BatchNorm1d(_TorchArguments, torch.nn.BatchNorm1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Batch normalization of (N, C) or (N, C, L) input; see `BatchNorm1d.__init__` for torch's arguments and ours."""

    _ranks = (2, 3)


class BatchNorm2d(_TorchArguments, torch.nn.BatchNorm2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Batch normalization of (N, C, H, W) input; see `BatchNorm2d.__init__` for torch's arguments and ours."""

    _ranks = (4,)


class BatchNorm3d(_TorchArguments, torch.nn.BatchNorm3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Batch normalization of (N, C, D, H, W) input; see `BatchNorm3d.__init__` for torch's arguments and ours."""

    _ranks = (5,)


@lru_cache(maxsize=1024, typed=True)
def _spec(
    num_features: int,
    axis: int,
    eps: float,
    momentum: float | None,
    center: bool,
    scale: bool,
    track: bool,
    estimator: Estimator,
    zero_debias: ZeroDebias,
    renorm: Renorm | None,
    virtual_batch_size: int | None,
    virtual_batch_layout: GhostLayout,
    single_value: SingleValue,
    nonfinite: NonFinite,
    synchronized: bool,
    param_dtype: str,
    stats_dtype: str,
) -> BatchNormSpec:
    """The spec of these attributes; remembered, for a module asks at every call that torch's kernel cannot do alone."""
    return BatchNormSpec(
        num_features,
        axis=axis,
        epsilon=eps,
        decay=_decay(momentum, track),
        center=center,
        scale=scale,
        moving_variance_estimator=estimator,
        zero_debias=zero_debias,
        renorm=renorm,
        virtual_batch_size=virtual_batch_size,
        virtual_batch_layout=virtual_batch_layout,
        track_moving_stats=track,
        single_value=single_value,
        nonfinite=nonfinite,
        synchronized=synchronized,
        param_dtype=param_dtype,
        stats_dtype=stats_dtype,
    )


def _checked_renorm(renorm: object) -> Renorm | None:
    """What `_spec` can remember: torch's users may try a dictionary here, which has no hash."""
    if renorm is None or isinstance(renorm, Renorm):
        return renorm
    raise SpecError(f"renorm must be None or a bnlayer.Renorm; got {renorm!r}.")


def _left_out(weights: Tensor, x: Tensor, training: bool) -> bool:
    """Whether weights that surely fit x, and whose values are checked here, change nothing: in eval but gradients."""
    if training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not fits(weights, x):
        return False
    check_weights(weights)
    return True


def _computes(stored: torch.dtype, x: Tensor) -> bool:
    """Whether torch's kernel is for x and statistics of this dtype."""
    if stored in HALVES:
        return False
    return x.dtype is stored or (stored is torch.float32 and x.dtype in HALVES and not loses_gradients(x))


def _learns(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _decay(momentum: float | None, track: bool) -> float | Literal["cumulative"]:
    if momentum is None:
        # torch takes None also where nothing is averaged, and there it has no meaning.
        return "cumulative" if track else 0.9
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0.0 <= momentum <= 1.0:
        raise SpecError(f"momentum must be a number in [0, 1], or None for the average of all; got {momentum!r}.")
    return complement(momentum)
