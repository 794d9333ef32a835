"""float64 in JAX: there only under `jax_enable_x64`, and without it silently float32; here it is that or an error."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np

from bnlayer.errors import UnsupportedError
from bnlayer.spec import BatchNormSpec


def refuse_missing_float64(spec: BatchNormSpec, dtype: str) -> None:
    """Refuse a float64 x, or a float64 dtype in the spec, where JAX would compute in float32 and not say so.

    Raises:
        UnsupportedError: float64 is asked for without x64.
    """
    asked = {"x": dtype, "param_dtype": spec.param_dtype, "stats_dtype": spec.stats_dtype}
    names = [name for name, wanted in asked.items() if wanted == "float64"]
    if names and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise UnsupportedError(
            f"{' and '.join(names)} should be float64, which JAX has only under x64. Set"
            " jax.config.update('jax_enable_x64', True), call under `with jax.enable_x64(True):`, or use float32."
        )


def x64_where_asked(spec: BatchNormSpec, *dtypes: np.dtype[np.generic]) -> AbstractContextManager[object]:
    """A context with x64 on where the spec or one of `dtypes` is float64, and as it was elsewhere."""
    asked = "float64" in (spec.param_dtype, spec.stats_dtype, *(dtype.name for dtype in dtypes))
    return jax.enable_x64(True) if asked else nullcontext()
