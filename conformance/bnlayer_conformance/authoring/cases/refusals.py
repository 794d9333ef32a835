"""What every backend must refuse, and with which error."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..case import Case, StepCase, evaluate, invalid, set_state, train

PURPOSE = "invalid specs, states and inputs: refused with the right kind of error, before any harm"

_COMMENT = "Must be refused."


def _spec(name: str, **fields: Any) -> Case:
    return invalid(f"spec-{name}", _COMMENT, fields, train(), error="SpecError", at="spec")


def _state(name: str, state: Mapping[str, Any], **fields: Any) -> Case:
    return invalid(f"state-{name}", _COMMENT, fields, train(), error="StateError", at="state", state=state)


def _input(name: str, step: StepCase, **fields: Any) -> Case:
    return invalid(f"input-{name}", _COMMENT, fields, step, error="InputError", at=0)


_INTEGERS = np.arange(12, dtype=np.int32).reshape(4, 3)

CASES = [
    _spec("num-features-0", num_features=0),
    _spec("num-features-fraction", num_features=2.5),
    _spec("axis-0", axis=0),
    _spec("epsilon-negative", epsilon=-1e-3),
    _spec("epsilon-not-finite", epsilon="inf"),
    _spec("decay-above-1", decay=1.5),
    _spec("decay-below-0", decay=-0.1),
    _spec("decay-word", decay="average"),
    _spec("estimator-word", moving_variance_estimator="bessel"),
    _spec("flag-number", center=1),
    _spec("dtype-integer", param_dtype="int32"),
    _spec("dtype-complex", stats_dtype="complex64"),
    _spec("unknown-field", momentum=0.9),
    _spec("cumulative-zero-debias", decay="cumulative", zero_debias="all"),
    _spec("decay-1-zero-debias", decay=1.0, zero_debias="mean"),
    _spec("renorm-unbiased", renorm={"r_max": 3.0, "r_min": None, "d_max": 5.0, "decay": 0.9},
          moving_variance_estimator="unbiased"),
    _spec("renorm-cumulative", renorm={"r_max": 3.0, "r_min": None, "d_max": 5.0, "decay": 0.9}, decay="cumulative"),
    _spec("renorm-zero-debias", renorm={"r_max": None, "r_min": None, "d_max": None, "decay": 0.9}, zero_debias="all"),
    _spec("renorm-clips-crossed", renorm={"r_max": 0.5, "r_min": 2.0, "d_max": None, "decay": 0.9}),
    _spec("renorm-negative-clip", renorm={"r_max": None, "r_min": None, "d_max": -1.0, "decay": 0.9}),
    _spec("ghosts-synchronized", virtual_batch_size=2, synchronized=True),
    _spec("ghosts-0", virtual_batch_size=0),
    _spec("keep-cumulative", nonfinite="keep", decay="cumulative"),
    _spec("keep-zero-debias", nonfinite="keep", zero_debias="mean"),
    _spec("untracked-cumulative", track_moving_stats=False, decay="cumulative"),
    _spec("untracked-zero-debias", track_moving_stats=False, zero_debias="all"),
    _spec("untracked-renorm", track_moving_stats=False, renorm={"r_max": None, "r_min": None, "d_max": None, "decay": 0.9}),
    _state("negative-variance", {"moving_variance": [1.0, -0.5, 1.0]}),
    _state("variance-minus-tiny", {"moving_variance": [1.0, 1.0, -1e-12]}),
    _state("gamma-too-long", {"gamma": [1.0, 1.0, 1.0, 1.0]}),
    _state("gamma-column", {"gamma": np.ones((3, 1), np.float32)}),
    _state("moving-mean-scalar", {"moving_mean": np.zeros((), np.float32)}),
    _state("gamma-float64", {"gamma": np.ones(3, np.float64)}),
    _state("moving-variance-integer", {"moving_variance": np.ones(3, np.int32)}),
    _state("moving-mean-float16", {"moving_mean": np.zeros(3, np.float16)}),
    _state("gamma-missing", {"gamma": None}),
    _state("moving-variance-missing", {"moving_variance": None}),
    _state("gamma-extra", {"gamma": np.ones(3, np.float32)}, scale=False),
    _state("statistics-extra", {"moving_mean": np.zeros(3, np.float32)}, track_moving_stats=False),
    _state("counter-negative", {"num_updates": -1}),
    _state("counter-missing-cumulative", {"num_updates": None}, decay="cumulative"),
    invalid("state-set-negative-variance", "Loading between steps is checked like building.", {}, train(),
            set_state(moving_variance=[1.0, 1.0, -1.0]), error="StateError", at=1),
    _input("rank-1", train(shape=(3,))),
    _input("channels-wrong", train(shape=(4, 5))),
    _input("channels-broadcast", train(shape=(4, 1))),
    _input("channels-on-another-axis", train(shape=(2, 4, 3), dy=False), axis=1),
    _input("axis-beyond-rank", train(shape=(4, 3)), axis=2),
    _input("axis-is-batch", train(shape=(3, 4)), axis=-2),
    _input("integer", train(x=_INTEGERS, dy=False)),
    _input("integer-eval", evaluate(x=_INTEGERS, dy=False)),
    _input("boolean", train(x=_INTEGERS > 5, dy=False)),
    _input("one-value", train(shape=(1, 3))),
    _input("one-value-image", train(shape=(1, 3, 1, 1)), axis=1),
    _input("one-value-no-update", train(shape=(1, 3), update_stats=False)),
    _input("weights-too-long", train(shape=(4, 3), weights=[1.0] * 5, weights_dtype="float32", dy=False)),
    _input("weights-per-channel", train(shape=(4, 3), weights=[1.0] * 3, weights_dtype="float32", dy=False)),
    _input("weights-full", train(shape=(4, 3), weights=np.ones((4, 3), np.float32), dy=False)),
    _input("weights-transposed", train(shape=(2, 5, 3), weights=np.ones((5, 2), np.float32), dy=False)),
    _input("weights-time-only", train(shape=(2, 5, 3), weights=np.ones(5, np.float32), dy=False)),
    _input("weights-scalar", train(shape=(4, 3), weights=np.ones((), np.float32), dy=False)),
    _input("weights-negative", train(shape=(4, 3), weights=[1.0, 1.0, -0.5, 1.0], weights_dtype="float32", dy=False)),
    _input("weights-nan", train(shape=(4, 3), weights=[1.0, float("nan"), 1.0, 1.0], weights_dtype="float32", dy=False)),
    _input("weights-infinite", train(shape=(4, 3), weights=[1.0, float("inf"), 1.0, 1.0], weights_dtype="float32", dy=False)),
    _input("one-value-ghost", train(shape=(5, 3)), virtual_batch_size=2),
    _input("adjustment-ghosts", train(shape=(8, 3), adjustment=(1.0, 0.0)), virtual_batch_size=4),
    _input("adjustment-shape", train(shape=(8, 3), adjustment=(np.ones((7, 1)), 0.0))),
    _input("adjustment-rank", train(shape=(8, 3), adjustment=(np.ones((1, 8, 3)), 0.0))),
    _input("clips-without-renorm", train(renorm_clips={"r_max": 3.0})),
    _input("clips-crossed", train(renorm_clips={"r_max": 0.5, "r_min": 2.0}),
           renorm={"r_max": None, "r_min": None, "d_max": None, "decay": 0.9}),
    _input("frozen-untracked", train(frozen_statistics=True), track_moving_stats=False),
]  # fmt: skip
